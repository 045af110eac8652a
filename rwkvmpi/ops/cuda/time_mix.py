"""The time mixes on a GPU: arguments as in `rwkvmpi.ops.time_mix`, the [T, C] tensors all of one dtype.

Where every row is a segment of its own, one token for each of many states, the step's kernels run: they read and write
each state once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvmpi.ops.cuda.library import DTYPES, bind, bind_number

AUTOMATIC, SEQUENTIAL, TILES, TILES_IN_TWO = range(4)  # bodies of the RWKV-7 time mix
GROUP_NORM_EPS = 64e-5

_v7_time_mix = bind("v7_time_mix", "p" * 21 + "lllll" + "fii")
_v7_step = bind("v7_step", "p" * 19 + "lll" + "fii")
_v7_scratch = bind_number("v7_time_mix_scratch", "lllli")
_v6_time_mix = bind("v6_time_mix", "p" * 12 + "llll" + "fi")
_v6_step = bind("v6_step", "p" * 11 + "lll" + "fii")
_v4_time_mix = bind("v4_time_mix", "p" * 8 + "llli")


def v7_time_mix(
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
    body: int = AUTOMATIC,
) -> None:
    """See `rwkvmpi.ops.v7_time_mix`. TILES and TILES_IN_TWO give the same bits, SEQUENTIAL others."""
    h, v_out = out
    v_out = v_out if v_first is None else None
    inputs = (r, k, v, w_lin, a_lin, v_lin, g, v_first, w0, a0, v0, k_k, k_a, r_k, ln_weight, ln_bias, state)
    dtype, tokens, (heads, size) = DTYPES[r.dtype], r.shape[0], r_k.shape
    if _steps(r, rows) and body == AUTOMATIC:
        _v7_step(*inputs, h, v_out, tokens, heads, size, eps, DTYPES[state.dtype], dtype)
        return
    nbytes = _v7_scratch(tokens, heads, size, rows.shape[0], dtype) if body in (AUTOMATIC, TILES_IN_TWO) else 0
    scratch = torch.empty(nbytes, dtype=torch.uint8, device=r.device) if nbytes > 0 else None
    sizes = (tokens, heads, size, rows.shape[0], nbytes if scratch is not None else 0)
    _v7_time_mix(*inputs, rows, h, v_out, scratch, *sizes, eps, body, dtype)


def v6_time_mix(
    h: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_lin: Tensor | None,
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
    """See `rwkvmpi.ops.v6_time_mix`; without w_lin, time_decay is the decay itself, of every token."""
    inputs, dtype = (r, k, v, w_lin, time_decay, u, g, ln_weight, ln_bias, state), DTYPES[r.dtype]
    if _steps(r, rows):
        _v6_step(*inputs, h, r.shape[0], *u.shape, eps, DTYPES[state.dtype], dtype)
    else:
        _v6_time_mix(*inputs, rows, h, r.shape[0], *u.shape, rows.shape[0], eps, dtype)


def v5_time_mix(
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
    """See `rwkvmpi.ops.v5_time_mix`."""
    v6_time_mix(h, r, k, v, None, w, u, g, ln_weight, ln_bias, state, rows, eps)


def v4_time_mix(
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
    """See `rwkvmpi.ops.v4_time_mix`."""
    _v4_time_mix(r_lin, k, v, w, u, state, rows, h, *r_lin.shape, rows.shape[0], DTYPES[r_lin.dtype])


def _steps(r: Tensor, rows: Tensor) -> bool:
    """As many segments as rows: each is one token. (A chunk's segments hold 32 rows at least, but for its last.)"""
    return rows.shape[0] == r.shape[0]
