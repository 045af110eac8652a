"""Whether states are numbers, without asking the GPU for an answer now."""

from __future__ import annotations

from torch import Tensor

from rwkvmpi.ops.cuda import library

_mark_not_finite = library.bind("mark_not_finite", "ppll")


def mark_not_finite(flags: Tensor, x: Tensor) -> None:
    """flags[d], int32 [D], becomes 1 where x[d] holds NaN or Inf, and else stays what it is; x: float32 [D, ...]."""
    if tuple(flags.shape) != (x.shape[0],):
        raise ValueError(f"mark_not_finite: flags must be [{x.shape[0]}], but they are {list(flags.shape)}")
    _mark_not_finite(x, flags, x.shape[0], x.numel() // max(x.shape[0], 1))
