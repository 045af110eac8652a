"""A check and a sum over whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvmpi.ops import check, library
from rwkvmpi.ops.cuda.library import DTYPES, takes
from rwkvmpi.ops.registry import operator

_all_finite = library.bind("all_finite", "pili", int)
_fold_rows = library.bind("fold_rows", "pplll")


def all_finite(x: Tensor) -> bool:
    """Whether x (float32 or bfloat16, on a GPU float16 too; contiguous, any shape) holds neither NaN nor Inf."""
    if takes(x):
        from rwkvmpi.ops.cuda import elementwise

        check.tensor("all_finite", "x", x, x.shape, tuple(DTYPES))
        return bool(elementwise.all_finite(x))
    check.tensor("all_finite", "x", x, x.shape, check.FLOATS)
    if x.device.type != "cpu":
        raise ValueError(f"all_finite: x must be on the CPU, but it is on {x.device}")
    return bool(_all_finite(x, x.dtype == torch.bfloat16, x.numel(), torch.get_num_threads()))


def _fold_rows_outputs(acc: Tensor, x: Tensor, first: int, count: int) -> None:
    total, channels = check.dimensions("fold_rows", "x", x, 2)
    check.tensor("fold_rows", "x", x, [total, channels])
    check.tensor("fold_rows", "acc", acc, [channels], (torch.float64,))
    if first < 0 or count < 0 or first + count > total:
        raise ValueError(f"fold_rows: rows {first} to {first + count} do not lie within the {total} rows of x")


@operator("fold_rows(Tensor(a!) acc, Tensor x, int first, int count) -> ()", _fold_rows_outputs)
def _run_fold_rows(_: None, acc: Tensor, x: Tensor, first: int, count: int) -> None:
    _fold_rows(acc, x, x.shape[1], first, count)


def fold_rows(acc: Tensor, x: Tensor, first: int, count: int) -> None:
    """acc, float64 [C], += the rows first .. first+count-1 of x, float32 [T, C], one after the other; in place.

    The order is that of the rows, so splitting the rows into several calls gives the same bits.
    """
    _run_fold_rows(acc, x, first, count)
