"""The World tokenizer: greedy longest match over bytes with a table of 65,529 entries, ids 1 to 65529.

Valid UTF-8 is encoded by the compiled `pyrwkv_tokenizer`, invalid bytes and what stands close to them by a plain
search in the table. Since no entry is longer than 128 bytes, a match that begins 128 bytes before the end of the known
bytes does not depend on what follows: that is where blocks may be cut.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np

from rwkvmpi.corpus.tokenizers.base import Tokenizer, incomplete_tail

LONGEST = 128  # bytes of the longest entry
_TABLE_NAME = "rwkv_vocab_v20230424.txt"
_DETOUR = 256  # bytes after an invalid one that the plain search takes, so that a text full of them stays linear


class LongestMatch:
    """Greedy longest match, in plain Python: the fallback for bytes that are no text, and the oracle of the tests."""

    def __init__(self, entries: dict[bytes, int]) -> None:
        self._entries = entries
        lengths: dict[bytes, set[int]] = {}
        for entry in entries:
            lengths.setdefault(entry[:2], set()).add(len(entry))
        # For every two bytes, the lengths of the entries that begin with them, the longest first.
        self._lengths = {prefix: tuple(sorted(found, reverse=True)) for prefix, found in lengths.items()}

    def encode(self, data: bytes, start: int = 0, stop: int | None = None) -> tuple[list[int], int]:
        """(ids of the tokens that begin in [start, stop), byte behind the last of them). Every single byte must be an
        entry."""
        stop = len(data) if stop is None else stop
        entries, all_lengths, ids = self._entries, self._lengths, []
        while start < stop:
            for length in all_lengths.get(data[start : start + 2], ()):
                found = entries.get(data[start : start + length])
                # A slice at the end of the data may be shorter than the length asked for, and still an entry.
                if found is not None:
                    start += min(length, len(data) - start)
                    break
            else:
                found = entries[data[start : start + 1]]
                start += 1
            ids.append(found)
        return ids, start


class WorldTokenizer(Tokenizer):
    """Fits the models with V = 65536. Token 0 is the end of a document and stands for no byte; 65530... are unused."""

    name = "world"
    vocab_size = 65536

    def __init__(self) -> None:
        import pyrwkv_tokenizer

        self._path = Path(pyrwkv_tokenizer.__file__).with_name(_TABLE_NAME)
        table = self._path.read_bytes()
        self.sha256 = hashlib.sha256(table).hexdigest()
        self._compiled = pyrwkv_tokenizer.RWKVTokenizer(vocab_filepath=str(self._path))
        # Each line: id, the entry as a Python literal, its length in bytes.
        self._lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for line in table.decode("utf-8").split("\n"):
            if line:
                self._lengths[int(line[: line.index(" ")])] = int(line[line.rindex(" ") :])

    @cached_property
    def entries(self) -> dict[bytes, int]:
        """{bytes: id} of the whole table."""
        found = {}
        for line in self._path.read_text(encoding="utf-8").split("\n"):
            if line:
                value = ast.literal_eval(line[line.index(" ") : line.rindex(" ")].strip())
                found[value if isinstance(value, bytes) else value.encode()] = int(line[: line.index(" ")])
        return found

    @cached_property
    def plain(self) -> LongestMatch:
        """The same table, searched without the compiled tokenizer."""
        return LongestMatch(self.entries)

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        return {0: b""} | {number: entry for entry, number in self.entries.items()}

    def decode(self, ids: np.ndarray) -> bytes:
        table = self._bytes_of
        try:
            return b"".join([table[number] for number in np.asarray(ids).tolist()])
        except KeyError as error:
            raise ValueError(f"token {error.args[0]} is not in the World table") from None

    def _take(self, window: bytes, final: bool) -> tuple[np.ndarray, int]:
        if not final:
            window = window[: len(window) - incomplete_tail(window)]
        # Tokens that begin before `limit` do not depend on what follows the window.
        limit = len(window) if final else len(window) - (LONGEST - 1)
        parts: list[np.ndarray] = []
        position = 0
        while position < limit:
            valid = _valid_end(window, position)
            sure = valid if final and valid == len(window) else valid - (LONGEST - 1)
            if position < sure:
                ids, ends = self._fast(window, position, valid)
                count = int(np.searchsorted(ends, sure, side="left")) + 1  # the last one begins before `sure`
                count = min(count, len(ids))
                if valid == len(window) and not final:
                    count = _last_whole_character(window, ends, count)
                parts.append(ids[:count])
                position = int(ends[count - 1])
                if valid == len(window):
                    break
            found, position = self.plain.encode(window, position, min(limit, valid + _DETOUR))
            parts.append(np.array(found, dtype=np.int32))
        return np.concatenate(parts), position

    def _fast(self, window: bytes, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, byte behind each) of window[start:stop], which is valid UTF-8."""
        ids = np.array(self._compiled.encode(window[start:stop].decode("utf-8")), dtype=np.int32)
        return ids, start + np.cumsum(self._lengths[ids])


def _valid_end(window: bytes, start: int) -> int:
    """How far the window is valid UTF-8 from `start` on."""
    try:
        window[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        return start + error.start
    return len(window)


def _last_whole_character(window: bytes, ends: np.ndarray, count: int) -> int:
    """The most tokens, up to `count`, behind which a character begins: the next block then begins with valid text."""
    for fewer in range(count, 0, -1):
        end = int(ends[fewer - 1])
        if end == len(window) or window[end] & 0xC0 != 0x80:
            return fewer
    return count
