"""What every tokenizer can do, and the cutting of a document into blocks that are tokenised one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rwkvmpi.corpus.containers import Readable

WINDOW = 64 << 10  # bytes that a tokenizer sees at once


class TokenBlock(NamedTuple):
    """byte_start: where the block begins in the document; tokens: int32 [n]; nbytes: bytes that they stand for."""

    byte_start: int
    tokens: np.ndarray
    nbytes: int


class Tokenizer(ABC):
    """Text as bytes to tokens and back.

    name: "world", "bytes" or the file's name; sha256: of the table that decides the tokens, hex; vocab_size: V of the
    models that it fits; token 0 is the end of a document for all of them.
    """

    name: str
    sha256: str
    vocab_size: int

    @abstractmethod
    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes that the tokens stand for; ValueError for an id that stands for none."""

    @abstractmethod
    def _take(self, window: bytes, final: bool) -> tuple[np.ndarray, int]:
        """(tokens int32, bytes they stand for) of the window's beginning: at least one byte of it, all when `final`.

        Must depend on the window's bytes only. `window` holds WINDOW bytes, or what is left when `final`; never none.
        """

    def blocks(self, stream: Readable, start_byte: int = 0) -> Iterator[TokenBlock]:
        """Tokenise a stream of bytes block by block, holding no more than a window.

        `stream` stands at byte `start_byte` of the document: 0, or the byte_start of a block that an earlier pass gave.
        Where the blocks begin depends on the document's bytes only, so that the rest of the blocks is the same then.
        """
        data = b""
        final = False
        while True:
            while not final and len(data) < WINDOW:
                more = stream.read(WINDOW - len(data))
                final = not more
                data += more
            if not data:
                return
            tokens, count = self._take(data, final)
            if tokens.size:
                yield TokenBlock(start_byte, tokens, count)
            start_byte += count
            data = data[count:]

    def encode(self, data: bytes) -> np.ndarray:
        """int32 [n]: the tokens of a whole text, the same ones that blocks() gives."""
        import io

        parts = [block.tokens for block in self.blocks(io.BytesIO(data))]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def incomplete_tail(data: bytes) -> int:
    """How many bytes at the end are the beginning of a UTF-8 character whose rest is missing (0 to 3)."""
    for count in range(1, min(3, len(data)) + 1):
        byte = data[-count]
        if byte >= 0xC2:  # a leading byte: it says how long its character is
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF5 else 1
            return count if length > count else 0
        if byte < 0x80:
            return 0
    return 0
