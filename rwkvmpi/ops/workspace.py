"""Memory for what lives only within a layer: taken piece by piece, given back all at once, used again."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from rwkvmpi.ops.huge_pages import ALIGNMENT, anonymous

SMALLEST_BLOCK = 2 << 20  # bytes


class Workspace:
    """A stack of buffers, by default on huge pages; `allocate(bytes)` gives uint8 memory of any device.

    A chunk's intermediate results are tens of megabytes. Allocated anew for every operator they would cost a page fault
    every 4 KiB, and on small pages the processor would look up an address for every token it reads.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor] = anonymous) -> None:
        self._allocate = allocate
        self._blocks: list[torch.Tensor] = []
        self._used = 0  # bytes of the last block
        self._wanted = 0  # bytes taken since the last reset
        self._held: list[torch.Tensor] | None = None

    def reset(self) -> None:
        """Everything taken so far may be handed out again. One block that holds all of it replaces several."""
        if len(self._blocks) > 1:
            if self._held is not None:
                self._held += self._blocks
            self._blocks = [self._allocate(self._wanted)]
        self._used = self._wanted = 0

    def hold(self) -> None:
        """From now on keep blocks that are replaced: CUDA graphs have been told where they are."""
        self._held = [] if self._held is None else self._held

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor, valid until the next `reset`."""
        nbytes = prod(shape) * dtype.itemsize
        span = -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._wanted += span
        if not self._blocks or self._used + span > self._blocks[-1].numel():
            self._blocks.append(self._allocate(max(span, SMALLEST_BLOCK)))
            self._used = 0
        piece = self._blocks[-1][self._used : self._used + nbytes]
        self._used += span
        return piece.view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(block.numel() for block in self._blocks)
