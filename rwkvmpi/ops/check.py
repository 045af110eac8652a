"""Checks of the operators' arguments: one sentence that names the operator, the argument and what it should be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rwkvmpi.ops.cuda import library as cuda

FLOAT32 = (torch.float32,)
FLOATS = (torch.float32, torch.bfloat16)


def tensor(op: str, name: str, x: torch.Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype] = FLOAT32) -> None:
    """x must have one of the dtypes (else TypeError), the shape, and lie contiguously in memory (else ValueError)."""
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {wanted}, but it is {str(x.dtype).removeprefix('torch.')}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, but it has {list(x.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, but its strides are {list(x.stride())}")


def computed(x: torch.Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes of an operator's matrices beside x: float32 on a CPU, on a GPU that of x, if it is known."""
    if not cuda.takes(x):
        return FLOAT32
    return (x.dtype,) if x.dtype in cuda.DTYPES else tuple(cuda.DTYPES)


def dimensions(op: str, name: str, x: torch.Tensor, count: int) -> list[int]:
    """The shape of x, which must have `count` dimensions (else ValueError)."""
    if x.dim() != count:
        raise ValueError(f"{op}: {name} must have {count} dimensions, but it has shape {list(x.shape)}")
    return list(x.shape)


def heads(op: str, channels: int, count: int) -> int:
    """The head size; ValueError if the channels do not divide."""
    if count < 1 or channels % count:
        raise ValueError(f"{op}: {channels} channels do not divide into {count} heads")
    return channels // count


def out_dtype(op: str, dtype: torch.dtype, x: torch.Tensor, same: bool = False) -> None:
    """Outputs are float32 or bfloat16, on a GPU float16 too; if `same`, there only what x is (else TypeError)."""
    allowed = FLOATS if not cuda.takes(x) else (x.dtype,) if same else tuple(cuda.DTYPES)
    if dtype not in allowed:
        names = " or ".join(str(one).removeprefix("torch.") for one in allowed)
        raise TypeError(f"{op}: out_dtype must be {names}, but it is {str(dtype).removeprefix('torch.')}")


def rows_tensor(op: str, rows: torch.Tensor) -> int:
    """The number of segments of `rows`, which must be int32 [D, 2]."""
    count = dimensions(op, "rows", rows, 2)[0]
    tensor(op, "rows", rows, [count, 2], (torch.int32,))
    return count


def rows_values(op: str, rows: torch.Tensor, total: int) -> None:
    """Segments must be ascending, disjoint, not empty, and lie within the chunk's rows (else ValueError)."""
    end = 0
    for segment, (first, count) in enumerate(rows.tolist()):
        if count < 1 or first < end or first + count > total:
            raise ValueError(
                f"{op}: rows[{segment}] = (first {first}, count {count}) must have count >= 1, begin at row {end} or "
                f"later and end within the {total} rows"
            )
        end = first + count
