"""The operators between the matrix products. Importing this imports torch and, at the first call, the compiled library.

All take and return contiguous CPU tensors, float32 where nothing else is said, and check dtype, shape and rows
(TypeError, ValueError). A row's bits depend on that row and its own document alone: not on its place in the chunk, its
neighbours, or the number of threads (torch.get_num_threads()). Numbers below 1.2e-38 count as zero.
"""

from rwkvmpi.ops.elementwise import all_finite, fold_rows, relu_squared, sigmoid, sigmoid_mul, tanh
from rwkvmpi.ops.gates import group_norm_gate, v6_decay, v7_output, v7_prepare
from rwkvmpi.ops.head import head_logprobs
from rwkvmpi.ops.norms import layer_norm, mix, norm_shift, norm_shift_mix
from rwkvmpi.ops.wkv import wkv4, wkv5, wkv6, wkv7

__all__ = [
    "all_finite",
    "fold_rows",
    "group_norm_gate",
    "head_logprobs",
    "layer_norm",
    "mix",
    "norm_shift",
    "norm_shift_mix",
    "relu_squared",
    "sigmoid",
    "sigmoid_mul",
    "tanh",
    "v6_decay",
    "v7_output",
    "v7_prepare",
    "wkv4",
    "wkv5",
    "wkv6",
    "wkv7",
]
