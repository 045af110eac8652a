"""Opening input files: which suffixes are read, decompression as streams, and the errors they may raise."""

from __future__ import annotations

import io
import os
import stat
import tempfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol, cast

from rwkvmpi.errors import DocumentError

FORMATS = ("txt", "jsonl", "parquet")
COMPRESSIONS = ("", "gz", "zst")
KINDS = tuple(f"{name}.{suffix}".rstrip(".") for name in FORMATS for suffix in COMPRESSIONS)
SUFFIXES_SENTENCE = ".txt, .jsonl or .parquet, each also with .gz or .zst"

_BUFFER = 256 << 10
_GZIP_FEED = 64 << 10
# One call of the zstd decompressor returns all that its input stands for, up to 128 KiB per 4 bytes: so it gets little.
_ZSTD_FEED = 1024
_ZSTD_MAX_WINDOW = 1 << 27  # 128 MiB; what the zstd command writes without --long=28 or more


class Readable(Protocol):
    """Whatever bytes can be read from; fewer than asked for are no sign of the end, none are."""

    def read(self, count: int, /) -> bytes: ...


def kind_of(path: str) -> str | None:
    """One of KINDS ("txt", "jsonl.gz", ...) by the file's name, in any letter case; None when it is none of them."""
    name = os.path.basename(path).lower()
    # The longest suffix first, or "a.txt.gz" would never be found; a name that is only a suffix counts too.
    for kind in sorted(KINDS, key=len, reverse=True):
        if name.endswith("." + kind):
            return kind
    return None


def split_kind(kind: str) -> tuple[str, str]:
    """("jsonl", "gz") of "jsonl.gz"; ("txt", "") of "txt"."""
    name, _, compression = kind.partition(".")
    return name, compression


def sentence(error: BaseException) -> str:
    """What went wrong, in a few words without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, EOFError):
        return "the compressed data is cut off"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def document_errors(source: str) -> Iterator[None]:
    """Turn what reading and decompressing may raise into a DocumentError that names the file."""
    import zstandard

    try:
        yield
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DocumentError(f"{printable(source)}: {sentence(error)}") from error


def printable(text: str) -> str:
    """The text without what UTF-8 or a results file cannot hold: lone surrogates and control characters are escaped."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def open_raw(path: str) -> BinaryIO:
    """The file's bytes, buffered. OSError as open() has it, and for anything but a regular file."""
    # Look first: opening a pipe would wait for a writer for ever.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(0, "not a regular file")
    return open(path, "rb", buffering=_BUFFER)


def open_decompressed(path: str, compression: str) -> BinaryIO:
    """A buffered stream of the file's decompressed bytes. Cut-off data raises EOFError, broken data zlib.error or
    zstandard.ZstdError, when read."""
    raw = open_raw(path)
    if compression and os.fstat(raw.fileno()).st_size == 0:
        raw.close()
        raise EOFError  # even nothing compresses to some bytes: the file was cut off at its very start
    if compression == "gz":
        return cast(BinaryIO, io.BufferedReader(_GzipStream(raw, _GZIP_FEED), buffer_size=_BUFFER))
    if compression == "zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdStream(raw, _ZSTD_FEED), buffer_size=_BUFFER))
    return raw


def spool(path: str, compression: str) -> BinaryIO:
    """A seekable file of the decompressed bytes: the file itself, or a nameless temporary copy."""
    if not compression:
        return open_raw(path)
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        with open_decompressed(path, compression) as source:
            while data := source.read(1 << 20):
                copy.write(data)
        copy.seek(0)
    except BaseException:
        copy.close()
        raise
    return cast(BinaryIO, copy)


def skip(stream: Readable, count: int) -> int:
    """Read and drop `count` bytes; returns how many there were."""
    left = count
    while left and (data := stream.read(min(left, 1 << 20))):
        left -= len(data)
    return count - left


class _FrameStream(io.RawIOBase):
    """The decompressed bytes of frames that follow each other. Gives all that lies before a break, then EOFError."""

    def __init__(self, raw: BinaryIO, feed: int) -> None:
        self._raw = raw
        self._feed = feed
        self._frame: Any = None  # a decompressor inside a frame
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            data = self._input or self._raw.read(self._feed)
            if not data:
                if self._frame is not None:
                    raise EOFError
                return 0
            if self._frame is None:
                self._frame = self._new_frame(data)
            if self._frame is None:
                self._input = b""
                continue
            output, self._input = self._decompress(data)
            self._output = memoryview(output)
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()

    @abstractmethod
    def _new_frame(self, data: bytes) -> Any:
        """A decompressor for the frame that begins with `data`; None when that is padding."""

    @abstractmethod
    def _decompress(self, data: bytes) -> tuple[bytes, bytes]:
        """(some output, the input that is left)."""


class _GzipStream(_FrameStream):
    """Members of a gzip file. Zeros after the last one are padding, as tapes have it."""

    def _new_frame(self, data: bytes) -> Any:
        return zlib.decompressobj(wbits=31) if data.strip(b"\0") else None

    def _decompress(self, data: bytes) -> tuple[bytes, bytes]:
        output = self._frame.decompress(data, _BUFFER)
        # At the end of the input some output may still be held back; an empty input asks for it.
        return output, self._frame.unused_data if self._frame.eof else self._frame.unconsumed_tail


class _ZstdStream(_FrameStream):
    """Frames of a zstd file. zstandard's own readers take a cut-off last frame for its end."""

    def _new_frame(self, data: bytes) -> Any:
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW).decompressobj()

    def _decompress(self, data: bytes) -> tuple[bytes, bytes]:
        output = self._frame.decompress(data)
        return output, self._frame.unused_data if self._frame.eof else b""
