"""Bodies in a device's memory through MPI, with a device whose copies come late; and the trial before that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment, mpirun

from rwkvmpi.cluster.device_probe import SIZES, in_child, pattern

PROGRAM = Path(__file__).with_name("device_ranks.py")
CHILD = [sys.executable, "-m", "rwkvmpi.cluster.device_probe"]


def run(*arguments: object, code: int = 0) -> str:
    launcher = mpirun()
    assert launcher is not None, "no mpirun: install the extra [mpi]"
    command = [launcher, "-n", "2", sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment())
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stderr


@pytest.mark.parallel
@pytest.mark.parametrize("name", ["channels", "errors"])
def test_bodies_on_the_device(name: str) -> None:
    run(name)


@pytest.mark.parallel
def test_a_trial_that_ended_a_job_is_not_repeated(tmp_path: Path) -> None:
    said = run("trial", tmp_path, "yes", code=75)
    assert "rank 1 on " in said
    assert "the same command goes on" in said
    run("trial", tmp_path, "no")


@pytest.mark.parallel
def test_a_child_tries_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the host's memory in place of a GPU's; a crash is told; without an mpirun it sends to itself."""
    tried = in_child(command=[*CHILD, "host"])
    assert (tried.works, tried.ranks, tried.reason) == (True, 2, "")
    crashed = in_child(command=[sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])
    assert not crashed.works
    assert "segmentation fault" in crashed.reason
    monkeypatch.setattr("rwkvmpi.cluster.device_probe._mpirun", lambda: None)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")  # as inside a job
    monkeypatch.setenv("PMIX_RANK", "3")
    alone = in_child(command=[*CHILD, "host"])
    assert (alone.works, alone.ranks) == (True, 1)
    assert not in_child(command=["false"]).works


def test_patterns_tell_ranks_and_sizes_apart() -> None:
    seen = {pattern(rank, size)[:8].tobytes() for rank in range(8) for size in SIZES}
    assert len(seen) == 8 * len(SIZES)
