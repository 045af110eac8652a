"""Layer norm, token shift and the embedding for CUDA tensors; what they compute: `rwkvmpi.ops.norms`."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvmpi.ops.cuda import library
from rwkvmpi.ops.norms import LAYER_NORM_EPS

_layer_norm = library.bind("layer_norm", "ppppllfi")
_shift_mix = library.bind("shift_mix", "ppppppppp" + "lllll" + "fi")
_embed = library.bind("embed", "pipippplllf")


def layer_norm_into(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float = LAYER_NORM_EPS, _: torch.dtype | None = None
) -> None:
    """`layer_norm` of x, float32 [T, C], into `out` [T, C], float32, bfloat16 or float16."""
    _layer_norm(x, weight, bias, out, *x.shape, eps, library.DTYPES[out.dtype])


def shift_mix_into(
    mixed: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    mixes: Tensor,
    rows: Tensor,
    _: torch.dtype | None = None,
) -> None:
    """`shift_mix` into `mixed` [M, T, C], float32, bfloat16 or float16."""
    shift_pair_into((None, None, mixed), x, weight, bias, shift, mixes, rows)


def shift_pair_into(
    out: tuple[Tensor | None, Tensor | None, Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    mixes: Tensor,
    rows: Tensor,
    _: torch.dtype | None = None,
) -> None:
    """`shift_pair` into (u, d, mixed). `rows` is read on the GPU: segments that are empty or out of place are none."""
    u, d, mixed = out
    _shift_mix(
        *(x, weight, bias, shift, mixes, rows, mixed, u, d),
        *(shift.stride(0), mixes.shape[0], *x.shape, rows.shape[0], LAYER_NORM_EPS, library.DTYPES[mixed.dtype]),
    )


def embed_into(x: Tensor, tokens: Tensor, table: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """`embed` into x, float32 [T, C]; a token outside the vocabulary gives zeros."""
    _embed(
        *(tokens, tokens.dtype == torch.int64, table, library.DTYPES[table.dtype], weight, bias, x),
        *(tokens.shape[0], *table.shape, LAYER_NORM_EPS),
    )
