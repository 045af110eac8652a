"""Layer norm, token shift and the mixes of each row with the one before it."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvmpi.ops import check, library
from rwkvmpi.ops.registry import operator

LAYER_NORM_EPS = 1e-5

_layer_norm = library.bind("layer_norm", "ppppillfi")
_norm_shift = library.bind("norm_shift", "p" * 8 + "lllfi")
_norm_shift_mix = library.bind("norm_shift_mix", "p" * 7 + "ip" + "llllfi")
_mix = library.bind("mix", "ppppipilll" + "i")


def _is_bf16(x: Tensor | None) -> int:
    return int(x is not None and x.dtype == torch.bfloat16)


def _norm_arguments(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> list[int]:
    shape = check.dimensions(op, "x", x, 2)
    check.tensor(op, "x", x, shape)
    check.tensor(op, "weight", weight, shape[1:])
    check.tensor(op, "bias", bias, shape[1:])
    return shape


def _layer_norm_outputs(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    _norm_arguments("layer_norm", x, weight, bias)
    check.out_dtype("layer_norm", out_dtype)
    return torch.empty_like(x, dtype=out_dtype)


@operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType out_dtype) -> Tensor", _layer_norm_outputs
)
def _run_layer_norm(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> None:
    _layer_norm(x, weight, bias, out, _is_bf16(out), *x.shape, eps, torch.get_num_threads())


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = LAYER_NORM_EPS, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Each row of x, float32 [T, C], to mean 0 and variance 1, times weight [C] plus bias [C]; [T, C] in out_dtype."""
    return _run_layer_norm(x, weight, bias, eps, out_dtype)


def _norm_shift_outputs(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, rows: Tensor, op: str = "norm_shift"
) -> tuple[Tensor, ...]:
    shape = _norm_arguments(op, x, weight, bias)
    check.tensor(op, "shift", shift, [check.rows_tensor(op, rows), shape[1]])
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(shift)


@operator(
    "norm_shift(Tensor x, Tensor weight, Tensor bias, Tensor shift, Tensor rows) -> (Tensor, Tensor, Tensor)",
    _norm_shift_outputs,
)
def _run_norm_shift(
    out: tuple[Tensor, Tensor, Tensor], x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, rows: Tensor
) -> None:
    check.rows_values("norm_shift", rows, x.shape[0])
    _norm_shift(x, weight, bias, shift, rows, *out, *x.shape, rows.shape[0], LAYER_NORM_EPS, torch.get_num_threads())


def norm_shift(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u = layer_norm(x) [T, C] and d = (u of the row before) - u [T, C]; shift' [D, C], every segment's last u.

    x: float32 [T, C]; shift [D, C]: the row before each segment's first; rows: int32 [D, 2]. Outside all segments
    d is 0.
    """
    return _run_norm_shift(x, weight, bias, shift, rows)


def _mix_outputs(u: Tensor, d: Tensor, mixes: Tensor, delta: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    shape = check.dimensions("mix", "u", u, 2)
    count = check.dimensions("mix", "mixes", mixes, 2)[0]
    check.tensor("mix", "u", u, shape)
    check.tensor("mix", "d", d, shape)
    check.tensor("mix", "mixes", mixes, [count, shape[1]])
    if delta is not None:
        check.tensor("mix", "delta", delta, [count, *shape], check.FLOATS)
    check.out_dtype("mix", out_dtype)
    return u.new_empty([count, *shape], dtype=out_dtype)


@operator("mix(Tensor u, Tensor d, Tensor mixes, Tensor? delta, ScalarType out_dtype) -> Tensor", _mix_outputs)
def _run_mix(out: Tensor, u: Tensor, d: Tensor, mixes: Tensor, delta: Tensor | None, out_dtype: torch.dtype) -> None:
    _mix(u, d, mixes, delta, _is_bf16(delta), out, _is_bf16(out), *out.shape, torch.get_num_threads())


def mix(
    u: Tensor, d: Tensor, mixes: Tensor, delta: Tensor | None = None, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """out[m] = u + d * (mixes[m] + delta[m]): [M, T, C] in out_dtype.

    u, d: float32 [T, C]; mixes: float32 [M, C]; delta: float32 or bfloat16 [M, T, C].
    """
    return _run_mix(u, d, mixes, delta, out_dtype)


def _norm_shift_mix_outputs(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, mixes: Tensor, rows: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    op = "norm_shift_mix"
    shape = _norm_arguments(op, x, weight, bias)
    check.tensor(op, "shift", shift, [check.rows_tensor(op, rows), shape[1]])
    count = check.dimensions(op, "mixes", mixes, 2)[0]
    check.tensor(op, "mixes", mixes, [count, shape[1]])
    check.out_dtype(op, out_dtype)
    return x.new_empty([count, *shape], dtype=out_dtype), torch.empty_like(shift)


@operator(
    "norm_shift_mix(Tensor x, Tensor weight, Tensor bias, Tensor shift, Tensor mixes, Tensor rows,"
    " ScalarType out_dtype) -> (Tensor, Tensor)",
    _norm_shift_mix_outputs,
)
def _run_norm_shift_mix(
    out: tuple[Tensor, Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    mixes: Tensor,
    rows: Tensor,
    out_dtype: torch.dtype,
) -> None:
    check.rows_values("norm_shift_mix", rows, x.shape[0])
    mixed, after = out
    _norm_shift_mix(
        *(x, weight, bias, shift, mixes, rows, mixed, _is_bf16(mixed), after),
        *(*mixed.shape, rows.shape[0], LAYER_NORM_EPS, torch.get_num_threads()),
    )


def norm_shift_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    mixes: Tensor,
    rows: Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """`norm_shift` and `mix` in one pass, with the same bits: out [M, T, C] in out_dtype, and shift' [D, C]."""
    return _run_norm_shift_mix(x, weight, bias, shift, mixes, rows, out_dtype)
