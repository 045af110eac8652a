"""The matrix products at a model's very shapes, against the processor's peak and torch.mm; with few rows, against the
rate of reading memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rwkvmpi import ops
from rwkvmpi.bench.roofs import cold_bytes
from rwkvmpi.bench.timing import Effort, median, medians
from rwkvmpi.models.cost import PER_HEAD
from rwkvmpi.models.schema import ModelShape, layer_tensors
from rwkvmpi.ops.huge_pages import anonymous

FEW_ROWS = (1, 16)
HEAD_BLOCK = 4096  # outputs: enough of the head to know its rate
ALIGNMENT = 64  # of packed weights


@dataclass(frozen=True)
class Matrix:
    """A weight [outputs, inputs]; low_rank: one of a pair that stays bfloat16 where the large ones are int8."""

    inputs: int
    outputs: int
    low_rank: bool = False


def matrices(shape: ModelShape) -> list[Matrix]:
    """The different matrices of a layer (not the first), the large ones before the low-rank ones."""
    found: set[Matrix] = set()
    for name, size in layer_tensors(shape, shape.n_layer - 1).items():
        if name.endswith(".weight") and len(size) == 2:
            found.add(Matrix(size[1], size[0]))
        elif len(size) >= 2 and name not in PER_HEAD:  # low-rank ones lie the other way round
            found.add(Matrix(size[-2], size[-1], low_rank=True))
    return sorted(found, key=lambda m: (m.low_rank, -m.inputs * m.outputs, m.inputs))


@torch.inference_mode()
def many_rows(
    shape: ModelShape, dtype: str, rows: int, peak: float, effort: Effort, *, low_rank: bool
) -> Iterator[dict[str, Any]]:
    """Each product of `rows` rows: our rate, torch.mm's (not for int8, of which it has none), the share of `peak`."""
    head = Matrix(shape.n_embd, min(HEAD_BLOCK, shape.vocab_size))
    for matrix in [*(m for m in matrices(shape) if low_rank or not m.low_rank), head]:
        if matrix.low_rank and dtype == "int8":
            continue
        weight = torch.randn(matrix.outputs, matrix.inputs) * matrix.inputs**-0.5
        packed = ops.pack(weight, dtype)
        x = torch.randn(rows, matrix.inputs).to(packed.activation_dtype)
        out = torch.empty(rows, matrix.outputs, dtype=x.dtype)
        bodies = {"ours": _product(out, x, packed)}
        if dtype != "int8":
            bodies["torch"] = _torch_product(out, x, weight.to(x.dtype).t())
        seconds = medians(bodies, effort)
        operations = 2 * rows * matrix.inputs * matrix.outputs
        rate = operations / seconds["ours"]
        yield {
            **{"inputs": matrix.inputs, "outputs": matrix.outputs, "rows": rows, "low_rank": matrix.low_rank},
            **{"flops_per_second": rate, "share_of_peak": rate / peak},
            "torch_flops_per_second": operations / seconds["torch"] if "torch" in seconds else None,
        }


@torch.inference_mode()
def few_rows(shape: ModelShape, dtype: str, threads: int, memory: float, effort: Effort) -> Iterator[dict[str, Any]]:
    """The large products of 1 and 16 rows with weights that no cache holds: bytes per second of weights, and which
    share of the rate of reading `memory` that is."""
    for matrix in [*(m for m in matrices(shape) if not m.low_rank), Matrix(shape.n_embd, shape.vocab_size)]:
        weights = _copies(matrix, dtype, threads)
        size = ops.packed_bytes(dtype, matrix.outputs, matrix.inputs)
        for rows in FEW_ROWS:
            seconds = median(_pass_over(weights, rows).run, effort) / len(weights)
            rate = size / seconds
            yield {
                **{"inputs": matrix.inputs, "outputs": matrix.outputs, "rows": rows, "seconds": seconds},
                **{"bytes_per_second": rate, "share_of_memory": rate / memory},
            }


def _product(out: torch.Tensor, x: torch.Tensor, packed: ops.Packed) -> Any:
    return lambda: ops.product_into(out, x, packed)


def _torch_product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Any:
    return lambda: torch.mm(x, weight, out=out)


def _copies(matrix: Matrix, dtype: str, threads: int) -> list[ops.Packed]:
    """So many copies of a weight that one after the other they come from memory."""
    first = ops.pack(torch.randn(matrix.outputs, matrix.inputs), dtype)
    span = -(-first.data.numel() // ALIGNMENT) * ALIGNMENT
    count = -(-cold_bytes(threads) // span)
    memory = anonymous(count * span).view(count, span)[:, : first.data.numel()]
    memory.copy_(first.data.expand_as(memory))
    return [first._replace(data=copy) for copy in memory]


def _pass_over(weights: list[ops.Packed], rows: int) -> ops.Program:
    """One product with each of the weights, replayed as `Model.step` does it."""
    x = torch.randn(rows, weights[0].inputs).to(weights[0].activation_dtype)
    out = torch.empty(rows, weights[0].outputs)

    def body() -> None:
        for weight in weights:
            ops.product_into(out, x, weight)

    return ops.Program(body, [])
