"""Every operator once more, plainly, in float64 and token by token: what the compiled ones are tested against.

Same arguments, shapes and meaning as in `rwkvmpi.ops`, any floating dtype in, float64 out, so no out_dtype. What those
change in place is here the last output instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5
GROUP_NORM_EPS = 64e-5


def _segments(rows: Tensor | None, total: int) -> list[tuple[int, int]]:
    pairs = [[0, total]] if rows is None else rows.tolist()
    return [(first, first + count) for first, count in pairs]


def _states(state: Tensor, rows: Tensor | None) -> Tensor:
    return (state if rows is not None else state.unsqueeze(0)).double().clone()


def _tokens(rows: Tensor | None, total: int) -> Iterator[tuple[int, int]]:
    """(segment, row) in the order of reading."""
    for segment, (begin, end) in enumerate(_segments(rows, total)):
        for t in range(begin, end):
            yield segment, t


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S <- S*diag(w) + (S a) b^T + v k^T; y = S r."""
    r, w, k, v, a, b = (x.double() for x in (r, w, k, v, a, b))
    states, y = _states(state, rows), torch.zeros_like(r)
    for d, t in _tokens(rows, r.shape[0]):
        s = states[d]
        removed = torch.einsum("hvk,hk->hv", s, a[t])
        s = s * w[t].unsqueeze(1) + torch.einsum("hv,hk->hvk", removed, b[t]) + torch.einsum("hv,hk->hvk", v[t], k[t])
        y[t] = torch.einsum("hvk,hk->hv", s, r[t])
        states[d] = s
    return y, states if rows is not None else states[0]


def wkv6(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = (S + v (u*k)^T) r; S <- S*diag(w) + v k^T."""
    r, w, k, v, u = (x.double() for x in (r, w, k, v, u))
    states, y = _states(state, rows), torch.zeros_like(r)
    for d, t in _tokens(rows, r.shape[0]):
        now = torch.einsum("hv,hk->hvk", v[t], k[t])
        y[t] = torch.einsum("hvk,hk->hv", states[d] + now * u.unsqueeze(1), r[t])
        states[d] = states[d] * w[t].unsqueeze(1) + now
    return y, states if rows is not None else states[0]


def wkv5(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """wkv6 with one decay for all tokens."""
    return wkv6(r, w.expand_as(r), k, v, u, state, rows)


def wkv4(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = (e^pp aa + e^(u+k) v) / (e^pp bb + e^(u+k)), the state (aa, bb, pp) scaled by e^-pp."""
    k, v, w, u = (x.double() for x in (k, v, w, u))
    states, y = _states(state, rows), torch.zeros_like(k)
    for d, t in _tokens(rows, k.shape[0]):
        aa, bb, pp = states[d]
        top = torch.maximum(pp, u + k[t])
        past, now = torch.exp(pp - top), torch.exp(u + k[t] - top)
        y[t] = (past * aa + now * v[t]) / (past * bb + now)
        top = torch.maximum(pp + w, k[t])
        past, now = torch.exp(pp + w - top), torch.exp(k[t] - top)
        states[d] = torch.stack([past * aa + now * v[t], past * bb + now, top])
    return y, states if rows is not None else states[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = LAYER_NORM_EPS) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def shift_pair(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, mixes: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, the row before minus u (0 outside segments), u + d * mixes[m], and every segment's last u."""
    u = layer_norm(x, weight, bias)
    d, after = torch.zeros_like(u), torch.zeros_like(shift, dtype=torch.float64)
    for segment, (begin, end) in enumerate(_segments(rows, x.shape[0])):
        before = torch.cat([shift[segment].double().unsqueeze(0), u[begin : end - 1]])
        d[begin:end] = before - u[begin:end]
        after[segment] = u[end - 1]
    return u, d, u + d * mixes.double().unsqueeze(1), after


def shift_mix(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, mixes: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The last two of shift_pair."""
    return shift_pair(x, weight, bias, shift, mixes, rows)[2:]


def embed(tokens: Tensor, table: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The table's rows, normalised where weight and bias are given."""
    x = table[tokens.long()].double()
    return x if weight is None or bias is None else layer_norm(x, weight, bias)


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x.double().unflatten(-1, (heads, x.shape[-1] // heads))


def _group_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y [T, H, N] to [T, C]."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    return layer_norm(y, one, zero, eps).flatten(1) * weight.double() + bias.double()


def _in_segments(x: Tensor, rows: Tensor) -> Tensor:
    """x with the rows outside every segment 0."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for begin, end in _segments(rows, x.shape[0]):
        out[begin:end] = x[begin:end]
    return out


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
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Decay, in-context learning rate and removal key, value residual, wkv7, group norm, bonus and gate."""
    heads, k, value = r_k.shape[0], k.double(), v.double()
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(w0.double() + w_lin.double()))
    a = torch.sigmoid(a0.double() + a_lin.double())
    kk = _per_head(k * k_k.double(), heads)
    kk = (kk / kk.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)).flatten(1)
    k = k * (1 + (a - 1) * k_a.double())
    if v_first is not None and v_lin is not None and v0 is not None:
        value = value + (v_first.double() - value) * torch.sigmoid(v0.double() + v_lin.double())
    rh, wh, kh, vh, ah, bh = (_per_head(x, heads) for x in (r, w, k, value, -kk, kk * a))
    y, after = wkv7(rh, wh, kh, vh, ah, bh, state, rows)
    bonus = (rh * kh * r_k.double()).sum(-1, keepdim=True) * vh
    h = (_group_norm(y, ln_weight, ln_bias, eps) + bonus.flatten(1)) * g.double()
    return _in_segments(h, rows), _in_segments(value, rows) if v_first is None else None, after


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
) -> tuple[Tensor, Tensor]:
    """exp(-exp(time_decay + w_lin)), wkv6, group norm, g * sigmoid(g)."""
    w = _per_head(torch.exp(-torch.exp(time_decay.double() + w_lin.double())), u.shape[0])
    return _older_time_mix(r, k, v, w, u, g, ln_weight, ln_bias, state, rows, eps)


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
) -> tuple[Tensor, Tensor]:
    """v6_time_mix with one decay for all tokens."""
    return _older_time_mix(r, k, v, w.expand(len(r), *w.shape), u, g, ln_weight, ln_bias, state, rows, eps)


def _older_time_mix(
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
) -> tuple[Tensor, Tensor]:
    rh, kh, vh = (_per_head(x, u.shape[0]) for x in (r, k, v))
    y, after = wkv6(rh, w, kh, vh, u, state, rows)
    h = _group_norm(y, ln_weight, ln_bias, eps)
    return _in_segments(h if g is None else h * g.double() * torch.sigmoid(g.double()), rows), after


def v4_time_mix(
    r_lin: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """sigmoid(r_lin) * wkv4."""
    y, after = wkv4(k, v, w, u, state, rows)
    return torch.sigmoid(r_lin.double()) * y, after


def head_logprobs(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(x weight^T) at the targets; 0 where the target is -1."""
    logprobs = torch.log_softmax(x.double() @ weight.double().T, dim=-1)
    taken = logprobs.gather(1, targets.long().clamp_min(0).unsqueeze(1)).squeeze(1)
    return torch.where(targets >= 0, taken, 0.0)


def all_finite(x: Tensor) -> bool:
    """Neither NaN nor Inf."""
    return bool(torch.isfinite(x).all())


def fold_rows(acc: Tensor, x: Tensor, first: int, count: int) -> None:
    """acc += row after row, in place."""
    for row in x[first : first + count].double():
        acc += row
