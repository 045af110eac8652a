"""Which grid for how many ranks: a cost model of the wavefront, in units that cancel out or in seconds.

The model: a stage works t_stage = its layers (and the head) on one chunk. Down the stages the dearest one sets the
pace. Around the ring of S slots, S chunks are read at a time, but the state of one layer must pass S ranks before
the first rank needs it again: a turn lasts max(t_stage, S * (t_layer + t_hop)). Replicas share whole documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rwkvmpi.grid.layout import Grid, split_layers
from rwkvmpi.models import cost


@dataclass(frozen=True)
class Machine:
    """Figures of one rank. Defaults are a modest CPU core and shared memory; `grid.figures` knows measured ones.

    speed_from, hop_from: who measured the speed and the hops, and when; '' for the defaults.
    """

    flops_per_second: float = 50e9
    hop_latency_s: float = 20e-6
    hop_bytes_per_second: float = 5e9
    speed_from: str = ""
    hop_from: str = ""

    def with_speed(self, flops_per_second: float, measured_by: str) -> Machine:
        """The same machine with a measured speed."""
        return replace(self, flops_per_second=flops_per_second, speed_from=measured_by)

    def with_hop(self, latency_s: float, bytes_per_second: float, measured_by: str) -> Machine:
        """The same machine with measured hops."""
        return replace(self, hop_latency_s=latency_s, hop_bytes_per_second=bytes_per_second, hop_from=measured_by)


@dataclass(frozen=True)
class Work:
    """What is to be read: costs per token of the model's parts, bytes that travel, tokens per document."""

    n_layer: int
    layer_flops: float
    head_flops: float
    state_bytes: int
    activation_bytes: int
    weight_bytes_per_layer: int
    weight_bytes_ends: int
    chunk: int
    document_tokens: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.document_tokens.sum())


def work_of(shape: Any, itemsize: int, chunk: int, document_tokens: np.ndarray, needs_head: bool) -> Work:
    """The work of reading documents of `document_tokens` [documents] with a model of `shape` (models.schema)."""
    table, head = cost.ends_weight_bytes(shape, itemsize)
    return Work(
        n_layer=shape.n_layer,
        layer_flops=cost.layer_cost(shape),
        head_flops=cost.head_cost(shape) if needs_head else 0.0,
        state_bytes=cost.state_bytes(shape),
        activation_bytes=cost.activation_bytes(shape),
        weight_bytes_per_layer=cost.layer_weight_bytes(shape, itemsize),
        weight_bytes_ends=max(table, head if needs_head else 0),
        chunk=chunk,
        document_tokens=document_tokens,
    )


def predict_seconds(work: Work, grid: Grid, machine: Machine) -> float:
    """Predicted seconds for reading all documents on `grid` (see the module's head for the model)."""
    layer_s = work.chunk * work.layer_flops / machine.flops_per_second
    head_s = work.chunk * work.head_flops / machine.flops_per_second
    bounds = split_layers(work.n_layer, grid.stages, layer_s, head_s)
    stage_s = max(
        [(hi - lo) * layer_s for lo, hi in bounds[:-1]] + [(bounds[-1][1] - bounds[-1][0]) * layer_s + head_s]
    )
    hop = machine.hop_latency_s + work.state_bytes / machine.hop_bytes_per_second if grid.ring > 1 else 0.0
    down = machine.hop_latency_s + work.chunk * work.activation_bytes / machine.hop_bytes_per_second
    turn_s = max(stage_s, grid.ring * (layer_s + hop))
    chunks = _chunks_of_busiest_replica(work.document_tokens, grid.replicas, work.chunk)
    turns = -(-chunks // grid.ring)
    fill = (grid.stages - 1) * (stage_s + down) + (grid.ring - 1) * (layer_s + hop)
    return float(turns * turn_s + fill)


def _chunks_of_busiest_replica(tokens: np.ndarray, replicas: int, chunk: int) -> int:
    """Chunks that the busiest replica reads when documents are taken longest first by whoever is free."""
    positions = (tokens + 1 + 31) // 32 * 32
    if replicas == 1 or len(positions) == 0:
        return max(1, int(-(-positions.sum() // chunk)))
    longest = np.sort(positions)[::-1]
    load = np.zeros(replicas, dtype=np.int64)
    head = longest[: 64 * replicas]  # the tail is small change: it levels out
    for size in head:
        load[load.argmin()] += size
    rest = int(longest[len(head) :].sum())
    busiest = max(int(load.max()), -(-(int(load.sum()) + rest) // replicas))
    return max(1, -(-busiest // chunk))


def choose_grid(
    work: Work,
    world: int,
    machine: Machine,
    *,
    stages: int = 0,
    ring: int = 0,
    replicas: int = 0,
    memory_per_rank: float = float("inf"),
) -> Grid:
    """The fastest grid of `world` ranks by `predict_seconds`; fixed numbers (not 0) are kept.

    Grids whose stage does not fit `memory_per_rank` bytes are left out unless none fits. Among equals (within half
    a percent) replicas come before ring before stages: they need the fewest hops. Returns a grid whose size may
    differ from `world` only where the fixed numbers leave no other choice; `check_grid` refuses it then.
    """
    candidates = []
    for p in [stages] if stages else range(1, min(world, work.n_layer) + 1):
        for s in [ring] if ring else range(1, world // p + 1):
            d = replicas or world // (p * s)
            if p <= work.n_layer and p * s * d == world:
                candidates.append(Grid(p, s, d))
    if not candidates:
        p, s = stages or 1, ring or 1
        return Grid(p, s, replicas or max(1, world // (p * s)))
    fitting = [grid for grid in candidates if _stage_bytes(work, grid) <= memory_per_rank]
    candidates = fitting or sorted(candidates, key=lambda grid: _stage_bytes(work, grid))[:1]
    times = {grid: predict_seconds(work, grid, machine) for grid in candidates}
    best = min(times.values())
    close: Sequence[Grid] = [grid for grid in candidates if times[grid] <= best * 1.005]
    return max(close, key=lambda grid: (grid.replicas, grid.ring))


def _stage_bytes(work: Work, grid: Grid) -> float:
    return -(-work.n_layer // grid.stages) * work.weight_bytes_per_layer + work.weight_bytes_ends
