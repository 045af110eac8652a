"""The head: log-probabilities of given tokens without ever holding a chunk's logits over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvmpi.ops import check, library
from rwkvmpi.ops.registry import operator

_logprob_block = library.bind("logprob_block", "pilllppppi")
_logprob_finish = library.bind("logprob_finish", "lppppp")

BLOCK = 4096  # ids per block: a chunk of 1,024 rows holds 16 MiB of logits at a time


def _outputs(x: Tensor, weight: Tensor, targets: Tensor, block: int) -> Tensor:
    op = "head_logprobs"
    rows, channels = check.dimensions(op, "x", x, 2)
    vocabulary = check.dimensions(op, "weight", weight, 2)[0]
    check.tensor(op, "x", x, [rows, channels], check.FLOATS)
    check.tensor(op, "weight", weight, [vocabulary, channels], (x.dtype,))
    check.tensor(op, "targets", targets, [rows], (torch.int32, torch.int64))
    if block < 1:
        raise ValueError(f"{op}: block must be at least 1, but it is {block}")
    return x.new_empty(rows, dtype=torch.float32)


@operator("head_logprobs(Tensor x, Tensor weight, Tensor targets, int block) -> Tensor", _outputs)
def _run(out: Tensor, x: Tensor, weight: Tensor, targets: Tensor, block: int) -> None:
    rows, vocabulary = x.shape[0], weight.shape[0]
    if not rows:
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < -1 or high >= vocabulary:
        raise ValueError(
            f"head_logprobs: targets must be -1 or 0 to {vocabulary - 1}, but they reach from {low} to {high}"
        )
    if high < 0:
        out.zero_()
        return
    targets = targets.to(torch.int64)
    maximum = torch.full([rows], -torch.inf)
    total = torch.zeros(rows, dtype=torch.float64)
    target_logit = torch.zeros(rows)
    buffer = x.new_empty(rows * min(block, vocabulary))
    threads = torch.get_num_threads()
    for first in range(0, vocabulary, block):
        part = weight[first : first + block]
        logits = buffer[: rows * part.shape[0]].view(rows, -1)
        torch.mm(x, part.t(), out=logits)
        _logprob_block(
            *(logits, logits.dtype == torch.bfloat16, *logits.shape, first),
            *(targets, maximum, total, target_logit, threads),
        )
    _logprob_finish(rows, targets, maximum, total, target_logit, out)


def head_logprobs(x: Tensor, weight: Tensor, targets: Tensor, block: int = BLOCK) -> Tensor:
    """ln softmax(x @ weight^T)[targets] per row: float32 [T]; 0.0 where the target is -1.

    x: float32 or bfloat16 [T, C]; weight: the same dtype, [V, C]; targets: int32 or int64 [T], each -1 or 0..V-1.
    The logits exist for `block` ids at a time (in x's dtype, as torch's product gives them); their exponentials are
    summed in float32 and float64. `block` is part of the result's identity.
    """
    return _run(x, weight, targets, block)
