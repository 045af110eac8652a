"""What the layers compute. Importing this imports torch and, at the first call, the compiled library.

All take and return contiguous CPU tensors, float32 where nothing else is said, and check dtype, shape and rows
(TypeError, ValueError). A row's bits depend on that row and its own document alone: not on its place in the chunk, its
neighbours, or the number of threads (torch.get_num_threads()). Numbers below 1.2e-38 count as zero.
"""

from rwkvmpi.ops.elementwise import all_finite, fold_rows
from rwkvmpi.ops.head import head_logprobs
from rwkvmpi.ops.norms import (
    embed,
    embed_into,
    layer_norm,
    layer_norm_into,
    shift_mix,
    shift_mix_into,
    shift_pair,
    shift_pair_into,
)
from rwkvmpi.ops.product import Packed, pack, packed_bytes, product, product_into, relu_squared_scale
from rwkvmpi.ops.replay import Program
from rwkvmpi.ops.time_mix import (
    v4_time_mix,
    v4_time_mix_into,
    v5_time_mix,
    v5_time_mix_into,
    v6_time_mix,
    v6_time_mix_into,
    v7_time_mix,
    v7_time_mix_into,
)
from rwkvmpi.ops.wkv import wkv4, wkv5, wkv6, wkv7
from rwkvmpi.ops.workspace import Workspace

__all__ = [
    "Packed",
    "Program",
    "Workspace",
    "all_finite",
    "embed",
    "embed_into",
    "fold_rows",
    "head_logprobs",
    "layer_norm",
    "layer_norm_into",
    "pack",
    "packed_bytes",
    "product",
    "product_into",
    "relu_squared_scale",
    "shift_mix",
    "shift_mix_into",
    "shift_pair",
    "shift_pair_into",
    "v4_time_mix",
    "v4_time_mix_into",
    "v5_time_mix",
    "v5_time_mix_into",
    "v6_time_mix",
    "v6_time_mix_into",
    "v7_time_mix",
    "v7_time_mix_into",
    "wkv4",
    "wkv5",
    "wkv6",
    "wkv7",
]
