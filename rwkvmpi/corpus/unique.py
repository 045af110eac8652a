"""Making document ids unique without holding them all."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import numpy as np


def _hash(identifier: str) -> int:
    return int.from_bytes(blake2b(identifier.encode(), digest_size=8).digest(), "little")


def rename_duplicates(count: int, identifier: Callable[[int], str]) -> dict[int, str]:
    """{number: new id} for the documents 0..count-1 whose id an earlier one has: "id#2", "id#3", ...

    A new id is one that no document has. The outcome depends on the ids and their order only. Takes 24 bytes a
    document while it works.
    """
    hashes = np.fromiter((_hash(identifier(number)) for number in range(count)), dtype=np.uint64, count=count)
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    suspects = np.flatnonzero(np.isin(hashes, repeated))
    renamed: dict[int, str] = {}
    seen: set[str] = set()
    last: dict[str, int] = {}

    def taken(name: str) -> bool:
        # Two ids of equal hash would only make this skip a free name, which hurts nobody.
        value = np.uint64(_hash(name))
        place = int(np.searchsorted(ordered, value))
        return place < count and ordered[place] == value

    for number in suspects.tolist():
        name = identifier(number)
        if name not in seen:
            seen.add(name)
            continue
        suffix = last.get(name, 1) + 1
        while taken(f"{name}#{suffix}") or f"{name}#{suffix}" in seen:
            suffix += 1
        last[name] = suffix
        renamed[number] = f"{name}#{suffix}"
        seen.add(renamed[number])
    return renamed
