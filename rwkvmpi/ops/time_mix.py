"""The time mixes between their matrix products, each in one pass, with the state updated in place.

On a GPU the [T, C] inputs and outputs have one dtype: float32, bfloat16 or float16.

Each `..._into(outputs, *arguments)` fills given outputs without checks, for the layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkvmpi.ops import check, library
from rwkvmpi.ops.registry import operator
from rwkvmpi.ops.wkv import MAX_HEAD_SIZE, segment_count

GROUP_NORM_EPS = 64e-5

_v7_time_mix = library.bind("v7_time_mix", "p" * 19 + "ip" + "llllfi")
_v6_time_mix = library.bind("v6_time_mix", "p" * 12 + "i" + "llllfi")
_v4_time_mix = library.bind("v4_time_mix", "p" * 8 + "i" + "llli")


def _check_heads(op: str, r: Tensor, bonus: Tensor, state: Tensor, rows: Tensor) -> tuple[list[int], list[int]]:
    """r [T, C], a tensor [H, N] and the state [D, H, N, N] belong together; ([T, C], [H, N])."""
    shape = check.dimensions(op, "r", r, 2)
    heads = check.dimensions(op, "r_k" if op == "v7_time_mix" else "u", bonus, 2)[0]
    size = check.heads(op, shape[1], heads)
    if not 1 <= size <= MAX_HEAD_SIZE:
        raise ValueError(f"{op}: the head size must be 1 to {MAX_HEAD_SIZE}, but it is {size}")
    check.tensor(op, "state", state, [segment_count(op, rows, shape[0]), heads, size, size])
    return shape, [heads, size]


def _check_all(
    op: str, shape: list[int], dtypes: Sequence[torch.dtype] = check.FLOAT32, **tensors: Tensor | None
) -> None:
    for name, x in tensors.items():
        if x is not None:
            check.tensor(op, name, x, shape, dtypes)


def _v7_outputs(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_lin: Tensor,
    a_lin: Tensor,
    v_lin: Tensor | None,
    g: Tensor,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: Tensor,
    rows: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    op = "v7_time_mix"
    shape, head_shape = _check_heads(op, r, r_k, state, rows)
    if v_first is not None and (v_lin is None or v0 is None):
        raise ValueError(f"{op}: v_first needs v_lin and v0")
    matrices = {"r": r, "k": k, "v": v, "w_lin": w_lin, "a_lin": a_lin, "v_lin": v_lin, "g": g, "v_first": v_first}
    _check_all(op, shape, check.computed(r), **matrices)
    _check_all(op, shape[1:], w0=w0, a0=a0, v0=v0, k_k=k_k, k_a=k_a, ln_weight=ln_weight, ln_bias=ln_bias)
    _check_all(op, head_shape, r_k=r_k)
    check.out_dtype(op, out_dtype, r, same=True)
    return torch.empty_like(r, dtype=out_dtype), r.new_empty(shape if v_first is None else [0])


@operator(
    "v7_time_mix(Tensor r, Tensor k, Tensor v, Tensor w_lin, Tensor a_lin, Tensor? v_lin, Tensor g, Tensor? v_first,"
    " Tensor w0, Tensor a0, Tensor? v0, Tensor k_k, Tensor k_a, Tensor r_k, Tensor ln_weight, Tensor ln_bias,"
    " Tensor(a!) state, Tensor rows, float eps, ScalarType out_dtype) -> (Tensor, Tensor)",
    _v7_outputs,
    cuda="time_mix:v7_time_mix",
)
def _run_v7(
    out: tuple[Tensor, Tensor | None],
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_lin: Tensor,
    a_lin: Tensor,
    v_lin: Tensor | None,
    g: Tensor,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: Tensor,
    rows: Tensor,
    eps: float = GROUP_NORM_EPS,
    _: torch.dtype | None = None,
) -> None:
    h, v_out = out
    _v7_time_mix(
        *(r, k, v, w_lin, a_lin, v_lin, g, v_first, w0, a0, v0, k_k, k_a, r_k, ln_weight, ln_bias, state, rows),
        *(h, h.dtype == torch.bfloat16, v_out, r.shape[0], *r_k.shape, rows.shape[0], eps, torch.get_num_threads()),
    )


def v7_time_mix(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_lin: Tensor,
    a_lin: Tensor,
    v_lin: Tensor | None,
    g: Tensor,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: Tensor,
    rows: Tensor,
    eps: float = GROUP_NORM_EPS,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-7's time mix: (h [T, C] in out_dtype, v_out); advances the state, float32 [D, H, N, N], in place.

    w = exp(-e^(-1/2) * sigmoid(w0 + w_lin)); a = sigmoid(a0 + a_lin); kk = k*k_k scaled to length 1 per head;
    k' = k*(1 + (a-1)*k_a); v' = v + (v_first - v)*sigmoid(v0 + v_lin), or v in the first layer, where v_first is None
    and v_out = v, float32 [T, C], is the later layers' v_first (v_out is None for them); y = `wkv7`(r, w, k', v', -kk,
    kk*a); h = (groupnorm(y)*ln_weight + ln_bias + (sum over head of r*k'*r_k) * v') * g.
    r, k, v, w_lin, a_lin, v_lin, g: float32 [T, C]; w0, a0, v0, k_k, k_a, ln_weight, ln_bias: float32 [C]; r_k: float32
    [H, N], N up to 512; rows: int32 [D, 2], first row and number of rows of each segment; outputs are 0 in the others.
    Raises TypeError or ValueError for wrong arguments.
    """
    h, v_out = _run_v7(
        *(r, k, v, w_lin, a_lin, v_lin, g, v_first, w0, a0, v0, k_k, k_a, r_k, ln_weight, ln_bias, state, rows),
        *(eps, out_dtype),
    )
    return h, v_out if v_first is None else None


v7_time_mix_into = _run_v7.into


def _v6_outputs(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_lin: Tensor,
    time_decay: Tensor,
    u: Tensor,
    g: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: Tensor,
    rows: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    op = "v6_time_mix"
    shape, head_shape = _check_heads(op, r, u, state, rows)
    _check_all(op, shape, check.computed(r), r=r, k=k, v=v, w_lin=w_lin, g=g)
    _check_all(op, shape[1:], time_decay=time_decay, ln_weight=ln_weight, ln_bias=ln_bias)
    _check_all(op, head_shape, u=u)
    check.out_dtype(op, out_dtype, r, same=True)
    return torch.empty_like(r, dtype=out_dtype)


@operator(
    "v6_time_mix(Tensor r, Tensor k, Tensor v, Tensor w_lin, Tensor time_decay, Tensor u, Tensor? g, Tensor ln_weight,"
    " Tensor ln_bias, Tensor(a!) state, Tensor rows, float eps, ScalarType out_dtype) -> Tensor",
    _v6_outputs,
    cuda="time_mix:v6_time_mix",
)
def _run_v6(
    h: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_lin: Tensor,
    time_decay: Tensor,
    u: Tensor,
    g: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: Tensor,
    rows: Tensor,
    eps: float = GROUP_NORM_EPS,
    _: torch.dtype | None = None,
) -> None:
    _v6_time_mix(
        *(r, k, v, w_lin, g, time_decay, u, ln_weight, ln_bias, state, rows, h, h.dtype == torch.bfloat16),
        *(r.shape[0], *u.shape, rows.shape[0], eps, torch.get_num_threads()),
    )


def v6_time_mix(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_lin: Tensor,
    time_decay: Tensor,
    u: Tensor,
    g: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: Tensor,
    rows: Tensor,
    eps: float = GROUP_NORM_EPS,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """RWKV-6's time mix: h [T, C] in out_dtype; advances the state, float32 [D, H, N, N], in place.

    w = exp(-exp(time_decay + w_lin)); y = `wkv6`(r, w, k, v, u); h = (groupnorm(y)*ln_weight + ln_bias) * silu(g),
    without the gate where g is None. r, k, v, w_lin, g: float32 [T, C]; time_decay, ln_weight, ln_bias: float32 [C];
    u: float32 [H, N]; the rest as in `v7_time_mix`.
    """
    return _run_v6(r, k, v, w_lin, time_decay, u, g, ln_weight, ln_bias, state, rows, eps, out_dtype)


v6_time_mix_into = _run_v6.into


def _v5_outputs(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    g: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: Tensor,
    rows: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    op = "v5_time_mix"
    shape, head_shape = _check_heads(op, r, u, state, rows)
    _check_all(op, shape, check.computed(r), r=r, k=k, v=v, g=g)
    _check_all(op, shape[1:], ln_weight=ln_weight, ln_bias=ln_bias)
    _check_all(op, head_shape, w=w, u=u)
    check.out_dtype(op, out_dtype, r, same=True)
    return torch.empty_like(r, dtype=out_dtype)


@operator(
    "v5_time_mix(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? g, Tensor ln_weight, Tensor ln_bias,"
    " Tensor(a!) state, Tensor rows, float eps, ScalarType out_dtype) -> Tensor",
    _v5_outputs,
    cuda="time_mix:v5_time_mix",
)
def _run_v5(
    h: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    g: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: Tensor,
    rows: Tensor,
    eps: float = GROUP_NORM_EPS,
    _: torch.dtype | None = None,
) -> None:
    _v6_time_mix(
        *(r, k, v, None, g, w, u, ln_weight, ln_bias, state, rows, h, h.dtype == torch.bfloat16),
        *(r.shape[0], *u.shape, rows.shape[0], eps, torch.get_num_threads()),
    )


def v5_time_mix(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    g: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    state: Tensor,
    rows: Tensor,
    eps: float = GROUP_NORM_EPS,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """RWKV-5's time mix: as `v6_time_mix`, with one decay w, float32 [H, N], for all tokens."""
    return _run_v5(r, k, v, w, u, g, ln_weight, ln_bias, state, rows, eps, out_dtype)


v5_time_mix_into = _run_v5.into


def _v4_outputs(
    r_lin: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    rows: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    op = "v4_time_mix"
    shape = check.dimensions(op, "r_lin", r_lin, 2)
    _check_all(op, shape, check.computed(r_lin), r_lin=r_lin, k=k, v=v)
    _check_all(op, shape[1:], w=w, u=u)
    check.tensor(op, "state", state, [segment_count(op, rows, shape[0]), 3, shape[1]])
    check.out_dtype(op, out_dtype, r_lin, same=True)
    return torch.empty_like(r_lin, dtype=out_dtype)


@operator(
    "v4_time_mix(Tensor r_lin, Tensor k, Tensor v, Tensor w, Tensor u, Tensor(a!) state, Tensor rows,"
    " ScalarType out_dtype) -> Tensor",
    _v4_outputs,
    cuda="time_mix:v4_time_mix",
)
def _run_v4(
    h: Tensor,
    r_lin: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    rows: Tensor,
    _: torch.dtype | None = None,
) -> None:
    _v4_time_mix(
        *(r_lin, k, v, w, u, state, rows, h, h.dtype == torch.bfloat16),
        *(*r_lin.shape, rows.shape[0], torch.get_num_threads()),
    )


def v4_time_mix(
    r_lin: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    rows: Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """RWKV-4's time mix: sigmoid(r_lin) * `wkv4`(k, v, w, u), [T, C] in out_dtype; the state [D, 3, C] in place.

    r_lin, k, v: float32 [T, C]; w, u: float32 [C]; rows as in `v7_time_mix`.
    """
    return _run_v4(r_lin, k, v, w, u, state, rows, out_dtype)


v4_time_mix_into = _run_v4.into
