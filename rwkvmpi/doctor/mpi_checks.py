"""The doctor's checks of MPI: which library, which mpirun, and whether the two belong together."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rwkvmpi import __version__
from rwkvmpi.cluster import mpi
from rwkvmpi.cluster.launcher import launch_facts
from rwkvmpi.doctor import node_installation, thread_checks
from rwkvmpi.doctor.diagnosis import Finding
from rwkvmpi.doctor.machine_checks import processor_name

PROBE_RANKS = 2
PROBE_LIMIT_S = 90
# run by every rank of the probe: the world must be the launcher's, and a message must get through
PROBE = """
from rwkvmpi.cluster import mpi
def main():
    comm = mpi.world()
    total = comm.allreduce(comm.rank + 1)
    if comm.rank == 0:
        print("probe", comm.size, total, mpi.library_version(), flush=True)
mpi.guard(main)
"""
INSTALL = "load the site's MPI module, or pip install 'rwkvmpi[mpi]'"


def mpi_library() -> Iterator[Finding]:
    """MPI as it is: under a launcher this world itself, else a probe of two ranks with the mpirun on PATH.

    A single rank that a launcher started probes nothing: an mpirun inside its step would wait for a place in it.
    """
    facts = launch_facts()
    if facts.size > 1:
        yield from _this_world()
        return
    try:
        binding = f"mpi4py {version('mpi4py')}"
    except PackageNotFoundError:
        remedy = "pip install mpi4py, and for MPI itself " + INSTALL
        yield Finding("mpi", "warn", "mpi4py is not installed: one process only", remedy)
        return
    if facts.launcher != "none":
        library = node_installation.library_of_a_run()
        value = library if isinstance(library, str) else f"{library.name}, one rank, which needs nobody to speak to"
        yield Finding("mpi", "warn" if isinstance(library, str) else "ok", f"{binding}; {value}")
        return
    program = shutil.which("mpirun")
    if program is None:
        beside = Path(sys.executable).parent / "mpirun"
        if beside.exists():
            remedy = f"put it there: source {beside.parent}/activate"
            yield Finding("mpi", "warn", f"{binding}; {beside} exists but is not on PATH", remedy)
            program = str(beside)
        else:
            yield Finding("mpi", "warn", f"{binding}; no mpirun on PATH: one process only", INSTALL)
            return
    yield from _probe(program, binding)
    if os.geteuid() == 0 and "OMPI_ALLOW_RUN_AS_ROOT" not in os.environ and _is_open_mpi(program):
        remedy = "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, or be another user"
        yield Finding("mpi as root", "warn", "Open MPI's mpirun refuses to start as root", remedy)


def _probe(program: str, binding: str) -> Iterator[Finding]:
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [program, "-n", str(PROBE_RANKS), sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_LIMIT_S)
    except subprocess.TimeoutExpired:
        value = f"{binding}; {program} -n {PROBE_RANKS} did not end within {PROBE_LIMIT_S} s"
        yield Finding("mpi", "fail", value, "look at its network settings; on one node try UCX_TLS=self,sm")
        return
    words = [line.split(maxsplit=3) for line in done.stdout.splitlines() if line.startswith("probe ")]
    if done.returncode == 0 and words and words[0][1:3] == [str(PROBE_RANKS), "3"]:
        yield Finding("mpi", "ok", f"{binding}, {words[0][3]}, {program} started {PROBE_RANKS} ranks and they spoke")
        return
    sentence = next((line for line in done.stderr.splitlines() if "rwkvmpi: " in line), "")
    if sentence:
        yield Finding("mpi", "fail", sentence.split("rwkvmpi: ", 1)[1])
        return
    last = (done.stderr.strip() or done.stdout.strip() or "nothing was printed").splitlines()[-1]
    value = f"{binding}; {program} -n {PROBE_RANKS} ended with exit code {done.returncode}: {last}"
    yield Finding("mpi", "fail", value, f"try it by hand: {program} -n 2 hostname; else {INSTALL}")


def _this_world() -> Iterator[Finding]:
    """All ranks come here together (the same launcher started them); the findings are rank 0's."""
    facts = launch_facts()
    comm = mpi.world()
    assert comm is not None
    places: list[dict[str, Any]] = comm.allgather(_place())
    hosts = {place["host"] for place in places}
    value = f"{mpi.library_version()}, {facts.launcher} started {comm.size} ranks on {len(hosts)} nodes"
    yield Finding("mpi", "ok", value)
    for key in ("python", "rwkvmpi", "torch", "numpy", "library"):
        kinds = sorted({str(place[key]) for place in places})
        if len(kinds) > 1:
            remedy = "use one installation on all nodes: results are bit-identical only within one build"
            yield Finding("nodes differ", "fail", f"{key}: {', '.join(kinds)}", remedy)
    kinds = sorted({place["processor"] for place in places})
    if len(kinds) > 1:
        remedy = "set RWKVMPI_ISA to the least of them everywhere, or take one kind of node"
        yield Finding("nodes differ", "warn", f"processors: {'; '.join(kinds)}", remedy)
    yield from thread_checks.of_all_ranks(comm)


def _place() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "python": sys.version.split()[0],
        "rwkvmpi": __version__,
        "torch": version("torch"),
        "numpy": version("numpy"),
        "library": mpi.library_version(),
        "processor": processor_name(),
    }


def _is_open_mpi(program: str) -> bool:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=PROBE_LIMIT_S)
    return "Open MPI" in done.stdout + done.stderr
