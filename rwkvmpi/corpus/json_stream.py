"""Taking the text out of one JSON record piece by piece, for records too long to be parsed in one go.

Accepts what json.loads() accepts and gives the same text and id, holding no more than a few pieces. Two differences:
a text key that occurs twice is an error, and so is a key or a number of more than 64 KiB.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from rwkvmpi.errors import DocumentError

_BODY = re.compile(rb'(?:[^"\\\x00-\x1f]+|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*')  # the inside of a string
_ESCAPE = re.compile(rb"\\u([dD][89abAB]..)\\u([dD][c-fC-F]..)|\\u(....)|\\(.)", re.DOTALL)  # in what _BODY found
_ESCAPES = dict(zip((b'"', b"\\", b"/", b"b", b"f", b"n", b"r", b"t"), b'"\\/\b\f\n\r\t', strict=True))
_SLICE = 64 << 10  # bounds what the match of _BODY takes in memory
_HIGH = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
_NOT_SPACE = re.compile(rb"[^ \t\n\r]")
_DELIMITER = re.compile(rb"[\s,:\]}]")  # ends a number or a literal
_MAX_SCALAR = 64 << 10
_MAX_DEPTH = 500
_ESCAPE_BYTES = 6  # of \uXXXX


class JsonText:
    """One record, read once: iterate over text(), then the identifier is known."""

    def __init__(self, read: Callable[[], bytes], text_key: str, id_key: str | None = None) -> None:
        """`read` gives the next piece of the record, b"" at its end."""
        self.identifier: Any = None
        self._read = read
        self._text_key = text_key
        self._id_key = id_key
        self._buffer = b""
        self._at = 0  # in the buffer
        self._before = 0  # bytes of the record before the buffer
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._ended = False

    def text(self) -> Iterator[bytes]:
        """The pieces of the text. DocumentError, possibly after some of them, when the record is not what it should."""
        found = False
        if self._peek() != b"{":
            self._wrong("it is not an object")
        self._at += 1
        comma = False
        while self._peek() != b"}" or comma:
            key = self._scalar_string()
            self._expect(b":")
            first = self._peek()
            if key == self._text_key:
                if found:
                    raise DocumentError(f"the record has the key {key!r} twice")
                if first != b'"':
                    raise DocumentError(f"the value of {key!r} is not a string")
                found = True
                yield from self._string()
            elif key == self._id_key and first not in (b"{", b"["):
                # A longer id than _MAX_SCALAR is an error, which is as good as any other answer to it.
                self.identifier = self._scalar_string() if first == b'"' else self._literal()
            else:
                self._skip_value()
            comma = self._peek() == b","
            if comma:
                self._at += 1
            elif self._peek() != b"}":
                self._wrong("a comma is missing")
        self._at += 1
        if self._peek():
            self._wrong("something follows the object")
        if not found:
            raise DocumentError(f"the record has no key {self._text_key!r}")

    # --- the bytes

    def _fill(self) -> bool:
        """Add the next piece to the buffer; False at the record's end."""
        if self._ended:
            return False
        piece = self._read()
        self._ended = not piece
        try:
            self._utf8.decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            raise DocumentError("the record is not UTF-8") from error
        if self._before == 0 and not self._buffer:
            piece = piece.removeprefix(codecs.BOM_UTF8)
        self._before += self._at
        self._buffer = self._buffer[self._at :] + piece
        self._at = 0
        return bool(piece)

    def _peek(self) -> bytes:
        """The next byte that is no white space, which is passed over; b"" at the end."""
        while True:
            match = _NOT_SPACE.search(self._buffer, self._at)
            if match is not None:
                self._at = match.start()
                return match.group()
            self._at = len(self._buffer)
            if not self._fill():
                return b""

    def _expect(self, byte: bytes) -> None:
        if self._peek() != byte:
            self._wrong(f"{byte.decode()!r} is missing")
        self._at += 1

    def _wrong(self, what: str) -> NoReturn:
        raise DocumentError(f"the record is not JSON: {what} (byte {self._before + self._at})")

    # --- values

    def _string(self) -> Iterator[bytes]:
        """The pieces of the string that begins here, as UTF-8, cut anywhere, also inside a character."""
        self._expect(b'"')
        while True:
            limit = min(len(self._buffer), self._at + _SLICE)
            body = _BODY.match(self._buffer, self._at, limit)
            assert body is not None  # it may be empty
            piece = body.group()
            last = self._ended and limit == len(self._buffer)
            if body.end() + _ESCAPE_BYTES > limit and not last and _ends_with_half_a_pair(piece):
                piece = piece[:-_ESCAPE_BYTES]  # its other half may follow
            if piece:
                self._at += len(piece)
                yield _ESCAPE.sub(_unescape, piece) if b"\\" in piece else piece
                continue
            following = self._buffer[self._at : self._at + 1]
            if following == b'"':
                self._at += 1
                return
            if following not in (b"", b"\\"):
                self._wrong("a control character in a string")
            if self._ended or len(self._buffer) - self._at >= 2 * _ESCAPE_BYTES:
                self._wrong("an unknown escape in a string" if following else "a string does not end")
            self._fill()

    def _scalar_string(self) -> str:
        parts, length = [], 0
        for part in self._string():
            parts.append(part)
            length += len(part)
            if length > _MAX_SCALAR:
                self._wrong("a key or an id is too long")
        return b"".join(parts).decode("utf-8", "surrogatepass")

    def _literal(self) -> Any:
        """A number, true, false or null."""
        while (match := _DELIMITER.search(self._buffer, self._at)) is None:
            if len(self._buffer) - self._at > _MAX_SCALAR:
                self._wrong("a number is too long")
            if not self._fill():
                break
        end = len(self._buffer) if match is None else match.start()
        literal, self._at = self._buffer[self._at : end], end
        try:
            return json.loads(literal.decode("utf-8", "replace"))
        except ValueError:
            self._wrong("a value is none")

    def _skip_value(self) -> None:
        """Pass over a value of any kind; without recursion, since it may be nested deeply."""
        open_brackets: list[bytes] = []
        while True:
            first = self._peek()
            if first in (b"{", b"["):
                self._at += 1
                open_brackets.append(first)
                if len(open_brackets) > _MAX_DEPTH:
                    self._wrong("it is nested too deeply")
                if self._peek() != _CLOSING[first]:
                    if first == b"{":
                        self._skip_key()
                    continue
            elif first == b'"':
                for _ in self._string():
                    pass
            else:
                self._literal()
            # A value or an empty bracket ended: close what closes here, or go on behind a comma.
            while open_brackets:
                if self._peek() == b",":
                    self._at += 1
                    if open_brackets[-1] == b"{":
                        self._skip_key()
                    break
                self._expect(_CLOSING[open_brackets.pop()])
            else:
                return

    def _skip_key(self) -> None:
        if self._peek() != b'"':
            self._wrong("a key is missing")
        for _ in self._string():
            pass
        self._expect(b":")


_CLOSING = {b"{": b"}", b"[": b"]"}


def _unescape(found: re.Match[bytes]) -> bytes:
    high, low, single, letter = found.groups()
    if letter:
        return bytes([_ESCAPES[letter]])
    if single:
        return chr(int(single, 16)).encode("utf-8", "surrogatepass")
    return chr(0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00).encode()


def _ends_with_half_a_pair(piece: bytes) -> bool:
    """Whether it ends with the escape of a high surrogate (and not with an escaped backslash and the same letters)."""
    if not _HIGH.fullmatch(piece, max(0, len(piece) - _ESCAPE_BYTES)):
        return False
    before = piece[: 1 - _ESCAPE_BYTES]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1
