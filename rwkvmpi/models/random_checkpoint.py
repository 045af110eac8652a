"""A model with random weights that is never written to a file: for measuring how fast a shape runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rwkvmpi.models.random_weights import draw_tensor
from rwkvmpi.models.schema import ModelShape, Shape, all_tensors

if TYPE_CHECKING:
    from rwkvmpi.models.checkpoint import Checkpoint


class RandomCheckpoint:
    """What `Stage` and `Model` need of a `Checkpoint`: every tensor is drawn, on `device`, when it is asked for."""

    ln0_fused = False

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.shape = shape
        self.path = Path(f"random RWKV-{shape.version}")
        self._expected = all_tensors(shape)
        self._dtype, self._device, self._seed = dtype, device, seed

    def names(self) -> list[str]:
        """All canonical names."""
        return list(self._expected)

    def tensor_shape(self, name: str) -> Shape:
        """The canonical shape of a tensor."""
        return self._expected[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of this canonical name."""
        return draw_tensor(self.shape, name, self._seed, self._dtype, self._device)

    def let_go(self, names: Iterable[str]) -> None:
        """Nothing is kept."""


def random_checkpoint(shape: ModelShape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Checkpoint:
    """A `RandomCheckpoint`, for whoever takes a `Checkpoint`."""
    made: object = RandomCheckpoint(shape, dtype, device, seed)
    return made  # type: ignore[return-value]
