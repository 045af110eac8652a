"""What a model costs: floating-point operations and bytes, per token, layer and message. Plain arithmetic, no torch."""

from __future__ import annotations

from math import prod

from rwkvmpi.models.schema import ModelShape, layer_tensors

# Operations per state element and token of the recurrence, a multiply-add counted as two: RWKV-7 projects the state on
# the removed direction, decays, removes, adds and reads out; RWKV-5 and 6 decay, add, and read out.
WKV_OPERATIONS = {"5.0": 5, "5.2": 5, "6": 5, "7": 9}
RWKV4_OPERATIONS = 30  # per channel: four exponentials, two divisions' worth, and a dozen multiplications and additions
# How the matrices can be held, by device.
KINDS = {"cpu": ("float32", "bfloat16", "int8"), "cuda": ("bfloat16", "float16", "float32")}
# Bytes of one weight of the large matrices; what "auto" stands for on a CPU is float32.
ITEMSIZE = {"auto": 4, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
PER_HEAD = ("att.r_k", "att.time_decay", "att.time_faaaa", "att.time_state")  # [H, N] and the like, never multiplied


def refusal(device: str, dtype: str) -> str:
    """Why matrices cannot be held as `dtype` on a "cpu" or "cuda"; "" if they can."""
    kinds = KINDS[device]
    if dtype in kinds:
        return ""
    where = "on a CPU" if device == "cpu" else "on a GPU"
    return f"weights cannot be used as {dtype}: {where} choose --dtype {', '.join(kinds[:-1])} or {kinds[-1]}"


def layer_weights(shape: ModelShape, layer: int) -> tuple[int, int]:
    """Numbers of weights of one layer: in the matrices of products, and in everything else (kept in float32)."""
    matrices = rest = 0
    for name, size in layer_tensors(shape, layer).items():
        if len(size) >= 2 and name not in PER_HEAD:
            matrices += prod(size)
        else:
            rest += prod(size)
    return matrices, rest


def layer_cost(shape: ModelShape) -> float:
    """Floating-point operations per token of one layer (not the first): matrix products and the recurrence."""
    if shape.version == "4":
        recurrence = RWKV4_OPERATIONS * shape.n_embd
    else:
        recurrence = WKV_OPERATIONS[shape.version] * shape.n_embd * shape.head_size
    return float(2 * layer_weights(shape, shape.n_layer - 1)[0] + recurrence)


def head_cost(shape: ModelShape) -> float:
    """Floating-point operations per token of the head: logits of the whole vocabulary."""
    return float(2 * shape.n_embd * shape.vocab_size)


def state_bytes(shape: ModelShape) -> int:
    """Bytes of the state of one document in one layer, as a hop to the right carries it: wkv, then two shift rows."""
    wkv = 3 if shape.version == "4" else shape.head_size
    return 4 * shape.n_embd * (wkv + 2)


def activation_bytes(shape: ModelShape) -> int:
    """Bytes per token of a hop to the next stage: x in float32, for RWKV-7 v_first beside it."""
    return 4 * shape.n_embd * (2 if shape.version == "7" else 1)


def layer_weight_bytes(shape: ModelShape, itemsize: int) -> int:
    """Bytes of one layer's weights in memory, the matrices at `itemsize` bytes an element."""
    matrices, rest = layer_weights(shape, shape.n_layer - 1)
    return itemsize * matrices + 4 * rest


def ends_weight_bytes(shape: ModelShape, itemsize: int) -> tuple[int, int]:
    """Bytes of the embedding (first stage) and of the head (last stage), both at `itemsize` bytes an element."""
    table = itemsize * shape.vocab_size * shape.n_embd
    return table, table
