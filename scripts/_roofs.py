"""How fast a model could be read on this machine: rates measured by bench_cpu.py in a process of their own, and what
they allow.

    python scripts/_roofs.py '{"products": [[768, 768], [768, 3072]], "rows": 1024, "threads": 1}'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from math import prod
from typing import Any

import torch

from rwkvmpi.bench import peak_flops
from rwkvmpi.models.cost import (
    PER_HEAD,
    RWKV4_OPERATIONS,
    WKV_OPERATIONS,
    head_cost,
    layer_weights,
    state_bytes,
)
from rwkvmpi.models.schema import ModelShape, layer_tensors
from rwkvmpi.models.weight_store import anonymous

KINDS = ("float32", "bfloat16", "int8")
READ_BYTES = 1 << 30
# Of an element of a large matrix. int8 adds a scale and a sum for every output channel, and holds the low-rank matrices
# in bfloat16.
ITEMSIZE = {"float32": 4, "bfloat16": 2, "int8": 1}
CHANNEL_BYTES = {"float32": 0, "bfloat16": 0, "int8": 8}
EMBEDDING_ITEMSIZE = 2  # as the benchmark's files have it


def main() -> int:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    with torch.inference_mode():
        rates: dict[str, Any] = {"products": {}}
        for kind in ("float32", "bfloat16"):
            seconds = {name(k, n): product_seconds(spec["rows"], k, n, kind) for k, n in spec["products"]}
            rates["products"][kind] = seconds
        rates["read_bytes_per_second"] = read_rate()
        rates["peak"] = {kind: peak_flops(kind, spec["threads"]) for kind in KINDS}
    print(json.dumps(rates))
    return 0


def name(inputs: int, outputs: int) -> str:
    """Of a product in the dictionaries of rates."""
    return f"{inputs}x{outputs}"


def product_seconds(rows: int, inputs: int, outputs: int, kind: str) -> float:
    """Of torch.mm, [rows, inputs] times a weight as model files have it, [outputs, inputs] transposed."""
    dtype = getattr(torch, kind)
    x = torch.randn(rows, inputs).to(dtype)
    weight = torch.randn(outputs, inputs).to(dtype).t()
    return best_seconds(lambda: torch.mm(x, weight))


def read_rate() -> float:
    """Bytes per second of reading a buffer that no cache holds, on huge pages, as weights lie in memory."""
    buffer = anonymous(READ_BYTES).fill_(1).view(torch.int64)  # fresh pages would all be one page of zeros
    return READ_BYTES / best_seconds(buffer.sum)


def best_seconds(body: Callable[[], Any], at_least: float = 0.15) -> float:
    """Of several calls the shortest: nothing but a disturbance can lower a limit."""
    body()
    taken: list[float] = []
    while len(taken) < 5 or sum(taken) < at_least:
        start = time.perf_counter()
        body()
        taken.append(time.perf_counter() - start)
    return min(taken)


def layer_products(shape: ModelShape, layer: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of every matrix product of one layer."""
    found = []
    for tensor, size in layer_tensors(shape, layer).items():
        if len(size) < 2 or tensor in PER_HEAD:
            continue
        if tensor.endswith(".weight"):
            found.append((size[1], size[0]))
        else:  # low-rank matrices lie the other way round; RWKV-6 has five in one tensor
            found += [(size[-2], size[-1])] * prod(size[:-2])
    return found


def all_products(shape: ModelShape) -> list[tuple[int, int]]:
    """Of all layers; the head is left out, of which a prefill needs one row."""
    return [product for layer in range(shape.n_layer) for product in layer_products(shape, layer)]


def recurrence_operations(shape: ModelShape) -> float:
    """Per token, all layers."""
    if shape.version == "4":
        return float(RWKV4_OPERATIONS * shape.n_embd * shape.n_layer)
    return float(WKV_OPERATIONS[shape.version] * shape.n_embd * shape.head_size * shape.n_layer)


def prefill_roof(shape: ModelShape, kind: str, tokens: int, rows: int, rates: dict[str, Any], of: str) -> float | None:
    """Tokens/s of a prefill: its matrix products at the rate of torch.mm (`of` "mm") or of the processor's `of` "peak",
    the recurrence at the float32 peak, the head's weights read once. None for a kind that torch.mm does not have."""
    per_token = recurrence_operations(shape) / rates["peak"]["float32"]
    if of == "peak":
        per_token += sum(2 * k * n for k, n in all_products(shape)) / rates["peak"][kind]
    elif kind in rates["products"]:
        seconds = rates["products"][kind]
        per_token += sum(seconds[name(*product)] for product in all_products(shape)) / rows
    else:
        return None
    head = shape.vocab_size * (shape.n_embd * ITEMSIZE[kind] + CHANNEL_BYTES[kind])
    return tokens / (tokens * per_token + head / rates["read_bytes_per_second"])


def step_bytes(shape: ModelShape, kind: str, batch: int) -> int:
    """That a step of `batch` documents moves: every weight but the embedding read once, of that a row per document,
    states read and written."""
    total = shape.vocab_size * (shape.n_embd * ITEMSIZE[kind] + CHANNEL_BYTES[kind])
    for layer in range(shape.n_layer):
        for tensor, size in layer_tensors(shape, layer).items():
            if len(size) >= 2 and tensor not in PER_HEAD:
                large = tensor.endswith(".weight")
                itemsize = ITEMSIZE[kind] if large else max(2, ITEMSIZE[kind])
                total += itemsize * prod(size) + (CHANNEL_BYTES[kind] * size[0] if large else 0)
        total += 4 * layer_weights(shape, layer)[1] + 2 * batch * state_bytes(shape)
    return total + 4 * 2 * shape.n_embd + batch * shape.n_embd * EMBEDDING_ITEMSIZE


def step_roof(shape: ModelShape, kind: str, batch: int, rates: dict[str, Any]) -> float:
    """Tokens/s of steps: what memory allows, or the processor's peak where that is less."""
    memory = step_bytes(shape, kind, batch) / rates["read_bytes_per_second"]
    operations = sum(2 * k * n for k, n in all_products(shape)) + head_cost(shape)
    arithmetic = operations / rates["peak"][kind] + recurrence_operations(shape) / rates["peak"]["float32"]
    return batch / max(memory, batch * arithmetic)


if __name__ == "__main__":
    sys.exit(main())
