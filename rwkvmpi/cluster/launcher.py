"""What the launcher promised, read from the environment alone: no MPI is loaded to find out.

mpirun (Open MPI, MPICH and its relatives) and srun tell every process its place in variables. They are believed
for the number of ranks to expect, and MPI is checked against them: a world of one rank under a launcher that
started eight is the commonest wrong set-up of all, eight programs that each do the whole job.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# names as the kernel keeps them: 15 characters
LAUNCHER_PROGRAMS = frozenset(
    (
        "mpirun",
        "mpiexec",
        "mpiexec.hydra",
        "orterun",
        "orted",
        "prterun",
        "prted",
        "prte",
        "hydra_pmi_proxy",
        "slurmstepd",
    )
)


@dataclass(frozen=True)
class LaunchFacts:
    """One process's place as its launcher told it. `size` is what the launcher started, whatever MPI says."""

    launcher: str  # "openmpi", "mpich" (hydra, PALS), "slurm" (srun), or "none"
    rank: int
    size: int
    local_rank: int
    local_size: int
    node: str


def launch_facts(environ: Mapping[str, str] | None = None) -> LaunchFacts:
    """Read the launcher's variables. Started by hand: launcher "none", rank 0 of 1.

    An mpirun inside a Slurm job starts its daemons with srun, so that both kinds of variables are there; mpirun's
    own are asked first. A batch script itself has SLURM_NTASKS but no step: it counts as started by hand.
    """
    env = os.environ if environ is None else environ
    node = env.get("SLURMD_NODENAME") or socket.gethostname()
    if "OMPI_COMM_WORLD_SIZE" in env:
        return LaunchFacts(
            "openmpi",
            _number(env, "OMPI_COMM_WORLD_RANK", 0),
            _number(env, "OMPI_COMM_WORLD_SIZE", 1),
            _number(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0),
            _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1),
            node,
        )
    in_step = _in_slurm_step(env)
    # srun --mpi=pmi2 sets PMI_SIZE too, but only hydra counts the ranks of a node in MPI_LOCALNRANKS
    if "PMI_SIZE" in env and (not in_step or "MPI_LOCALNRANKS" in env):
        size = _number(env, "PMI_SIZE", 1)
        local_size = _number(env, "MPI_LOCALNRANKS", _number(env, "PALS_LOCAL_SIZE", 0))
        local_rank = _number(env, "MPI_LOCALRANKID", _number(env, "PALS_LOCAL_RANKID", 0))
        # without a word about the node, one node is the assumption that gives each rank the fewest cores
        return LaunchFacts("mpich", _number(env, "PMI_RANK", 0), size, local_rank, local_size or size, node)
    if in_step:
        size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
        counts = expand_tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "")))
        node_index = _number(env, "SLURM_NODEID", 0)
        local_size = counts[node_index] if node_index < len(counts) else size
        return LaunchFacts(
            "slurm", _number(env, "SLURM_PROCID", 0), size, _number(env, "SLURM_LOCALID", 0), local_size, node
        )
    return LaunchFacts("none", 0, 1, 0, 1, node)


def expected_world_size(environ: Mapping[str, str] | None = None) -> int:
    """How many ranks MPI's world must have; 1 when started by hand."""
    return launch_facts(environ).size


def expand_tasks_per_node(text: str) -> list[int]:
    """Slurm's short form of tasks per node: '4(x2),3' -> [4, 4, 3]. Anything else gives an empty list."""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def slurm_job_id(environ: Mapping[str, str] | None = None) -> str | None:
    """The Slurm job that this process belongs to."""
    return (os.environ if environ is None else environ).get("SLURM_JOB_ID") or None


def slurm_seconds_left(environ: Mapping[str, str] | None = None, now: float | None = None) -> float | None:
    """Seconds until Slurm ends this job (SLURM_JOB_END_TIME), or None where nobody said."""
    env = os.environ if environ is None else environ
    end = _number(env, "SLURM_JOB_END_TIME", 0)
    return end - (time.time() if now is None else now) if end > 0 else None


def launcher_ancestors() -> list[int]:
    """Process ids from this process's parent up to the launcher's daemon; only the parent if none is recognised.

    A rank may be started through wrappers (`mpirun bash -c ...`, `numactl`, a debugger), so the launcher need not
    be the parent. Empty when started by hand.
    """
    if launch_facts().launcher == "none":
        return []
    chain: list[int] = []
    pid = os.getppid()
    while pid > 0:
        chain.append(pid)
        name, parent = _process(pid)
        if name in LAUNCHER_PROGRAMS:
            return chain
        pid = parent
    return chain[:1]


def started_at(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None when it is gone or only waits to be buried.

    A process id may be given to another process later; id and start time together are one process.
    """
    fields = _stat(pid)
    return None if fields is None or fields[1] in "ZX" else int(fields[20])


def _process(pid: int) -> tuple[str, int]:
    """(program name, parent's id) of a process; ('', 0) when it is gone or hidden."""
    fields = _stat(pid)
    return (fields[0], int(fields[2])) if fields else ("", 0)


def _stat(pid: int) -> list[str] | None:
    """/proc/PID/stat from the program's name on (which may hold blanks and brackets): name, state, parent, ..."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        name, rest = text.split("(", 1)[1].rsplit(")", 1)
    except (OSError, IndexError, ValueError):
        return None
    return [name, *rest.split()]


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    return step.isdigit() and int(step) < 0xFFFFFFF0  # the batch script itself is step 0xfffffffb, not a step of tasks


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        return default
