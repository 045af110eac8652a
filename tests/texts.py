"""Texts to read."""

from __future__ import annotations

import random


def text_of(length: int, seed: int) -> bytes:
    """Bytes that look a little like text: words of few letters, some lines."""
    source = random.Random(seed)
    return bytes(source.choice(b"abcdefghij   \n,.") for _ in range(length))
