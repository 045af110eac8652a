"""The head for CUDA tensors: log-probabilities from slices of the vocabulary; see `rwkvmpi.ops.head`."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvmpi.ops.cuda import library
from rwkvmpi.ops.cuda.product import KINDS, MOST_THIN_ROWS, matrix, multiply_into, product_into
from rwkvmpi.ops.product import Packed

SLICE = 8192  # ids, a piece of cuda/head.cu: how wide a slice is changes no bit of the softmax
ROWS = 4096  # of x at a time: 128 MB of float32 logits

_head_begin = library.bind("head_begin", "pl")
_head_slice = library.bind("head_slice", "pppllll" + "i")
_head_end = library.bind("head_end", "pppl")


def head_logprobs_into(out: Tensor, x: Tensor, data: Tensor, kind: str, outputs: int, targets: Tensor) -> None:
    """ln softmax(x weight^T)[targets] per row into `out`, float32 [T]: 0 where the target is -1.

    x: [T, C] in the weight's dtype; data: the packed weight [outputs, C]; targets: int64 [T]. Where a target is neither
    -1 nor below `outputs`, or a logit is NaN, the result is NaN: nothing here waits for the GPU. The logits are float32
    (torch before 2.8: rounded to x's dtype for more than 16 rows).
    """
    weight = Packed(kind, outputs, x.shape[1], data)
    running = torch.empty(min(x.shape[0], ROWS), 4, device=x.device)
    for first in range(0, x.shape[0], ROWS):
        piece, wanted, result = (tensor[first : first + ROWS] for tensor in (x, targets, out))
        count = piece.shape[0]
        _head_begin(running, count)
        if count <= MOST_THIN_ROWS:
            _fold_thin(running, piece, weight, wanted)
        else:
            _fold(running, piece, matrix(weight), wanted)
        _head_end(running, wanted, result, count)


def _fold_thin(running: Tensor, x: Tensor, weight: Packed, targets: Tensor) -> None:
    """All logits of a few rows at once."""
    logits = torch.empty(x.shape[0], weight.outputs, device=x.device)
    product_into(logits, x, weight)
    _head_slice(logits, targets, running, *logits.shape, 0, weight.outputs, library.DTYPES[logits.dtype])


def _fold(running: Tensor, x: Tensor, weight: Tensor, targets: Tensor) -> None:
    rows, outputs = x.shape[0], weight.shape[0]
    buffer = torch.empty(rows * min(SLICE, outputs), device=x.device)
    for first in range(0, outputs, SLICE):
        part = weight[first : first + SLICE]
        logits = buffer[: rows * part.shape[0]].view(rows, part.shape[0])
        multiply_into(logits, x, part)
        _head_slice(logits, targets, running, *logits.shape, first, part.shape[0], library.DTYPES[logits.dtype])


def logits_into(out: Tensor, x: Tensor, data: Tensor, kind: str) -> None:
    """All logits of x, [T, V] float32."""
    product_into(out, x, Packed(kind, out.shape[1], x.shape[1], data))


assert set(KINDS.values()) == set(library.DTYPES)
