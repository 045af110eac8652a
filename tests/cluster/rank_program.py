"""What the ranks of test_ranks.py run: one way to end, chosen by argv, on one rank or on all (-1)."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from rwkvmpi.cluster import launcher, logs, mpi
from rwkvmpi.cluster.signals import StopRequest
from rwkvmpi.errors import UserError

LIMIT_S = 30.0


def main() -> int:
    how, who, run = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    facts = launcher.launch_facts()
    log = logs.setup(run, facts.rank, facts.size)
    if how == "mistake before MPI":
        raise UserError("the same mistake on all ranks")
    comm = mpi.world()
    assert comm is not None
    stop = StopRequest(run).install()
    assert (comm.rank, comm.size) == (facts.rank, facts.size)
    (run / f"pid_{comm.rank}").write_text(f"{os.getpid()} {comm.size}")
    mine = who in (comm.rank, -1)
    comm.Barrier()
    if how == "code":
        return 3 if mine else 0
    if mine and how == "user error":
        raise UserError("a mistake found by one rank")
    if mine and how == "crash":
        raise ValueError("an accident")
    if mine and how == "crash in a thread":
        threading.Thread(target=lambda: [][1]).start()
    if how == "blocked in MPI":
        comm.recv(source=facts.rank, tag=99)
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        time.sleep(0.01)
        if how == "stop" and stop.reason:
            log.warning("stop because of %s", stop.reason)
            return 75
    raise TimeoutError("nothing ended this rank")


if __name__ == "__main__":
    mpi.guard(main)
