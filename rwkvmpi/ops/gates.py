"""What stands between the matrix products and WKV: decays, keys, gates, group norms."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvmpi.ops import check, library
from rwkvmpi.ops.registry import operator

GROUP_NORM_EPS = 64e-5

_v7_prepare = library.bind("v7_prepare", "pppppi" + "p" * 11 + "llli")
_v7_output = library.bind("v7_output", "pppppi" + "ppppi" + "lllfi")
_group_norm_gate = library.bind("group_norm_gate", "ppippp" + "i" + "lllfi")
_v6_decay = library.bind("v6_decay", "pippl" + "li")


def _bf16_mask(*tensors: Tensor | None) -> int:
    return sum((x is not None and x.dtype == torch.bfloat16) << i for i, x in enumerate(tensors))


def _v7_prepare_outputs(
    k: Tensor,
    v: Tensor,
    w_lin: Tensor,
    a_lin: Tensor,
    v_lin: Tensor | None,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    heads: int,
) -> tuple[Tensor, ...]:
    op = "v7_prepare"
    shape = check.dimensions(op, "k", k, 2)
    check.heads(op, shape[1], heads)
    for name, x in (("k", k), ("v", v), ("w_lin", w_lin), ("a_lin", a_lin)):
        check.tensor(op, name, x, shape, check.FLOATS)
    for name, x in (("w0", w0), ("a0", a0), ("k_k", k_k), ("k_a", k_a)):
        check.tensor(op, name, x, shape[1:])
    if v_first is not None:
        if v_lin is None or v0 is None:
            raise ValueError(f"{op}: v_first needs v_lin and v0")
        check.tensor(op, "v_first", v_first, shape)
        check.tensor(op, "v_lin", v_lin, shape, check.FLOATS)
        check.tensor(op, "v0", v0, shape[1:])
    return tuple(torch.empty_like(k, dtype=torch.float32) for _ in range(5))


@operator(
    "v7_prepare(Tensor k, Tensor v, Tensor w_lin, Tensor a_lin, Tensor? v_lin, Tensor? v_first, Tensor w0, Tensor a0,"
    " Tensor? v0, Tensor k_k, Tensor k_a, int heads) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _v7_prepare_outputs,
)
def _run_v7_prepare(
    out: tuple[Tensor, ...],
    k: Tensor,
    v: Tensor,
    w_lin: Tensor,
    a_lin: Tensor,
    v_lin: Tensor | None,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    heads: int,
) -> None:
    tokens, channels = k.shape
    _v7_prepare(
        *(k, v, w_lin, a_lin, v_lin, _bf16_mask(k, v, w_lin, a_lin, v_lin), v_first, w0, a0, v0, k_k, k_a),
        *(*out, tokens, heads, channels // heads, torch.get_num_threads()),
    )


def v7_prepare(
    k: Tensor,
    v: Tensor,
    w_lin: Tensor,
    a_lin: Tensor,
    v_lin: Tensor | None,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """RWKV-7's operands of WKV from the matrix products: (w, k', v', -kk, kk*a), float32 [T, C] each.

    w = exp(-e^(-1/2) * sigmoid(w0 + w_lin)); a = sigmoid(a0 + a_lin); kk = k*k_k scaled to length 1 per head;
    k' = k*(1 + (a-1)*k_a); v' = v + (v_first - v)*sigmoid(v0 + v_lin), or v where v_first is None (the first layer).
    k, v, w_lin, a_lin, v_lin: float32 or bfloat16 [T, C]; v_first: float32 [T, C]; w0, a0, v0, k_k, k_a: float32 [C].
    """
    return _run_v7_prepare(k, v, w_lin, a_lin, v_lin, v_first, w0, a0, v0, k_k, k_a, heads)


def _v7_output_outputs(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    op = "v7_output"
    shape = check.dimensions(op, "y", y, 2)
    heads = check.dimensions(op, "r_k", r_k, 2)[0]
    check.tensor(op, "r_k", r_k, [heads, check.heads(op, shape[1], heads)])
    for name, x in (("y", y), ("k", k), ("v", v)):
        check.tensor(op, name, x, shape)
    check.tensor(op, "r", r, shape, check.FLOATS)
    check.tensor(op, "g", g, shape, check.FLOATS)
    check.tensor(op, "weight", weight, shape[1:])
    check.tensor(op, "bias", bias, shape[1:])
    check.out_dtype(op, out_dtype)
    return torch.empty_like(y, dtype=out_dtype)


@operator(
    "v7_output(Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor r_k, Tensor weight, Tensor bias, float eps,"
    " ScalarType out_dtype) -> Tensor",
    _v7_output_outputs,
)
def _run_v7_output(
    out: Tensor,
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> None:
    _v7_output(
        *(y, r, k, v, g, _bf16_mask(r, g), r_k, weight, bias, out, out_dtype == torch.bfloat16),
        *(y.shape[0], *r_k.shape, eps, torch.get_num_threads()),
    )


def v7_output(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = GROUP_NORM_EPS,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """RWKV-7 behind WKV: (groupnorm(y)*weight + bias + (sum over head of r*k*r_k) * v) * g, [T, C] in out_dtype.

    y, k, v: float32 [T, C] (k and v from `v7_prepare`); r, g: float32 or bfloat16 [T, C]; r_k: float32 [H, N];
    weight, bias: float32 [C].
    """
    return _run_v7_output(y, r, k, v, g, r_k, weight, bias, eps, out_dtype)


def _group_norm_gate_outputs(
    y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, heads: int, eps: float, out_dtype: torch.dtype
) -> Tensor:
    op = "group_norm_gate"
    shape = check.dimensions(op, "y", y, 2)
    check.heads(op, shape[1], heads)
    check.tensor(op, "y", y, shape)
    if gate is not None:
        check.tensor(op, "gate", gate, shape, check.FLOATS)
    check.tensor(op, "weight", weight, shape[1:])
    check.tensor(op, "bias", bias, shape[1:])
    check.out_dtype(op, out_dtype)
    return torch.empty_like(y, dtype=out_dtype)


@operator(
    "group_norm_gate(Tensor y, Tensor? gate, Tensor weight, Tensor bias, int heads, float eps, ScalarType out_dtype)"
    " -> Tensor",
    _group_norm_gate_outputs,
)
def _run_group_norm_gate(
    out: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    heads: int,
    eps: float,
    out_dtype: torch.dtype,
) -> None:
    tokens, channels = y.shape
    _group_norm_gate(
        *(y, gate, _bf16_mask(gate), weight, bias, out, out_dtype == torch.bfloat16),
        *(tokens, heads, channels // heads, eps, torch.get_num_threads()),
    )


def group_norm_gate(
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    heads: int,
    eps: float = GROUP_NORM_EPS,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(groupnorm(y)*weight + bias) * silu(gate), or without the gate where it is None; [T, C] in out_dtype.

    y: float32 [T, C], normalised per head; gate: float32 or bfloat16 [T, C]; weight, bias: float32 [C].
    """
    return _run_group_norm_gate(y, gate, weight, bias, heads, eps, out_dtype)


def _v6_decay_outputs(w_lin: Tensor, time_decay: Tensor) -> Tensor:
    shape = check.dimensions("v6_decay", "w_lin", w_lin, 2)
    check.tensor("v6_decay", "w_lin", w_lin, shape, check.FLOATS)
    check.tensor("v6_decay", "time_decay", time_decay, shape[1:])
    return torch.empty_like(w_lin, dtype=torch.float32)


@operator("v6_decay(Tensor w_lin, Tensor time_decay) -> Tensor", _v6_decay_outputs)
def _run_v6_decay(out: Tensor, w_lin: Tensor, time_decay: Tensor) -> None:
    _v6_decay(w_lin, _bf16_mask(w_lin), time_decay, out, *w_lin.shape, torch.get_num_threads())


def v6_decay(w_lin: Tensor, time_decay: Tensor) -> Tensor:
    """RWKV-6's decay exp(-exp(time_decay + w_lin)), float32 [T, C]; w_lin float32 or bfloat16, time_decay [C]."""
    return _run_v6_decay(w_lin, time_decay)
