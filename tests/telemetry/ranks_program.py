"""The telemetry of a job that reads nothing: python ranks_program.py RUN ATTEMPT RANKS [end]

Says "up", then goes on until RUN/end is there. Under mpirun it is RANKS real ranks; else one process plays them
all. With "end" it ends without closing anything.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

from rwkvmpi import telemetry

phase = "reading"


def facts_of(rank: int) -> Any:
    count = itertools.count(1)
    return lambda: {"phase": phase, "tokens": 1024 * next(count), "slot": rank, "waits": {"state": 0.5}}


def main() -> None:
    global phase
    run, attempt, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    (run / "logs").mkdir(parents=True, exist_ok=True)
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        from rwkvmpi.cluster import mpi

        comm = mpi.world()
        assert comm is not None
        ranks = [telemetry.begin(comm, run, facts_of(comm.rank), "on", attempt)]
    else:
        ranks = [telemetry.Telemetry(run, 0, size, facts_of(0), attempt=attempt)]
        endpoint = ranks[0].endpoint()
        ranks += [
            telemetry.Telemetry(run, n, size, facts_of(n), "on", endpoint, attempt=attempt) for n in range(1, size)
        ]
        for rank in ranks:
            rank.start()
    print("up", flush=True)
    if "end" in sys.argv:
        return
    while not (run / "end").exists():
        time.sleep(0.02)
    phase = "done"
    for rank in ranks:
        rank.close()


if __name__ == "__main__":
    main()
