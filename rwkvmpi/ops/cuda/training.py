"""WKV-7 and WKV-4 with gradients on a GPU: the CUDA bodies of the operators in `rwkvmpi.ops.training`."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvmpi.ops.cuda.library import DTYPES, bind

AUTO, TOKENS, TILES = 0, 1, 2  # bodies of WKV-7: by shape and dtype, token by token, tiles of 16 tokens

_wkv7_forward = bind("wkv7_train_forward", "p" * 10 + "l" * 5 + "ii")
_wkv7_backward = bind("wkv7_train_backward", "p" * 16 + "l" * 5 + "ii")
_wkv4_forward = bind("wkv4_train_forward", "p" * 8 + "l" * 4 + "i")
_wkv4_backward = bind("wkv4_train_backward", "p" * 12 + "l" * 4 + "i")


def wkv7_forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    every: int,
    body: int = AUTO,
) -> None:
    """Fills outputs: y like r, the last state, and the state before every `every`-th token [B, H, marks, N, N].

    r, w, k, v, a, b: float32, bfloat16 or float16 [B, T, H, N]; state and stored states float32.
    """
    inputs = [x.contiguous() for x in (r, w, k, v, a, b, state)]
    _wkv7_forward(*inputs, *outputs, *r.shape, every, body, DTYPES[r.dtype])


def wkv7_backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    stored: Tensor,
    dy: Tensor,
    dlast: Tensor,
    gradients: Tensor,
    dstate: Tensor,
    every: int,
    body: int = AUTO,
) -> None:
    """Fills gradients [6, B, T, H, N], those of r, w, k, v, a, b in this order, and dstate float32 like the state."""
    inputs = [x.contiguous() for x in (r, w, k, v, a, b, stored, dy, dlast)]
    _wkv7_backward(*inputs, *gradients, dstate, *r.shape, every, body, DTYPES[r.dtype])


def wkv4_forward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, outputs: tuple[Tensor, Tensor, Tensor], every: int
) -> None:
    """Fills outputs: y like k, the last state [B, 3, C], and the state before every `every`-th token."""
    inputs = [x.contiguous() for x in (k, v, w, u, state)]
    _wkv4_forward(*inputs, *outputs, *k.shape, every, DTYPES[k.dtype])


def wkv4_backward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, stored: Tensor, dy: Tensor, dlast: Tensor, every: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of k, v, w, u and the state; those of w and u are summed over the sequences here."""
    inputs = [x.contiguous() for x in (k, v, w, u, stored, dy, dlast)]
    dk, dv, dstate = torch.empty_like(inputs[0]), torch.empty_like(inputs[1]), torch.empty_like(inputs[6])
    dw, du = (w.new_empty(k.shape[0], k.shape[2]) for _ in "wu")
    _wkv4_backward(*inputs, dk, dv, dw, du, dstate, *k.shape, every, DTYPES[k.dtype])
    return dk, dv, dw.sum(0), du.sum(0), dstate
