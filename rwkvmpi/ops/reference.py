"""Every operator once more, plainly, in float64 and token by token: what the compiled ones are tested against.

Same arguments, shapes and meaning as in `rwkvmpi.ops`, any floating dtype in, float64 out, so no out_dtype.
"""

from __future__ import annotations

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


def norm_shift(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, the row before minus u (0 outside segments), and every segment's last u."""
    u = layer_norm(x, weight, bias)
    d, after = torch.zeros_like(u), torch.zeros_like(shift, dtype=torch.float64)
    for segment, (begin, end) in enumerate(_segments(rows, x.shape[0])):
        before = torch.cat([shift[segment].double().unsqueeze(0), u[begin : end - 1]])
        d[begin:end] = before - u[begin:end]
        after[segment] = u[end - 1]
    return u, d, after


def mix(u: Tensor, d: Tensor, mixes: Tensor, delta: Tensor | None = None) -> Tensor:
    """u + d * (mixes[m] + delta[m])."""
    share = mixes.double().unsqueeze(1)
    return u.double() + d.double() * (share if delta is None else share + delta.double())


def norm_shift_mix(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, mixes: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """norm_shift, then mix."""
    u, d, after = norm_shift(x, weight, bias, shift, rows)
    return mix(u, d, mixes), after


def tanh(x: Tensor) -> Tensor:
    """tanh."""
    return torch.tanh(x.double())


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return torch.sigmoid(x.double())


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return torch.relu(x.double()).square()


def sigmoid_mul(r: Tensor, x: Tensor) -> Tensor:
    """sigmoid(r) * x."""
    return sigmoid(r) * x.double()


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x.double().unflatten(-1, (heads, x.shape[-1] // heads))


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
    """w, k', v', -kk, kk*a."""
    k, v = k.double(), v.double()
    w = torch.exp(-0.6065306597126334 * sigmoid(w0.double() + w_lin.double()))
    a = sigmoid(a0.double() + a_lin.double())
    kk = _per_head(k * k_k.double(), heads)
    kk = (kk / kk.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)).flatten(1)
    if v_first is not None and v_lin is not None and v0 is not None:
        v = v + (v_first.double() - v) * sigmoid(v0.double() + v_lin.double())
    return w, k * (1 + (a - 1) * k_a.double()), v, -kk, kk * a


def _group_norm(y: Tensor, weight: Tensor, bias: Tensor, heads: int, eps: float) -> Tensor:
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    return layer_norm(_per_head(y, heads), one, zero, eps).flatten(1) * weight.double() + bias.double()


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
) -> Tensor:
    """(groupnorm(y) + (sum over head of r k r_k) v) * g."""
    heads = r_k.shape[0]
    bonus = (_per_head(r, heads) * _per_head(k, heads) * r_k.double()).sum(-1, keepdim=True)
    normal = _group_norm(y, weight, bias, heads, eps)
    return (normal + (bonus * _per_head(v, heads)).flatten(1)) * g.double()


def group_norm_gate(
    y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, heads: int, eps: float = GROUP_NORM_EPS
) -> Tensor:
    """groupnorm(y) * gate * sigmoid(gate)."""
    normal = _group_norm(y, weight, bias, heads, eps)
    return normal if gate is None else normal * gate.double() * sigmoid(gate)


def v6_decay(w_lin: Tensor, time_decay: Tensor) -> Tensor:
    """exp(-exp(time_decay + w_lin))."""
    return torch.exp(-torch.exp(time_decay.double() + w_lin.double()))


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
