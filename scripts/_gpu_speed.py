"""How fast a GPU reads: kernels over their floors, whole models, single-token steps, memory over the length.

    python scripts/_gpu_speed.py [--sizes 0.1B,1.5B,7.2B] [--seconds 400] [--json FILE]

The limits are measured in the same run: a bfloat16 product of 8,192 x 8,192 x 8,192 and a copy of 2 GiB. Weights are
random, documents too. What does not fit in --seconds is left out and named.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from rwkvmpi import ops
from rwkvmpi.models import cost
from rwkvmpi.models.chunk_reader import ChunkReader, make_reader
from rwkvmpi.models.model import Model, Stage
from rwkvmpi.models.random_checkpoint import random_checkpoint
from rwkvmpi.models.random_weights import official_shape
from rwkvmpi.ops.cuda import library
from rwkvmpi.ops.cuda import time_mix as cuda_time_mix

CHUNKS = (512, 1024, 2048, 4096)
BATCHES = (1, 16, 64, 256, 1024)
LENGTHS = (8_192, 32_768, 262_144, 1_048_576)
LENGTH_MODEL = "0.1B"
WKV_LAYERS, WKV_HEADS = 32, 64  # of the 7.2B model, for which the kernels' times are quoted
DTYPE = torch.bfloat16

Row = dict[str, Any]


class Budget:
    """Seconds for everything; whoever comes too late is named."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.left_out: list[str] = []

    def has(self, seconds: float, what: str) -> bool:
        if time.monotonic() + seconds <= self._end:
            return True
        self.left_out.append(what)
        return False


def seconds_of(body: Callable[[], object], least: float = 0.2, repeats: int = 5) -> float:
    """Seconds of one call on the GPU: the median of `repeats` measurements of at least `least` seconds in all."""
    body()
    torch.cuda.synchronize()

    def measure(calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            body()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    calls = max(1, round(least / repeats / max(measure(1), 1e-7)))
    return sorted(measure(calls) for _ in range(repeats))[repeats // 2] / calls


def limits() -> Row:
    """Operations and bytes per second that this GPU reaches."""
    n = 8192
    a, b = (torch.randn(n, n, dtype=DTYPE, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    flops = 2 * n**3 / seconds_of(lambda: torch.mm(a, b, out=out))
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds_of(lambda: target.copy_(source))
    return {"flops_per_second": flops, "bytes_per_second": bandwidth}


def kernels(limit: Row) -> Iterator[Row]:
    """Each kernel of a layer of the 7.2B model over 2,048 tokens, as microseconds per token and 32 layers."""
    heads, size, tokens = WKV_HEADS, 64, 2048
    width = heads * size

    def row(name: str, documents: int, nbytes: float, body: Callable[[], object]) -> Row:
        seconds = seconds_of(body)
        floor = nbytes / limit["bytes_per_second"]
        return {
            "kernel": name,
            "documents": documents,
            "us_per_token_32_layers": seconds / tokens * WKV_LAYERS * 1e6,
            "over_memory_floor": seconds / floor,
        }

    x = torch.randn(tokens, width, device="cuda")
    vector = [torch.randn(width, device="cuda") for _ in range(9)]
    lin = [torch.randn(tokens, width, dtype=DTYPE, device="cuda") for _ in range(8)]
    mixes, shift = torch.rand(6, width, device="cuda"), torch.zeros(64, width, device="cuda")
    mixed, h = torch.empty(6, tokens, width, dtype=DTYPE, device="cuda"), torch.empty_like(lin[0])
    r_k, decay = torch.randn(heads, size, device="cuda"), -vector[0].exp()
    item = DTYPE.itemsize
    for documents in (1, 4, 16):
        each = tokens // documents
        rows = torch.tensor([[i * each, each] for i in range(documents)], dtype=torch.int32, device="cuda")
        state = torch.zeros(documents, heads, size, size, device="cuda")
        arguments = (*lin, *vector[:3], *vector[3:5], r_k, *vector[5:7], state, rows)
        states = 2 * state.numel() * 4
        older = state.new_zeros(documents, 3, width)
        for body, name in ((1, "sequential"), (2, "tiles"), (3, "tiles in two")):

            def run(body: int = body, arguments: tuple[Any, ...] = arguments) -> None:
                time_mix: Any = cuda_time_mix.v7_time_mix
                time_mix((h, None), *arguments, body=body)

            yield row(f"RWKV-7 time mix, {name}", documents, 9 * tokens * width * item + states, run)
        yield row(
            "RWKV-6 time mix",
            documents,
            6 * tokens * width * item + states,
            partial(ops.v6_time_mix_into, h, *lin[:4], vector[0], r_k, lin[4], *vector[1:3], state, rows),
        )
        yield row(
            "RWKV-4 time mix",
            documents,
            4 * tokens * width * item,
            partial(ops.v4_time_mix_into, h, *lin[:3], decay, vector[1], older, rows),
        )
        yield row(
            "layer norm, shift and 6 mixes",
            documents,
            tokens * width * (4 + 6 * item),
            partial(ops.shift_mix_into, mixed, x, *vector[:2], shift[:documents], mixes, rows),
        )
    key = torch.randn(tokens, 4 * width, dtype=DTYPE, device="cuda")
    weight = ops.pack(torch.randn(4 * width, width, dtype=DTYPE, device="cuda"), "bfloat16", on_gpu=True)
    product = seconds_of(lambda: ops.product_into(key, lin[0], weight))
    both = seconds_of(lambda: ops.product_into(key, lin[0], weight, "relu_squared"))
    yield {
        "kernel": "relu squared after its product",
        "documents": 1,
        "us_per_token_32_layers": (both - product) / tokens * WKV_LAYERS * 1e6,
        "over_memory_floor": (both - product) / (2 * key.numel() * item / limit["bytes_per_second"]),
    }
    yield from training(limit)


def training(limit: Row) -> Iterator[Row]:
    """Forward and backward, B8 T4096 H64 bfloat16."""
    from rwkvmpi.ops.training import wkv7_training

    shape = (8, 4096, 64, 64)
    r, k, v = (torch.randn(shape, dtype=DTYPE, device="cuda") * 0.5 for _ in range(3))
    kk = torch.nn.functional.normalize(torch.randn(shape, device="cuda"), dim=-1)
    w = torch.exp(-0.6065306597 * torch.rand(shape, device="cuda")).to(DTYPE)
    inputs = [r, w, k, v, (-kk).to(DTYPE), (kk * torch.rand_like(kk)).to(DTYPE)]
    for x in inputs:
        x.requires_grad_()
    dy = torch.randn(shape, dtype=DTYPE, device="cuda")

    def run() -> None:
        y, _ = wkv7_training(*inputs)
        torch.autograd.grad(y, inputs, dy)

    yield {"kernel": "WKV-7 forward + backward B8 T4096 H64", "documents": 8, "ms": seconds_of(run) * 1000}


def model_of(size: str) -> Model:
    """A model of RWKV-7 with random weights, in the memory of the GPU."""
    return Model(random_checkpoint(official_shape("7", size), DTYPE, "cuda"), "bfloat16", "cuda")


def read_chunk(stage: Stage, reader: ChunkReader, tokens: np.ndarray, rows: np.ndarray) -> None:
    """A chunk through all layers; the last state of each layer stays on the GPU."""
    reader.begin_tokens(tokens, rows)
    for item in range(len(stage.layers)):
        state = reader.state(item, len(rows))
        reader.read(item, state)
        reader.look(item, state)


def prefills(size: str, model: Model, limit: Row, budget: Budget) -> Iterator[Row]:
    """Tokens/s by chunk and number of documents, without and with the head."""
    shape, stage = model.shape, model.stage
    per_token = cost.layer_cost(shape) * shape.n_layer
    for chunk in CHUNKS:
        reader = make_reader(stage, chunk)
        for documents in (1, 4, 16):
            if not budget.has(5, f"prefill {size}, chunk {chunk}, {documents} documents"):
                continue
            each = chunk // documents
            rows = np.array([[i * each, each] for i in range(documents)], dtype=np.int32)
            tokens = np.random.default_rng(0).integers(0, shape.vocab_size, chunk).astype(np.int32)
            targets = torch.from_numpy(np.roll(tokens, -1)).long()

            def score(reader: ChunkReader = reader, targets: torch.Tensor = targets) -> None:
                stage.logprobs(stage.finish(reader.x, stage.dtype), targets)

            with stage.device.computing():
                bare = seconds_of(partial(read_chunk, stage, reader, tokens, rows), 0.5, 3)
                head = seconds_of(score, 0.2, 3)
            yield {
                "model": size,
                "chunk": chunk,
                "documents": documents,
                "tokens_per_second": chunk / bare,
                "with_head": chunk / (bare + head),
                "head_share": head / bare,
                "of_flops": per_token * chunk / bare / limit["flops_per_second"],
            }


def steps(size: str, model: Model, limit: Row, budget: Budget) -> Iterator[Row]:
    """Tokens/s of single-token steps; of the limit: weights and states once through memory, products at their rate."""
    shape = model.shape
    for dtype in (torch.float32, torch.float16):
        for batch in BATCHES:
            name = f"step {size}, batch {batch}, {dtype} states"
            state = cost.state_bytes(shape) * shape.n_layer * dtype.itemsize // 4
            free, _ = torch.cuda.mem_get_info()
            if batch * state > 0.8 * free:
                budget.left_out.append(f"{name}: {batch * state / 2**30:.0f} GiB of states do not fit")
                continue
            if not budget.has(8, name):
                continue
            states = model.states(batch, dtype)
            ids = np.arange(batch) % shape.vocab_size
            seconds = seconds_of(partial(model.step, ids, states), 0.5, 3)
            nbytes = model.stage.weight_bytes - shape.n_embd * shape.vocab_size * 2 + 2 * batch * state
            flops = batch * (cost.layer_cost(shape) * shape.n_layer + cost.head_cost(shape))
            floor = max(nbytes / limit["bytes_per_second"], flops / limit["flops_per_second"])
            yield {
                "model": size,
                "batch": batch,
                "states": str(dtype).removeprefix("torch."),
                "tokens_per_second": batch / seconds,
                "of_limit": floor / seconds,
            }
            model._graphs.clear()
            del states
            torch.cuda.empty_cache()


def lengths(budget: Budget) -> Iterator[Row]:
    """One document of growing length: tokens/s and the most memory held."""
    model = model_of(LENGTH_MODEL)
    stage, chunk = model.stage, 2048
    reader = make_reader(stage, chunk)
    rows, tokens = np.array([[0, chunk]], dtype=np.int32), np.zeros(chunk, dtype=np.int32)
    with stage.device.computing():
        read_chunk(stage, reader, tokens, rows)
        for length in LENGTHS:
            if not budget.has(30, f"length {length}"):
                continue
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            for _ in range(length // chunk):
                read_chunk(stage, reader, tokens, rows)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
            yield {
                "model": LENGTH_MODEL,
                "tokens": length,
                "tokens_per_second": length / seconds,
                "peak_bytes": torch.cuda.max_memory_allocated(),
            }


def show(rows: list[Row]) -> None:
    """A table of rows with the same keys."""
    if not rows:
        return
    heads = list(rows[0])
    lines = [[_shown(row.get(key)) for key in heads] for row in rows]
    widths = [max(len(heads[i]), *(len(line[i]) for line in lines)) for i in range(len(heads))]
    print()
    for line in [heads, *lines]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


@click.command(help=__doc__)
@click.option("--sizes", default="0.1B,1.5B,7.2B")
@click.option("--seconds", type=float, default=400)
@click.option("--json", "path", type=click.Path(path_type=Path))
def main(sizes: str, seconds: float, path: Path | None) -> None:
    if why := library.reason():
        raise click.ClickException(why)
    budget, limit = Budget(seconds), limits()
    name = torch.cuda.get_device_name()
    print(f"{name}: {limit['flops_per_second'] / 1e12:.0f} TFLOP/s, {limit['bytes_per_second'] / 1e12:.2f} TB/s")
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "limits": limit}

    def note(part: str, rows: Iterator[Row]) -> None:
        got = found.setdefault(part, [])
        first = len(got)
        for row in rows:
            got.append(row)
            if path is not None:  # what a time limit cuts off is not lost
                path.write_text(json.dumps(found | {"left_out": budget.left_out}, indent=1) + "\n")
        show([row for row in got[first:] if "ms" not in row])
        show([row for row in got[first:] if "ms" in row])

    note("kernels", kernels(limit))
    for size in sizes.split(","):
        model = model_of(size)
        note("prefill", prefills(size, model, limit, budget))
        note("step", steps(size, model, limit, budget))
        del model
        torch.cuda.empty_cache()
    note("length", lengths(budget))
    for text in budget.left_out:
        print(f"left out: {text}")


if __name__ == "__main__":
    main()
