"""WKV-4 with gradients (``rwkvmpi::wkv4_training``). On the CPU in torch's own operations, a token at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rwkvmpi.ops.cuda import library as cuda
from rwkvmpi.ops.cuda import training as on_cuda

EVERY = 16  # a state is stored before every 16th token
_NO_PAST = -1e30  # the exponent of an empty state


def check_dtypes(inputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """TypeError unless all are on one device, `exact` are float32, and the inputs share a dtype it can compute in."""
    first, device = next(iter(inputs.items()))[1].dtype, next(iter(inputs.values())).device
    if device.type not in ("cpu", "cuda"):
        raise TypeError(f"{next(iter(inputs))} must be on the CPU or a GPU, but it is on {device}")
    free = cuda.takes(next(iter(inputs.values()))) and first in cuda.DTYPES
    for name, x in (*inputs.items(), *exact.items()):
        wanted = first if free and name in inputs else torch.float32
        if x.dtype != wanted:
            raise TypeError(f"{name} must be {str(wanted).removeprefix('torch.')}, but it is {x.dtype}")
        if x.device != device:
            raise TypeError(f"{name} must be on {device}, but it is on {x.device}")


def wkv4_training(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """WKV-4 over whole sequences, differentiable in every argument.

    k, v: [T, C] or [B, T, C], float32, on a GPU also bfloat16 or float16; w = -exp(time_decay) and u = time_first:
    float32 [C]; state: float32 [3, C] or [B, 3, C] as in `rwkvmpi.ops.wkv4`, empty when None. Returns y, shaped like
    k, and the state after the last token. Raises ValueError or TypeError for a wrong shape, dtype or device.
    """
    if k.dim() not in (2, 3):
        raise ValueError(f"k must be [T, C] or [B, T, C], but it has shape {tuple(k.shape)}")
    channels = k.shape[-1]
    wanted = (*k.shape[:-2], 3, channels)
    if state is None:
        state = k.new_zeros(wanted, dtype=torch.float32)
        state[..., 2, :] = _NO_PAST
    for name, x, shape in (("v", v, k.shape), ("w", w, (channels,)), ("u", u, (channels,)), ("state", state, wanted)):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but {tuple(shape)} is needed")
    check_dtypes({"k": k, "v": v}, {"w": w, "u": u, "state": state})
    if k.dim() == 2:
        y, last, _ = torch.ops.rwkvmpi.wkv4_training(k.unsqueeze(0), v.unsqueeze(0), w, u, state.unsqueeze(0))
        return y.squeeze(0), last.squeeze(0)
    y, last, _ = torch.ops.rwkvmpi.wkv4_training(k, v, w, u, state)
    return y, last


def _output(k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y of a token [B, C], its denominator, and the factors of the past and of the present in it."""
    aa, bb, pp = state.unbind(1)
    top = torch.maximum(pp, u + k)
    past, now = torch.exp(pp - top), torch.exp(u + k - top)
    denominator = past * bb + now
    return (past * aa + now * v) / denominator, denominator, past, now


def _advance(k: Tensor, v: Tensor, w: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state after a token [B, 3, C], and the factors of the past and of the present in it."""
    aa, bb, pp = state.unbind(1)
    top = torch.maximum(pp + w, k)
    past, now = torch.exp(pp + w - top), torch.exp(k - top)
    return torch.stack([past * aa + now * v, past * bb + now, top], 1), past, now


def _outputs(k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, channels = k.shape
    shapes = (batch, 3, channels), (batch, (tokens + EVERY - 1) // EVERY, 3, channels)
    last, stored = (k.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return k.new_empty(k.shape), last, stored


@torch.library.custom_op("rwkvmpi::wkv4_training", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, last, stored = outputs = _outputs(k)
    if cuda.takes(k):
        on_cuda.wkv4_forward(k, v, w, u, state, outputs, EVERY)
        return outputs
    for t in range(k.shape[1]):
        if t % EVERY == 0:
            stored[:, t // EVERY] = state
        y[:, t] = _output(k[:, t], v[:, t], u, state)[0]
        state = _advance(k[:, t], v[:, t], w, state)[0]
    last.copy_(state)
    return outputs


@_forward.register_fake
def _(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(k)


@torch.library.custom_op("rwkvmpi::wkv4_training_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, stored: Tensor, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if cuda.takes(k):
        return on_cuda.wkv4_backward(k, v, w, u, stored, dy, dlast, EVERY)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dw, du = torch.zeros_like(w), torch.zeros_like(u)
    dstate = dlast.clone()
    for mark in reversed(range(stored.shape[1])):
        states = [stored[:, mark]]
        begin, end = mark * EVERY, min((mark + 1) * EVERY, k.shape[1])
        for t in range(begin, end - 1):
            states.append(_advance(k[:, t], v[:, t], w, states[-1])[0])
        for t in reversed(range(begin, end)):
            dk[:, t], dv[:, t], dw_now, du_now, dstate = _token_backward(
                k[:, t], v[:, t], w, u, states[t - begin], dy[:, t], dstate
            )
            dw += dw_now.sum(0)
            du += du_now.sum(0)
    return dk, dv, dw, du, dstate


def _token_backward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, dy: Tensor, dafter: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of k, v, w, u and of the state before a token, from those of y and of the state after it."""
    aa, bb, pp = state.unbind(1)
    daa, dbb, dtop = dafter.unbind(1)
    _, past, now = _advance(k, v, w, state)
    by_past, by_now = past * (daa * aa + dbb * bb), now * (daa * v + dbb)  # of the exponents pp + w and k
    rest = dtop - by_past - by_now  # of the larger exponent, which all are measured by
    past_is_larger = pp + w >= k
    dw = by_past + torch.where(past_is_larger, rest, 0.0)
    dk = by_now + torch.where(past_is_larger, 0.0, rest)
    dv, daa, dbb = now * daa, past * daa, past * dbb

    y, denominator, past, now = _output(k, v, u, state)
    share = dy / denominator
    du = now * share * (v - y)
    dpp = dw + past * share * (aa - y * bb)
    return dk + du, dv + now * share, dw, du, torch.stack([daa + past * share, dbb - past * share * y, dpp], 1)


@_backward.register_fake
def _(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, stored: Tensor, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x) for x in (k, v, w, u, dlast))  # type: ignore[return-value]


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[2])


def _differentiate(ctx: Any, dy: Tensor, dlast: Tensor, _dstored: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.rwkvmpi.wkv4_training_backward(*ctx.saved_tensors, dy, dlast)


_forward.register_autograd(_differentiate, setup_context=_remember)
