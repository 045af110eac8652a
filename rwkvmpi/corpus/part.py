"""One part of a corpus for each task of a job array: --shard I/N keeps a contiguous range of the documents.

Every task finds out about the whole input by itself, reading alone, and cuts it in the same way: which documents a
part has depends on the input and on N, on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from rwkvmpi.corpus.index import CorpusIndex, DocumentRef, Fingerprint, build_index


class CorpusPart(Sequence[DocumentRef]):
    """Documents first..stop-1 of an index, numbered from 0; ids, places and sizes are those of the whole.

    number, parts: this is part `number` (from 1) of `parts`. It may hold no document at all.
    """

    def __init__(self, whole: CorpusIndex, number: int, parts: int) -> None:
        self.whole, self.number, self.parts = whole, number, parts
        self.first, self.stop = cut(whole.nbytes, number, parts)

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, number):  # type: ignore[no-untyped-def]
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # IndexError, and negative numbers
        return replace(self.whole[self.first + number], index=number)

    def __iter__(self) -> Iterator[DocumentRef]:
        return (self[number] for number in range(len(self)))

    @property
    def text_key(self) -> str:
        """The key or column of the text."""
        return self.whole.text_key

    def id(self, number: int) -> str:
        """The document's id, which is unique in the whole input."""
        return self.whole.id(self.first + range(len(self))[number])

    @property
    def nbytes(self) -> np.ndarray:
        """int64 [documents]: bytes of each text as far as known. A copy."""
        return self.whole.nbytes[self.first : self.stop].copy()

    @property
    def errors(self) -> dict[int, str]:
        """Document number -> why it cannot be read, for those where that was seen already."""
        found = self.whole.errors.items()
        return {number - self.first: error for number, error in found if self.first <= number < self.stop}

    def fingerprint(self) -> list[Fingerprint]:
        """That of the whole input: parts of different inputs do not belong together, wherever they differ."""
        return self.whole.fingerprint()

    def summary(self) -> str:
        """One sentence: which documents these are."""
        whole = f"the {len(self.whole):,} documents"
        if not len(self):
            return f"part {self.number:,} of {self.parts:,} holds none of {whole}, which is no mistake"
        return f"part {self.number:,} of {self.parts:,}: documents {self.first + 1:,} to {self.stop:,} of {whole}"


def cut(nbytes: np.ndarray, number: int, parts: int) -> tuple[int, int]:
    """(first, stop) of part `number` (from 1) of `parts`, for documents of `nbytes` int64 [documents].

    Each document weighs its bytes and 1, for the token that begins it. All laid end to end, it belongs to the part in
    which its middle lies: so it is in one part only, and no part's weight is further from the average than that of the
    largest document.
    """
    most = (1 << 61) // max(len(nbytes), 1)  # compressed files may say any size, and sums must not overflow
    weights = np.minimum(nbytes, most) + 1
    ends = np.cumsum(weights)
    twice_the_middle = 2 * ends - weights
    total = int(ends[-1]) if len(ends) else 0
    edges = [-(-2 * total * edge // parts) for edge in (number - 1, number)]
    first, stop = np.searchsorted(twice_the_middle, edges, side="left").tolist()
    return first, stop


def find_documents(inputs: list[str], text_key: str, id_key: str, number: int, parts: int) -> CorpusIndex | CorpusPart:
    """All documents of the inputs, or part `number` of `parts` of them. UserError as build_index."""
    whole = build_index(inputs, text_key, id_key)
    return whole if parts == 1 else CorpusPart(whole, number, parts)
