"""Who owns what: ranks on a grid of stages x ring x replicas, layers on stages. Plain numbers, no torch, no MPI."""

from __future__ import annotations

from dataclasses import dataclass

from rwkvmpi.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a rank stands: its stage (which layers), its slot in the ring (which chunks), its replica."""

    stage: int
    slot: int
    replica: int


@dataclass(frozen=True)
class Grid:
    """P stages x S ring slots x D replicas. Stages of one slot are neighbours in rank order: their hops are the
    largest, so a launcher that fills node after node keeps them on one node."""

    stages: int
    ring: int
    replicas: int

    @property
    def size(self) -> int:
        return self.stages * self.ring * self.replicas

    def place(self, rank: int) -> Place:
        rest, stage = divmod(rank, self.stages)
        replica, slot = divmod(rest, self.ring)
        return Place(stage, slot, replica)

    def rank(self, place: Place) -> int:
        return (place.replica * self.ring + place.slot % self.ring) * self.stages + place.stage

    def source(self, replica: int) -> int:
        """The rank that reads a replica's documents: first stage, first slot."""
        return self.rank(Place(0, 0, replica))

    def members(self, replica: int) -> range:
        per_replica = self.stages * self.ring
        return range(replica * per_replica, (replica + 1) * per_replica)

    def neighbours(self, rank: int) -> set[int]:
        """The ranks with which this one exchanges messages of the stream: above and below, left and right on the ring,
        and between a replica's source and the slots that it feeds."""
        stage, slot, replica = (place := self.place(rank)).stage, place.slot, place.replica
        found = {self.rank(Place(other, slot, replica)) for other in (stage - 1, stage + 1) if 0 <= other < self.stages}
        found |= {self.rank(Place(stage, slot + step, replica)) for step in (-1, 1)}
        if stage == 0:
            found |= {self.rank(Place(0, other, replica)) for other in range(self.ring) if 0 in (slot, other)}
        return found - {rank}

    def __str__(self) -> str:
        return f"{self.stages} x {self.ring} x {self.replicas}"


def split_layers(n_layer: int, stages: int, layer_cost: float, head_cost: float) -> list[tuple[int, int]]:
    """Contiguous layers per stage, as (first, end), so that the dearest stage is as cheap as can be.

    The last stage also computes the head (`head_cost` in the unit of `layer_cost`), so it gets fewer layers where
    the head is dear. Every stage has at least one layer; among equals the earlier stages take the extra layer.
    """
    if not 1 <= stages <= n_layer:
        raise UserError(f"--stages {stages}: the model has {n_layer} layers, so there can be 1 to {n_layer} stages")
    best: list[tuple[int, int]] = []
    best_cost = float("inf")
    for last in range(1, n_layer - (stages - 1) + 1):
        others = stages - 1
        if others == 0 and last != n_layer:
            continue
        bounds, start = [], 0
        for index in range(others):
            count = (n_layer - last) // others + (index < (n_layer - last) % others)
            bounds.append((start, start + count))
            start += count
        bounds.append((start, n_layer))
        cost = max(max((hi - lo) * layer_cost for lo, hi in bounds), last * layer_cost + head_cost)
        if cost < best_cost:
            best, best_cost = bounds, cost
    return best


def check_grid(grid: Grid, world: int, n_layer: int) -> None:
    """Refuse a grid that does not fit the ranks that were started or the model's layers."""
    if grid.stages > n_layer:
        raise UserError(
            f"--stages {grid.stages}: the model has {n_layer} layers, so there can be 1 to {n_layer} stages"
        )
    if grid.size != world:
        raise UserError(
            f"--stages {grid.stages} --ring {grid.ring} --replicas {grid.replicas} needs {grid.size} ranks, but "
            f"{world} were started; start mpirun -n {grid.size}, or leave one of the three out"
        )
