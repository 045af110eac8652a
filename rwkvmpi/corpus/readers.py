"""Opening a document: its text as a stream of bytes, whatever file it lies in."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO

from rwkvmpi.corpus.containers import document_errors, open_decompressed, printable, skip, split_kind, spool
from rwkvmpi.corpus.index import DocumentRef
from rwkvmpi.corpus.parquet import ParquetText
from rwkvmpi.corpus.records import SHORT_LINE, Line, text_of
from rwkvmpi.errors import DocumentError

# A row further ahead than this is reached by a fresh start in its row group, not by decoding all rows between.
_FEW_ROWS = 10_000
_SLICE = 256 << 10


class TextStream:
    """The bytes of one document's text. Its read() raises DocumentError where the text cannot be read any further."""

    def __init__(self, source: str, read: Callable[[int], bytes], close: Callable[[], None] | None = None) -> None:
        self._source = source
        self._read = read
        self._close = close

    def read(self, count: int) -> bytes:
        """At most `count` bytes, some unless the text has ended."""
        with document_errors(self._source):
            return self._read(count)

    def close(self) -> None:
        if self._close is not None:
            self._close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TextReader:
    """Opens documents one after another, one at a time.

    The file of the last record stays open: records that follow each other are read on from there, and going back in a
    compressed file opens it anew.
    """

    def __init__(self, text_key: str = "text") -> None:
        self._text_key = text_key
        self._path: str | None = None
        self._file: BinaryIO | None = None
        self._at = 0  # .jsonl: the byte at which _file stands; .parquet: the row that _rows gives next
        self._rows: Iterator[bytes | None] | None = None
        self._parquet: ParquetText | None = None

    def open(self, ref: DocumentRef, start_byte: int = 0) -> TextStream:
        """A stream of the text from its byte `start_byte` on. Close it before the next is opened.

        DocumentError, also from the stream, when the document cannot be read: the file vanished or is cut off, the
        record is none, the text is shorter than `start_byte`.
        """
        if ref.error is not None:
            raise DocumentError(ref.error)
        form, compression = split_kind(ref.kind)
        try:
            with document_errors(ref.source):
                if form == "txt":
                    return _open_file(ref.source, compression, start_byte)
                pieces = self._line(ref, compression) if form == "jsonl" else self._row(ref, compression)
            stream = TextStream(ref.source, _Pieces(pieces).read)
            _skip_to(stream, ref.source, start_byte)
            return stream
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file that is kept open. The reader can be used again."""
        self._parquet, self._rows, self._path = None, None, None
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> TextReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, ref: DocumentRef, compression: str) -> Iterator[bytes]:
        if self._path != ref.source or self._file is None or (compression and ref.locator < self._at):
            self.close()
            self._file = open_decompressed(ref.source, compression)
            self._path, self._at = ref.source, 0
        if compression:
            self._at += skip(self._file, ref.locator - self._at)
        else:
            self._at = self._file.seek(ref.locator)
        first = self._file.readline(SHORT_LINE)
        if not first:
            raise DocumentError(changed(ref.source))
        line = Line(ref.locator, first, self._file)
        # Of a long line nobody knows yet how far it will be read: the next record opens a compressed file anew.
        self._at = self._at + len(first) if line.short else sys.maxsize
        return text_of(line, self._text_key)

    def _row(self, ref: DocumentRef, compression: str) -> Iterator[bytes]:
        if self._path != ref.source or self._parquet is None:
            self.close()
            self._file = spool(ref.source, compression)
            self._parquet = ParquetText(self._file, self._text_key)
            self._path = ref.source
        if self._rows is None or not self._at <= ref.locator <= self._at + _FEW_ROWS:
            self._rows = self._parquet.texts(ref.locator)
            self._at = ref.locator
        text: bytes | None = None
        while self._at <= ref.locator:
            try:
                text = next(self._rows)
            except StopIteration:
                raise DocumentError(changed(ref.source)) from None
            self._at += 1
        if text is None:
            raise DocumentError(f"the value of {self._text_key!r} is null")
        return iter([text])


def open_text(ref: DocumentRef, text_key: str = "text") -> TextStream:
    """The text of one document as a stream of bytes. For many documents use a TextReader, which keeps files open."""
    reader = TextReader(text_key)
    stream = reader.open(ref)

    def close() -> None:
        stream.close()
        reader.close()

    return TextStream(ref.source, stream.read, close)


def _open_file(source: str, compression: str, start_byte: int) -> TextStream:
    file = open_decompressed(source, compression)
    stream = TextStream(source, file.read, file.close)
    try:
        if compression:
            _skip_to(stream, source, start_byte)
        elif file.seek(0, io.SEEK_END) < start_byte:
            raise DocumentError(changed(source))
        else:
            file.seek(start_byte)
    except BaseException:
        file.close()
        raise
    return stream


def _skip_to(stream: TextStream, source: str, start_byte: int) -> None:
    if skip(stream, start_byte) < start_byte:
        raise DocumentError(changed(source))


def changed(source: str) -> str:
    """The sentence for a document that is not what the index saw."""
    return f"{printable(source)}: the file has changed since it was indexed: the document is not there any more"


class _Pieces:
    """A stream of bytes out of pieces of any size."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._slices = _slices(pieces)
        self._held = bytearray()

    def read(self, count: int) -> bytes:
        while len(self._held) < count and (piece := next(self._slices, None)) is not None:
            self._held += piece
        data = bytes(self._held[:count])
        del self._held[:count]
        return data


def _slices(pieces: Iterator[bytes]) -> Iterator[memoryview]:
    """The pieces cut small: a whole text in one piece shall not be copied whole."""
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), _SLICE):
            yield view[start : start + _SLICE]
