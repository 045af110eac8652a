"""What the ranks of test_shared_weights.py run: pieces of known contents, shared or not, and what they cost; then a
failure."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from rwkvmpi.cluster import mpi, shared_weights
from rwkvmpi.errors import UserError
from rwkvmpi.models import weight_store

PIECES, PIECE = 3, 16 << 20
WAYS = ("shared", "own", "blind", "apart")


def main() -> None:
    comm = mpi.world()
    assert comm is not None
    measure(comm, "shared")  # torch and MPI take their own memory at the first use
    for how in WAYS:
        everyone = comm.gather(measure(comm, how))
        if comm.rank == 0:
            print(json.dumps({"how": how, "ranks": everyone}), flush=True)
    shared_weights.build(comm, 0, failing)


def measure(comm: Any, how: str) -> dict[str, Any]:
    """own: rank 1 must not share, and nobody waits for it; blind: it cannot map; apart: it holds another stage."""
    if comm.rank == 1:
        os.environ[shared_weights.SWITCH] = "0" if how == "own" else "1"
        shared_weights.MappedMemory = blind if how == "blind" else weight_store.MappedMemory  # type: ignore[misc]
    fills = 0

    def make(store: weight_store.WeightStore) -> list[torch.Tensor]:
        def fill(piece: torch.Tensor) -> None:
            nonlocal fills
            fills += 1
            piece.fill_(fills)

        return [store.place(PIECE, fill) for _ in range(PIECES)]

    before = proportional()
    pieces = shared_weights.build(comm, 1 + (how == "apart" and comm.rank), make)
    right = all(piece.min() == piece.max() == i + 1 for i, piece in enumerate(pieces))  # without memory of its own
    comm.Barrier()
    used = proportional() - before
    comm.Barrier()  # nobody lets go before all have measured
    return {"fills": fills, "right": bool(right), "bytes": used}


def failing(store: weight_store.WeightStore) -> None:
    assert store.fills, "a follower is told before it builds"
    raise UserError("this model is not sound")


def blind(published: weight_store.Published) -> None:
    raise PermissionError("no way to look into another process")


def proportional() -> int:
    """Bytes of this process in memory; what several have mapped counts in parts."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the kernel does not tell")


if __name__ == "__main__":
    mpi.guard(main)
