"""The shared queue: which document is read next, by whoever asks. Documents that were begun come first."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

BATCH_BYTES = 64 << 10  # small documents are handed out together: asking for each would cost more than reading it
BATCH_DOCUMENTS = 32


class DocumentQueue:
    """Documents in queue order.

    `order` int64 [documents]; `nbytes` int64 [documents]; `done` document numbers that are finished; `begun`
    documents that an earlier job left in flight; `takers` how many replicas ask.
    """

    def __init__(
        self, order: np.ndarray, nbytes: np.ndarray, done: np.ndarray, begun: Iterable[int], takers: int = 1
    ) -> None:
        first = np.array(list(begun), dtype=np.int64)
        out = np.zeros(len(nbytes), dtype=bool)
        out[np.asarray(done, dtype=np.int64)] = True
        out[first] = True
        self._order = np.concatenate([first, order[~out[order]]])
        self._nbytes = nbytes
        self._next = 0
        self._left = int(nbytes[self._order].sum())
        self._shares = 1 if takers == 1 else 4 * takers

    def take(self) -> list[int]:
        """The next document, or several small ones; an empty list when there are no more.

        Towards the end the portions shrink, so that no replica is left with work that another could do.
        """
        taken: list[int] = []
        total = 0
        most = min(BATCH_BYTES, self._left // self._shares)
        while self._next < len(self._order) and len(taken) < BATCH_DOCUMENTS:
            doc = int(self._order[self._next])
            size = int(self._nbytes[doc])
            if taken and total + size > most:
                break
            taken.append(doc)
            total += size
            self._next += 1
        self._left -= total
        return taken

    @property
    def exhausted(self) -> bool:
        return self._next >= len(self._order)
