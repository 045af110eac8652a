"""Waiting for other ranks without burning a core: MPI's own collectives spin."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

LOOK_EVERY_S = 5e-3


def quiet_bcast(comm: Any, value: int) -> int:
    """Rank 0's `value` on every rank; the others sleep while they wait, however long that takes."""
    buffer = np.array([value], dtype=np.int64)
    request = comm.Ibcast(buffer, root=0)
    while not request.Test():
        time.sleep(LOOK_EVERY_S)
    return int(buffer[0])


def quiet_barrier(comm: Any) -> None:
    """Return when all ranks are here; who comes early sleeps."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(LOOK_EVERY_S)
