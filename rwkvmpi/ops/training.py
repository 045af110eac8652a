"""WKV-7 and WKV-4 with gradients: the operators that training goes through, on the CPU and on GPUs.

Registered with torch.library (``rwkvmpi::wkv7_training``, ``rwkvmpi::wkv4_training``), so autograd and torch.compile
know them. Scoring does not use them: the forward pass here stores states for the backward pass.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from rwkvmpi.ops import training4
from rwkvmpi.ops.cuda import library as cuda
from rwkvmpi.ops.cuda import training as on_cuda
from rwkvmpi.ops.library import bind
from rwkvmpi.ops.training4 import wkv4_training

__all__ = ["wkv4_training", "wkv7_training"]

_EVERY = training4.EVERY  # 16 states of N = 64 fit a CPU's second-level cache, and a tile of the CUDA body is 16 tokens
_GRADIENTS = 6


_run_forward = bind("wkv7_train_forward", "p" * 10 + "l" * 5 + "i", ctypes.c_int)
_run_backward = bind("wkv7_train_backward", "p" * 11 + "l" * 5 + "i", ctypes.c_int)


def wkv7_training(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """WKV-7 over whole sequences, differentiable in every argument.

    r, w, k, v, a, b: [T, H, N] or [B, T, H, N], w the decay in (0, 1); float32, on a GPU also bfloat16 or float16;
    state: float32 [H, N(value), N(key)] or [B, H, N, N], zeros when None. S <- S*diag(w) + (S a) b^T + v k^T; y = S r.
    A token with w = a = 0 starts from an empty state. Returns y, shaped like r, and the state after the last token.
    Raises ValueError or TypeError for a wrong shape, dtype or device.
    """
    inputs = (r, w, k, v, a, b)
    if r.dim() not in (3, 4):
        raise ValueError(f"r must be [T, H, N] or [B, T, H, N], but it has shape {tuple(r.shape)}")
    batched = r.dim() == 4
    heads, size = r.shape[-2:]
    wanted = (r.shape[0], heads, size, size) if batched else (heads, size, size)
    if state is None:
        state = r.new_zeros(wanted, dtype=torch.float32)
    for name, x in zip("rwkvab", inputs, strict=True):
        if x.shape != r.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but r has {tuple(r.shape)}")
    if state.shape != wanted:
        raise ValueError(f"state has shape {tuple(state.shape)}, but {wanted} is needed")
    if not 1 <= size <= 256:
        raise ValueError(f"the head size must be 1 to 256, but it is {size}")
    training4.check_dtypes(dict(zip("rwkvab", inputs, strict=True)), {"state": state})
    if not batched:
        y, last, _ = torch.ops.rwkvmpi.wkv7_training(*(x.unsqueeze(0) for x in (*inputs, state)))
        return y.squeeze(0), last.squeeze(0)
    y, last, _ = torch.ops.rwkvmpi.wkv7_training(*inputs, state)
    return y, last


@torch.library.custom_op("rwkvmpi::wkv7_training", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(r)
    if cuda.takes(r):
        on_cuda.wkv7_forward(r, w, k, v, a, b, state, outputs, _EVERY)
    else:
        inputs = [x.contiguous() for x in (r, w, k, v, a, b, state)]
        _run_forward(*inputs, *outputs, *r.shape, _EVERY, torch.get_num_threads())
    return outputs


def _outputs(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, size = r.shape
    stored = (tokens + _EVERY - 1) // _EVERY
    return (
        r.new_empty(r.shape),
        r.new_empty(batch, heads, size, size, dtype=torch.float32),
        r.new_empty(batch, heads, stored, size, size, dtype=torch.float32),
    )


@_forward.register_fake
def _(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(r)


@torch.library.custom_op("rwkvmpi::wkv7_training_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, stored: Tensor, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor]:
    gradients = r.new_empty(_GRADIENTS, *r.shape)
    dstate = dlast.new_empty(dlast.shape)
    if cuda.takes(r):
        on_cuda.wkv7_backward(r, w, k, v, a, b, stored, dy, dlast, gradients, dstate, _EVERY)
    else:
        inputs = [x.contiguous() for x in (r, w, k, v, a, b, stored, dy, dlast)]
        _run_backward(*inputs, gradients, dstate, *r.shape, _EVERY, torch.get_num_threads())
    return gradients, dstate


@_backward.register_fake
def _(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, stored: Tensor, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor]:
    return r.new_empty(_GRADIENTS, *r.shape), dlast.new_empty(dlast.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_GRADIENTS], output[2])


def _differentiate(ctx: Any, dy: Tensor, dlast: Tensor, _dstored: Tensor) -> tuple[Tensor, ...]:
    gradients, dstate = torch.ops.rwkvmpi.wkv7_training_backward(*ctx.saved_tensors, dy, dlast)
    return (*gradients.unbind(0), dstate)


_forward.register_autograd(_differentiate, setup_context=_remember)
