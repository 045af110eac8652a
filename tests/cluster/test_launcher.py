"""The launcher's promise, from the variables that each launcher really sets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rwkvmpi.cluster.launcher import (
    LaunchFacts,
    expand_tasks_per_node,
    launch_facts,
    slurm_seconds_left,
    started_at,
)

OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_RANK": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
HYDRA = {"PMI_SIZE": "6", "PMI_RANK": "4", "MPI_LOCALNRANKS": "3", "MPI_LOCALRANKID": "1"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "6", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = BATCH | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
# mpirun inside a batch script starts one daemon per node with srun: the ranks inherit that step's variables
DAEMONS = BATCH | {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (OPENMPI, "openmpi"),
        (HYDRA, "mpich"),
        (STEP, "slurm"),
        (STEP | {"PMI_SIZE": "6", "PMI_RANK": "4"}, "slurm"),
        (DAEMONS | OPENMPI, "openmpi"),
        (DAEMONS | HYDRA, "mpich"),
    ],
    ids=["mpirun", "hydra", "srun", "srun pmi2", "mpirun in a batch script", "hydra in a batch script"],
)
def test_rank_4_of_6_is_recognised(environ: dict[str, str], launcher: str) -> None:
    environ = environ | {"SLURMD_NODENAME": "n2"}
    assert launch_facts(environ) == LaunchFacts(launcher, rank=4, size=6, local_rank=1, local_size=3, node="n2")


@pytest.mark.parametrize("environ", [{}, BATCH, {"PMI_RANK": "3"}, BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFB)}])
def test_started_by_hand(environ: dict[str, str]) -> None:
    facts = launch_facts(environ)
    assert (facts.launcher, facts.rank, facts.size, facts.local_size) == ("none", 0, 1, 1)


def test_tasks_per_node() -> None:
    assert expand_tasks_per_node("4(x2),3") == [4, 4, 3]
    assert expand_tasks_per_node("") == []
    assert expand_tasks_per_node("many") == []


def test_seconds_left() -> None:
    assert slurm_seconds_left({"SLURM_JOB_END_TIME": "1500"}, now=1000.0) == 500.0
    assert slurm_seconds_left({}, now=1000.0) is None


def test_started_at_tells_the_living_from_the_dead() -> None:
    assert started_at(os.getpid()) == started_at(os.getpid()) is not None
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()  # it has ended or is about to
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert started_at(child.pid) is None  # a zombie
    child.wait()
    assert started_at(child.pid) is None
