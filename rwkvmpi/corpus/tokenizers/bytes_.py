"""The tokenizer of byte models: every byte is its own token."""

from __future__ import annotations

import hashlib

import numpy as np

from rwkvmpi.corpus.tokenizers.base import Tokenizer


class BytesTokenizer(Tokenizer):
    """Token id = value of the byte. 0 is both the byte NUL and the end of a document, as the models have it."""

    name = "bytes"
    sha256 = hashlib.sha256(bytes(range(256))).hexdigest()
    vocab_size = 256

    def decode(self, ids: np.ndarray) -> bytes:
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() > 255):
            raise ValueError(f"tokens {ids.min()} to {ids.max()} are not all bytes")
        return ids.astype(np.uint8).tobytes()

    def _take(self, window: bytes, final: bool) -> tuple[np.ndarray, int]:
        return np.frombuffer(window, dtype=np.uint8).astype(np.int32), len(window)
