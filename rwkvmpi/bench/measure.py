"""The whole measurement, from the machine's roofs to tokens/s, and what of it `plan` and `--chunk auto` shall know."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rwkvmpi.bench import hops, layers, products, roofs, speed
from rwkvmpi.bench.shapes import random_checkpoint, shape_of, slice_of
from rwkvmpi.bench.timing import FULL, QUICK, Effort
from rwkvmpi.cluster import pinning
from rwkvmpi.cluster.waiting import quiet_bcast
from rwkvmpi.config import DEFAULT_CHUNK
from rwkvmpi.grid import figures
from rwkvmpi.grid.mpi_transport import MpiTransport
from rwkvmpi.grid.transport import Terms
from rwkvmpi.models import cost
from rwkvmpi.models.checkpoint import Checkpoint
from rwkvmpi.models.cost import KINDS
from rwkvmpi.models.model import Model
from rwkvmpi.models.schema import ModelShape

MAIN_DTYPE, BESIDE = "bfloat16", "float32"  # what is measured where nothing is asked for
SWEEP_S = {False: 10.0, True: 2.0}  # for all chunk sizes of a dtype, by whether it shall be quick
FEWEST_LAYERS = 2
QUICK_HEAD_ROWS = 256
DISTURBED = 0.1  # of the main thread's time

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to measure. model: a file, or None; shape: as --shape gives it; dtypes: empty for bfloat16, and beside it
    the rates of float32 (the dtype of a job that names none)."""

    model: str | None
    shape: str | None
    dtypes: tuple[str, ...]
    threads: int
    chunks: tuple[int, ...]
    quick: bool


def run(request: Request, comm: Any, say: Say) -> dict[str, Any] | None:
    """Measure; collective. Rank 0 gets everything as plain values, the others None when rank 0 is done.

    `say` is told what is going on. UserError for a model or a shape that cannot be measured.
    """
    shape = shape_of(request.model, request.shape)
    effort = QUICK if request.quick else FULL
    torch.set_num_threads(request.threads)
    with pinning.settle(comm, request.threads):
        found = _hops(comm, shape, effort) if comm is not None else []
        result = _measure(request, shape, say) if comm is None or comm.rank == 0 else None
    if comm is not None:
        quiet_bcast(comm, 0)
    if result is not None:
        result["hops"] = found
        result["stored"] = store(result)
    return result


def _hops(comm: Any, shape: ModelShape, effort: Effort) -> list[dict[str, Any]]:
    return hops.measure_hops(comm, MpiTransport(comm.Dup(), Terms()), hops.message_rooms(shape, DEFAULT_CHUNK), effort)


def _measure(request: Request, shape: ModelShape, say: Say) -> dict[str, Any]:
    """Everything but the hops, on this rank alone."""
    measured = slice_of(shape, request.quick)
    chunks = sorted({*request.chunks, DEFAULT_CHUNK})
    dtypes = dict.fromkeys(request.dtypes, True) or {MAIN_DTYPE: True, BESIDE: False}
    say("processor and memory")
    result: dict[str, Any] = {
        "machine": roofs.machine(request.threads),
        "model": {**asdict(shape), "measured_layers": measured.n_layer, "random_weights": True},
        "roofs": {
            "flops_per_second": {dtype: roofs.peak_flops(dtype, request.threads) for dtype in KINDS["cpu"]},
            "memory_bytes_per_second": roofs.memory_bandwidth(request.threads),
        },
        "dtypes": {},
    }
    say("random weights")
    with random_checkpoint(measured) as checkpoint:
        wall, own = time.perf_counter(), time.thread_time()
        for dtype, thorough in dtypes.items():
            result["dtypes"][dtype] = _measure_dtype(
                request, shape, checkpoint, dtype, result["roofs"], chunks, thorough, say
            )
        taken = 1 - (time.thread_time() - own) / (time.perf_counter() - wall)
    result["machine"]["taken_by_others"] = max(0.0, taken)
    return result


def _measure_dtype(
    request: Request,
    shape: ModelShape,
    checkpoint: Checkpoint,
    dtype: str,
    limits: dict[str, Any],
    chunks: Sequence[int],
    thorough: bool,
    say: Say,
) -> dict[str, Any]:
    """One way of holding the matrices; if not `thorough` its rates alone: no few rows, no low-rank ones, no steps."""
    effort = QUICK if request.quick else FULL
    peak, memory = limits["flops_per_second"][dtype], limits["memory_bytes_per_second"]
    say(f"{dtype}: products")
    found: dict[str, Any] = {
        "products": list(products.many_rows(shape, dtype, DEFAULT_CHUNK, peak, effort, low_rank=thorough)),
        "few_rows": list(products.few_rows(shape, dtype, request.threads, memory, effort)) if thorough else [],
    }
    say(f"{dtype}: a layer")
    model = Model(checkpoint, dtype)
    stage = model.stage
    found["layer"] = layers.layer_profile(stage, DEFAULT_CHUNK, limits["flops_per_second"], effort)
    rows = QUICK_HEAD_ROWS if request.quick else DEFAULT_CHUNK  # its time per token hardly depends on them
    heads = layers.head_seconds(stage, chunks if thorough and not request.quick else [rows], effort)
    found["head"] = {
        "seconds": heads[rows] * DEFAULT_CHUNK / rows,
        "layers": heads[rows] * DEFAULT_CHUNK / rows / found["layer"]["seconds"],
        "share_of_peak": rows * cost.head_cost(shape) / heads[rows] / peak,
    }
    heads = {chunk: heads.get(chunk, heads[rows] * chunk / rows) for chunk in chunks}
    say(f"{dtype}: chunks")
    per_layer = effort.repeats * sum(chunks) / DEFAULT_CHUNK * found["layer"]["seconds"]
    affordable = int(SWEEP_S[request.quick] * (1.0 if thorough else 0.5) / per_layer)
    count = min(len(stage.layers), max(FEWEST_LAYERS, affordable))
    found["chunk_layers"] = count
    found["chunks"] = speed.chunk_speeds(stage, chunks, count, shape.n_layer, heads, effort)
    (rate,) = (entry["score_tokens_per_second"] for entry in found["chunks"] if entry["chunk"] == DEFAULT_CHUNK)
    found["flops_per_second"] = rate * (shape.n_layer * cost.layer_cost(shape) + cost.head_cost(shape))
    if thorough:
        say(f"{dtype}: single steps")
    found["steps"] = speed.step_speeds(model, shape.n_layer, effort) if thorough else []
    return found


def store(result: dict[str, Any]) -> str | None:
    """Put what `plan` and `--chunk auto` use into the file of figures; its path, None where it cannot be written.

    No chunk is to be chosen by a measurement in which other programs took more than a tenth of the processor's time.
    """
    threads, shape = result["machine"]["threads"], result["model"]

    def change(known: figures.Figures) -> None:
        figures.set_memory(known, threads, result["roofs"]["memory_bytes_per_second"])
        for dtype, found in result["dtypes"].items():
            figures.set_speed(known, "bench", "cpu", dtype, threads, found["flops_per_second"])
            rates = {entry["chunk"]: entry["forward_tokens_per_second"] for entry in found["chunks"]}
            if result["machine"]["taken_by_others"] <= DISTURBED:  # else the fastest is fastest by chance
                figures.set_chunks(known, "cpu", dtype, threads, shape["version"], shape["n_embd"], rates)
        if result["hops"]:
            hops.keep(known, MpiTransport.name, result["hops"])

    path = figures.update(change)
    return None if path is None else str(path)
