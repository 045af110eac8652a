"""Records of .jsonl files: finding them one after another, and taking text and id out of each."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from rwkvmpi.corpus.containers import printable
from rwkvmpi.corpus.json_stream import JsonText
from rwkvmpi.errors import DocumentError

SHORT_LINE = 4 << 20  # a longer line is not parsed in one go
MAX_ID_CHARS = 1024
_PIECE = 1 << 20


class Line:
    """One line of a file: where it begins in the decompressed file, and its bytes, at once or piece by piece."""

    def __init__(self, offset: int, first: bytes, stream: BinaryIO) -> None:
        """first: what readline(SHORT_LINE) gave; the stream stands behind it."""
        self.offset = offset
        self._first = first
        self._stream = stream
        self._length = 0
        self._ended = self.short = len(first) < SHORT_LINE or first.endswith(b"\n")

    def read(self) -> bytes:
        """The next piece; b"" at the line's end."""
        piece, self._first = self._first, b""
        if not piece and not self._ended:
            piece = self._stream.readline(_PIECE)
            self._ended = len(piece) < _PIECE or piece.endswith(b"\n")
        self._length += len(piece)
        return piece

    def pass_over(self) -> int:
        """Read what is left of the line; returns its length in bytes."""
        while self.read():
            pass
        return self._length


def lines_of(stream: BinaryIO) -> Iterator[Line]:
    """The lines that are not blank. Each must be used before the next is asked for."""
    offset = 0
    while first := stream.readline(SHORT_LINE):
        line = Line(offset, first, stream)
        if not line.short or first.strip():
            yield line
        offset += line.pass_over()


def measure(line: Line, text_key: str, id_key: str | None) -> tuple[int, str | None]:
    """(bytes of the text, id or None) of the record; DocumentError when there is no text in it."""
    if line.short:
        text, identifier = _parse(line.read(), text_key, id_key)
        return len(text), identifier
    record = JsonText(line.read, text_key, id_key)
    nbytes = sum(map(len, record.text()))
    return nbytes, identifier_of(record.identifier)


def text_of(line: Line, text_key: str) -> Iterator[bytes]:
    """The pieces of the record's text. DocumentError, possibly after some of them, when it is broken."""
    if line.short:
        yield _parse(line.read(), text_key, None)[0]
    else:
        yield from JsonText(line.read, text_key).text()


def _parse(line: bytes, text_key: str, id_key: str | None) -> tuple[bytes, str | None]:
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DocumentError(f"the record is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DocumentError(f"the record is not JSON: {error.msg} (character {error.pos})") from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"the record is not JSON that can be read: {type(error).__name__}") from error
    if not isinstance(record, dict):
        raise DocumentError("the record is not a JSON object")
    if text_key not in record:
        raise DocumentError(f"the record has no key {text_key!r}")
    text = record[text_key]
    if not isinstance(text, str):
        raise DocumentError(f"the value of {text_key!r} is not a string")
    return text.encode("utf-8", "surrogatepass"), identifier_of(record.get(id_key) if id_key else None)


def identifier_of(value: Any) -> str | None:
    """The value of an id key as it is shown; None where there is none (null or an empty string)."""
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, (dict, list, bool, float)):
        value = json.dumps(value, sort_keys=True, default=str)
    return printable(str(value)[:MAX_ID_CHARS])
