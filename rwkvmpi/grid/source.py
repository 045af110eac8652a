"""The source of a replica: takes documents from the shared queue and turns them into frames for the first stage.

It runs on the rank (stage 0, slot 0) of its replica, between that rank's own chunks; reading and tokenising go on
in a child process. It also decides where commits cut the stream: the cut lies before a chunk that has not been sent
yet, so every rank learns of it in the order of the stream, without any other agreement.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from rwkvmpi.corpus.events import End, Event, Failed, InFlight, TokenCursor
from rwkvmpi.corpus.feeder import Feeder
from rwkvmpi.corpus.index import DocumentRef
from rwkvmpi.corpus.stream import ChunkBuilder, EndedDocument
from rwkvmpi.grid.activity import Activity
from rwkvmpi.grid.control import COORDINATOR, Control
from rwkvmpi.grid.frame import Frame, Word
from rwkvmpi.grid.transport import Hops, Receiver, Sender

READ_AHEAD_BYTES = 1 << 20  # of documents taken from the queue beyond the one being read
READ_AHEAD_DOCUMENTS = 64


@dataclass
class Cut:
    """What the source knows about one commit: documents that ended since the last one, the one that goes on."""

    chunks: int
    ended: list[EndedDocument]
    in_flight: InFlight | None


@dataclass
class CommitClock:
    """When the next commit is due: after so many seconds, or so many chunks."""

    seconds: float
    chunks: int
    _last: float = field(default_factory=time.monotonic)

    def due(self, chunks_since: int) -> bool:
        if self.chunks:
            return chunks_since >= self.chunks
        return time.monotonic() - self._last >= self.seconds

    def restart(self) -> None:
        self._last = time.monotonic()


class Source:
    """Supply of the frames of one replica's stream.

    `slots[s]` is the sender to ring slot s (None for the own one, slot 0).
    `cuts` maps a commit's number to what the source knows of it, until the ledger has taken it.
    """

    def __init__(
        self,
        feeder: Feeder,
        control: Control,
        slots: list[Sender | None],
        *,
        replica: int,
        chunk_size: int,
        clock: CommitClock,
        stop_on_error: bool,
        activity: Activity | None = None,
    ) -> None:
        self._activity = activity or Activity()
        self._feeder, self._control, self._slots = feeder, control, slots
        self._replica, self._chunk_size, self._clock = replica, chunk_size, clock
        self._stop_on_error = stop_on_error
        self._builder = ChunkBuilder(chunk_size)
        self._own: deque[Frame] = deque()
        self._outstanding: dict[int, int] = {}  # documents asked of the feeder -> their bytes
        self._asked = False  # a request to the queue is on its way
        self._exhausted = False
        self._next_index = 0
        self._last_commit_index = 0
        self._commit = 0
        self._cut_words = (-1, -1, -1)
        self._ended: list[EndedDocument] = []
        self._stopping = False
        self._without_commit = False
        self._done = False
        self._served = 0
        self.cuts: dict[int, Cut] = {}
        self.waited_s = 0.0
        self.hops = Hops()  # its frames do not travel to itself
        control.handle("documents", self._on_documents)
        control.handle("stop", lambda _source, _message: self._on_stop())

    # --- the face of a supply

    def next(self, index: int) -> Frame:
        """The frame of chunk `index` (slot 0's turn); frames for the other slots are sent on the way."""
        self._served = index
        self._advance(blocking=False)
        if not self._own:
            outer = self._activity.begin_wait(None, "tokens")
            start = time.perf_counter()
            while not self._own:
                self._advance(blocking=True)
            self.waited_s += time.perf_counter() - start
            self._activity.end_wait(outer)
        return self._own[0]

    def release(self) -> None:
        self._own.popleft()

    def close(self) -> None:
        for sender in self._slots:
            if sender is not None:
                sender.flush()
                sender.close()
        self._feeder.close()

    # --- documents in

    def _on_documents(self, _source: int, message: dict[str, Any]) -> None:
        self._asked = False
        self._exhausted = message["exhausted"]
        for item in message["documents"]:
            cursor = item["resume"]
            ref = DocumentRef(**item["ref"])
            self._outstanding[ref.index] = ref.nbytes
            resume = InFlight(ref.index, cursor[0], TokenCursor(cursor[1], cursor[2])) if cursor else None
            self._feeder.request(ref, resume)

    def _on_stop(self) -> None:
        self._stopping = True

    def _want_documents(self) -> bool:
        return (
            not (self._exhausted or self._asked or self._stopping)
            and len(self._outstanding) < READ_AHEAD_DOCUMENTS
            and (len(self._outstanding) < 2 or sum(self._outstanding.values()) < READ_AHEAD_BYTES)
        )

    # --- chunks out

    def _advance(self, blocking: bool) -> None:
        """Send all frames that can be sent now, at most two rounds of the ring ahead; wait a moment when blocking."""
        ring = len(self._slots)
        while not self._done and self._next_index < self._served + 2 * ring + 1:
            self._control.poll()
            if self._stopping:
                self._end_stream()
                return
            if self._want_documents():
                self._asked = True
                self._control.send(COORDINATOR, "take", replica=self._replica)
                self._control.poll()
            self._cut_if_due()
            if self._send_chunk():
                continue
            if not self._outstanding:
                if self._exhausted:
                    self._finish_stream()
                    return
                if not blocking or self._own:
                    return
                time.sleep(1e-4)  # the coordinator's answer is on its way
                continue
            wait = blocking and not self._own
            event = self._feeder.read(timeout=2e-3 if wait else 0.0)
            if event is not None:
                self._push(event)
            elif not wait:
                return

    def _push(self, event: Event) -> None:
        self._builder.push(event)
        if isinstance(event, End | Failed):
            self._outstanding.pop(event.doc, None)
        for failed in self._builder.failed:
            self._note_end(EndedDocument(failed.doc, 0, 0, failed.error))
        self._builder.failed.clear()

    def _note_end(self, ended: EndedDocument) -> None:
        if ended.error is not None:
            self._control.send(COORDINATOR, "failed", doc=ended.doc, error=ended.error)
            if self._stop_on_error:
                self._stopping = self._without_commit = True
        self._ended.append(ended)

    def _send_chunk(self) -> bool:
        chunk = self._builder.pop_chunk()
        if chunk is None:
            return False
        self._send(chunk)
        return True

    def _send(self, chunk: Any) -> None:
        for ended in chunk.ended:
            self._note_end(ended)
        sender, frame = self._open_frame(chunk.index % len(self._slots))
        frame.put_chunk(chunk)
        self._close_frame(sender, frame)
        self._next_index = chunk.index + 1

    def _open_frame(self, slot: int) -> tuple[Sender | None, Frame]:
        sender = self._slots[slot]
        return sender, Frame(self._chunk_size, None if sender is None else sender.buffer())

    def _close_frame(self, sender: Sender | None, frame: Frame) -> None:
        frame.header[Word.COMMIT] = self._commit
        frame.header[Word.CUT_INDEX : Word.CUT_POSITION + 1] = self._cut_words
        if sender is None:
            self._own.append(frame)
        else:
            sender.send(frame.index, 0)

    # --- commits and the end

    def _cut_if_due(self) -> None:
        since = self._next_index - self._last_commit_index
        if since >= len(self._slots) and self._clock.due(since):
            self._cut()

    def _cut(self) -> None:
        """Commit everything before the next chunk. Documents that end in chunks still to be sent stay for the next."""
        self._commit += 1
        in_flight = self._builder.cursor()
        self.cuts[self._commit] = Cut(self._next_index, self._ended, in_flight)
        self._ended = []
        self._cut_words = (self._next_index, in_flight.doc if in_flight else -1, in_flight.position if in_flight else 0)
        self._last_commit_index = self._next_index
        self._clock.restart()

    def _finish_stream(self) -> None:
        chunk = self._builder.finish()
        if chunk is not None:
            self._send(chunk)
        if not self._stopping:
            self._end_stream()

    def _end_stream(self) -> None:
        """Tell every slot, in its turn, that no chunk comes any more; all that was read is committed."""
        if not self._without_commit:
            self._cut()
        ring, chunks = len(self._slots), self._next_index
        for index in range(chunks, chunks + ring):
            sender, frame = self._open_frame(index % ring)
            frame.begin(index)
            frame.header[Word.END], frame.header[Word.CHUNKS] = 1, chunks
            self._close_frame(sender, frame)
        self._done = True


class LinkSupply:
    """Frames that come from a neighbour: the stage above, or the replica's source."""

    def __init__(self, receiver: Receiver, chunk_size: int) -> None:
        self._receiver = receiver
        self._chunk_size = chunk_size

    @property
    def waited_s(self) -> float:
        return self._receiver.waited_s

    @property
    def hops(self) -> Hops:
        return self._receiver.hops

    def next(self, index: int) -> Frame:
        return Frame(self._chunk_size, self._receiver.wait(index))

    def release(self) -> None:
        self._receiver.release()

    def close(self) -> None:
        self._receiver.close()
