"""Whether tensors on a GPU hold numbers; conversion between dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvmpi.ops.cuda import library

_all_finite = library.bind("all_finite", "ppli")
_convert = library.bind("convert", "pplii")


def all_finite_flag(tensor: Tensor, flag: Tensor) -> None:
    """flag, int32 [1] on the same GPU, becomes 1 if `tensor` (contiguous) holds NaN or Inf, and else stays as it is.

    Nothing waits for the GPU: set the flag to 0, pass over many tensors, and read it when the results are needed.
    """
    _all_finite(tensor, flag, tensor.numel(), library.DTYPES[tensor.dtype])


def all_finite(tensor: Tensor) -> bool:
    """Whether `tensor` holds neither NaN nor Inf; waits for the GPU."""
    flag = torch.zeros(1, dtype=torch.int32, device=tensor.device)
    all_finite_flag(tensor, flag)
    return not flag.item()


def convert_into(out: Tensor, x: Tensor) -> None:
    """out = x in out's dtype, both contiguous; what is too large for float16 becomes +-65504."""
    _convert(x, out, x.numel(), library.DTYPES[x.dtype], library.DTYPES[out.dtype])
