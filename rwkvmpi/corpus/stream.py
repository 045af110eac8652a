"""The stream: documents laid end to end and cut into chunks of G rows.

A document with n tokens takes the positions 0..n. The input at position 0 is token 0 (end-of-document), at position
i > 0 it is token i - 1; the target at position i < n is token i, at position n there is none. Every document begins at
a row that is a multiple of 32, so chunk boundaries fall on multiples of 32 of each document's positions.

A document that an earlier run hands on is read from where that run ended, and its tokens and positions count from
there: position 0 is the last one of the earlier run, whose output predicts token 0, and the positions 1..n are laid.
Chunk boundaries fall on multiples of 32 rows from position 1. With no new token it is a segment of no rows, which only
says that it ends; 32 rows are left free for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rwkvmpi.corpus.events import Begin, Block, End, Event, Failed, InFlight, TokenCursor

ALIGNMENT = 32  # rows; documents and chunks begin at multiples of it
DEFAULT_ROWS = 1024  # G

# Columns of Chunk.segments, int64 [D, SEGMENT_COLUMNS].
# JOIN, where HANDED_ON: token 0, the input of its first row, -1 when there is none; else 0.
ROW, COUNT, DOC, POSITION, FLAGS, NTOKENS, JOIN = range(7)
SEGMENT_COLUMNS = 8  # the last one is spare and 0

# Bits of the column FLAGS.
BEGINS = 1  # position 0: start from the initial state
CONTINUES = 2  # the state comes from the chunk before
RESUMES = 4  # the state comes from saved files
ENDS = 8  # the document ends here; else it goes on in the next chunk
FAILED = 16  # the document broke off here: discard its results
HANDED_ON = 32  # position 1: the state comes from the earlier run that hands the document on

NO_TARGET = -1


class EndedDocument(NamedTuple):
    """A document whose last segment stands in a chunk; error is None when it was read to its end.

    nbytes: bytes of its text, ntokens: its tokens, of a document handed on those that are new; both 0 for a document
    that broke off. sha256: of its whole text, b"" when it was not asked for.
    """

    doc: int
    nbytes: int
    ntokens: int
    error: str | None
    sha256: bytes = b""


class FailedDocument(NamedTuple):
    """A document of which this builder laid no row. before_chunk: index of the chunk that was being filled then."""

    doc: int
    error: str
    before_chunk: int


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """G rows of the stream.

    index: number of the chunk, counting up; tokens: int32 [G], the inputs (0 in padding rows); targets: int32 [G], the
    token that each row's output predicts (-1: none); segments: int64 [D, 8], one row per document in the chunk, columns
    ROW, COUNT, DOC, POSITION, FLAGS, NTOKENS (-1 unless ENDS without FAILED) and JOIN, ascending and apart from each
    other; ended: the documents that end here, in order; in_flight: the document that goes on in the next chunk.
    """

    index: int
    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    ended: tuple[EndedDocument, ...]
    in_flight: InFlight | None

    @property
    def rows(self) -> np.ndarray:
        """int32 [D, 2]: (first row, number of rows) of each segment, what the operators take."""
        return np.ascontiguousarray(self.segments[:, [ROW, COUNT]], dtype=np.int32)


class ChunkBuilder:
    """Lays the events of a feeder into chunks, as they come.

    push() takes events in the feeder's order; pop_chunk() gives the chunks that are complete. A chunk is complete when
    all its rows are laid and the target of its last row is known. At most one chunk's worth of rows is held besides
    the complete chunks that wait to be popped. The same events give the same chunks, however they are cut into blocks.
    """

    def __init__(self, rows: int = DEFAULT_ROWS, first_index: int = 0) -> None:
        """rows: G, a positive multiple of 32 (else ValueError); first_index: number of the first chunk."""
        if rows <= 0 or rows % ALIGNMENT:
            raise ValueError(f"a chunk must have a positive multiple of {ALIGNMENT} rows, not {rows}")
        self.rows = rows
        self.failed: list[FailedDocument] = []  # the caller may empty it whenever it has read it
        self._index = first_index
        self._complete: deque[Chunk] = deque()
        self._given: InFlight | None = None
        self._doc: int | None = None  # the document being laid
        self._handed_on = False
        self._input = 0  # its next position to lay; the input there is token _input - 1
        self._laid = False  # whether any row of it was laid here
        self._seen = 0  # number of its tokens seen so far
        self._start_chunk()

    def _start_chunk(self) -> None:
        self._tokens = np.zeros(self.rows, dtype=np.int32)
        self._targets = np.full(self.rows, NO_TARGET, dtype=np.int32)
        self._segments: list[list[int]] = []
        self._ended: list[EndedDocument] = []
        self._row = 0  # the next free row

    def push(self, event: Event) -> None:
        """Take the next event. Events of two documents that interleave, or tokens out of order, raise ValueError."""
        match event:
            case Begin(doc, position, handed_on):
                self._begin(doc, position, handed_on)
            case Block(doc, byte_start, first_token, tokens):
                self._lay(doc, TokenCursor(byte_start, first_token), tokens)
            case End(doc, nbytes, ntokens, sha256):
                self._end(doc, nbytes, ntokens, sha256)
            case Failed(doc, error):
                if self._doc not in (None, doc):
                    raise ValueError(f"document {doc} failed inside document {self._doc}")
                self._fail(doc, error)
            case _:
                raise TypeError(f"{event!r} is not an event of a feeder")

    def pop_chunk(self) -> Chunk | None:
        """The next complete chunk, or None when more events are needed first."""
        if not self._complete:
            return None
        chunk = self._complete.popleft()
        self._given = chunk.in_flight
        return chunk

    def finish(self) -> Chunk | None:
        """Pad and give the chunk being filled; None when it holds no row. Pop the complete chunks before.

        Only between documents (ValueError otherwise). More documents may be pushed afterwards.
        """
        if self._doc is not None:
            raise ValueError(f"document {self._doc} has not ended")
        if self._complete:
            raise ValueError("complete chunks wait to be popped")
        if self._row:
            self._emit(None)
        return self.pop_chunk()

    def cursor(self) -> InFlight | None:
        """The document that crosses the end of the chunk given last, and where it goes on; None when there is none."""
        return self._given

    @property
    def open_document(self) -> int | None:
        """The document that has begun and not ended, or None."""
        return self._doc

    def _begin(self, doc: int, position: int, handed_on: bool) -> None:
        if self._doc is not None:
            raise ValueError(f"document {doc} begins inside document {self._doc}")
        if position < handed_on or (position - handed_on) % ALIGNMENT:
            what = f"one more than a multiple of {ALIGNMENT}" if handed_on else f"multiple of {ALIGNMENT}"
            raise ValueError(f"document {doc} cannot go on at position {position}: no {what}")
        # Nothing is laid before the first token or the end: a document that cannot be read shall leave no trace.
        self._doc, self._input, self._laid, self._seen, self._handed_on = doc, position, False, -1, handed_on

    def _open_segment(self, flag: int, join: int = 0) -> None:
        assert self._doc is not None
        self._segments.append([self._row, 0, self._doc, self._input, flag, -1, join, 0])
        self._laid = True

    @property
    def _begins_handed_on(self) -> bool:
        return self._handed_on and self._input == 1

    def _lay_start(self) -> None:
        """Position 0 of a document: token 0."""
        self._open_segment(BEGINS)
        self._row += 1
        self._input = 1

    def _lay(self, doc: int, cursor: TokenCursor, tokens: np.ndarray) -> None:
        if doc != self._doc:
            raise ValueError(f"tokens of document {doc} inside document {self._doc}")
        if self._seen >= 0 and cursor.tokens_before != self._seen:
            raise ValueError(f"document {doc}: token {cursor.tokens_before} follows token {self._seen - 1}")
        self._seen = cursor.tokens_before + len(tokens)
        if self._input == 0:
            if cursor.tokens_before:
                raise ValueError(f"document {doc} begins with token {cursor.tokens_before}")
            self._lay_start()
        if cursor.tokens_before > self._input - 1:
            raise ValueError(f"document {doc} goes on at token {cursor.tokens_before}, after position {self._input}")
        # The block from which a document is resumed begins before the position at which it goes on.
        tokens = tokens[self._input - 1 - cursor.tokens_before :]
        if len(tokens) and not self._laid:
            if self._begins_handed_on:
                self._open_segment(HANDED_ON, int(tokens[0]))
            else:
                self._open_segment(RESUMES)
        while len(tokens):
            if self._row == self.rows:
                self._targets[-1] = tokens[0]
                self._emit(InFlight(doc, self._input, cursor))
                self._open_segment(CONTINUES)
            row, count = self._row, min(len(tokens), self.rows - self._row)
            self._tokens[row : row + count] = tokens[:count]
            # Each token is the target of the row before its own, if that row belongs to the same segment.
            skip = 1 if row == self._segments[-1][ROW] else 0
            self._targets[row - 1 + skip : row - 1 + count] = tokens[skip:count]
            self._row += count
            self._input += count
            tokens = tokens[count:]

    def _end(self, doc: int, nbytes: int, ntokens: int, sha256: bytes) -> None:
        if doc != self._doc:
            raise ValueError(f"document {doc} ends inside document {self._doc}")
        begins = self._input == 0 or self._begins_handed_on
        seen = 0 if begins and self._seen < 0 else self._seen
        if seen >= 0 and ntokens != seen:
            raise ValueError(f"document {doc} ends with {ntokens} tokens after {seen} were read")
        if self._input == 0:
            self._lay_start()
        if not self._laid and self._begins_handed_on:
            self._open_segment(HANDED_ON, NO_TARGET)
        if not self._laid:
            self._fail(doc, f"the document has changed: it ends before token {self._input}, where it was left")
            return
        self._segments[-1][FLAGS] |= ENDS
        self._segments[-1][NTOKENS] = ntokens
        self._close(EndedDocument(doc, nbytes, ntokens, None, sha256))

    def _fail(self, doc: int, error: str) -> None:
        if self._doc is None or not self._laid:
            self._doc = None
            self.failed.append(FailedDocument(doc, error, self._index))
            return
        self._segments[-1][FLAGS] |= ENDS | FAILED
        self._close(EndedDocument(doc, 0, 0, error))

    def _close(self, ended: EndedDocument) -> None:
        """The document is over: note it, and go to the next multiple of 32."""
        self._ended.append(ended)
        self._doc = None
        self._close_segment()
        if not self._segments[-1][COUNT]:
            self._row += ALIGNMENT  # of no rows: the next one begins elsewhere
        self._row += -self._row % ALIGNMENT
        if self._row == self.rows:
            self._emit(None)

    def _close_segment(self) -> None:
        self._segments[-1][COUNT] = self._row - self._segments[-1][ROW]

    def _emit(self, in_flight: InFlight | None) -> None:
        if in_flight is not None:
            self._close_segment()
        segments = np.array(self._segments, dtype=np.int64).reshape(-1, SEGMENT_COLUMNS)
        ended = tuple(self._ended)
        self._complete.append(Chunk(self._index, self._tokens, self._targets, segments, ended, in_flight))
        self._index += 1
        self._start_chunk()


def chunks_of(events: Iterable[Event], rows: int = DEFAULT_ROWS, first_index: int = 0) -> Iterator[Chunk]:
    """All chunks of a finite series of events, the last one padded. Events may end only between documents."""
    builder = ChunkBuilder(rows, first_index)
    for event in events:
        builder.push(event)
        while (chunk := builder.pop_chunk()) is not None:
            yield chunk
    if (chunk := builder.finish()) is not None:
        yield chunk
