"""Elementwise operators and small reductions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rwkvmpi.ops import check, library
from rwkvmpi.ops.registry import operator

_sigmoid_mul = library.bind("sigmoid_mul", "pipipili")
_all_finite = library.bind("all_finite", "pili", int)
_fold_rows = library.bind("fold_rows", "pplll")


def _unary(name: str) -> Callable[[Tensor], Tensor]:
    function = library.bind(name, "ppili")

    def outputs(x: Tensor) -> Tensor:
        check.tensor(name, "x", x, x.shape, check.FLOATS)
        return torch.empty_like(x)

    @operator(f"{name}(Tensor x) -> Tensor", outputs)
    def run(out: Tensor, x: Tensor) -> None:
        function(x, out, x.dtype == torch.bfloat16, x.numel(), torch.get_num_threads())

    return run


_tanh, _sigmoid, _relu_squared = _unary("tanh"), _unary("sigmoid"), _unary("relu_squared")


def tanh(x: Tensor) -> Tensor:
    """tanh of x, float32 or bfloat16 of any shape; computed in float32, returned in x's dtype."""
    return _tanh(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x), as `tanh`."""
    return _sigmoid(x)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, as `tanh`."""
    return _relu_squared(x)


def _sigmoid_mul_outputs(r: Tensor, x: Tensor, out_dtype: torch.dtype) -> Tensor:
    check.tensor("sigmoid_mul", "r", r, r.shape, check.FLOATS)
    check.tensor("sigmoid_mul", "x", x, r.shape, check.FLOATS)
    check.out_dtype("sigmoid_mul", out_dtype)
    return torch.empty_like(r, dtype=out_dtype)


@operator("sigmoid_mul(Tensor r, Tensor x, ScalarType out_dtype) -> Tensor", _sigmoid_mul_outputs)
def _run_sigmoid_mul(out: Tensor, r: Tensor, x: Tensor, out_dtype: torch.dtype) -> None:
    bf16 = torch.bfloat16
    _sigmoid_mul(r, r.dtype == bf16, x, x.dtype == bf16, out, out_dtype == bf16, r.numel(), torch.get_num_threads())


def sigmoid_mul(r: Tensor, x: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """sigmoid(r) * x in out_dtype; r and x float32 or bfloat16, of one shape."""
    return _run_sigmoid_mul(r, x, out_dtype)


def all_finite(x: Tensor) -> bool:
    """Whether x (float32 or bfloat16 on the CPU, contiguous, any shape) holds neither NaN nor Inf."""
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
