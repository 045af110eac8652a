"""The head: log-probabilities of given tokens without ever holding a chunk's logits over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvmpi.ops import check, library
from rwkvmpi.ops.cuda.library import takes
from rwkvmpi.ops.product import KINDS, Packed, packed_bytes
from rwkvmpi.ops.registry import operator

_head_logprobs = library.bind("head_logprobs", "ipllpllppi")


def _outputs(x: Tensor, data: Tensor, kind: str, outputs: int, targets: Tensor) -> Tensor:
    op = "head_logprobs"
    rows, inputs = check.dimensions(op, "x", x, 2)
    check.tensor(op, "x", x, [rows, inputs], (torch.bfloat16 if kind == "int8" else getattr(torch, kind),))
    check.tensor(op, "weight", data, [packed_bytes(kind, outputs, inputs, takes(x))], (torch.uint8,))
    check.tensor(op, "targets", targets, [rows], (torch.int64,))
    return x.new_empty(rows, dtype=torch.float32)


@operator(
    "head_logprobs(Tensor x, Tensor data, str kind, int outputs, Tensor targets) -> Tensor",
    _outputs,
    cuda="head:head_logprobs_into",
)
def _run(out: Tensor, x: Tensor, data: Tensor, kind: str, outputs: int, targets: Tensor) -> None:
    rows, inputs = x.shape
    if not rows:
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < -1 or high >= outputs:
        raise ValueError(
            f"head_logprobs: targets must be -1 or 0 to {outputs - 1}, but they reach from {low} to {high}"
        )
    _head_logprobs(KINDS[kind], x, x.stride(0), rows, data, outputs, inputs, targets, out, torch.get_num_threads())


def head_logprobs(x: Tensor, weight: Packed, targets: Tensor) -> Tensor:
    """ln softmax(x @ weight^T)[targets] per row: float32 [T]; 0.0 where the target is -1.

    x: [T, C], float32 for a weight of kind float32, else bfloat16; weight: packed [V, C]; targets: int32 or int64 [T],
    each -1 or 0..V-1. The logits are float32 and exist for 512 ids at a time; their exponentials are summed in float32
    within such a block and in float64 over the blocks, in the order of the ids. On a GPU a target outside the
    vocabulary gives NaN, and the blocks are others.
    """
    if targets.dtype == torch.int32:
        targets = targets.long()
    return _run(x, weight.data, weight.kind, weight.outputs, targets)
