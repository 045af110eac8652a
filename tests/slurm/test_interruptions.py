"""Jobs that are stopped, displaced or lose a node: queued again, and the result is the undisturbed run's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disturbing import (
    ALONE,
    COMMIT_OFTEN,
    displace,
    hold_while_reading,
    lose,
    nodes,
    signal_batch_script,
    stop_while_reading,
)
from slurm_jobs import Job, Project, laboratory, scancel, scontrol, wait_until

Check = Callable[[Job], None]


def python_with(launch: str, request: pytest.FixtureRequest) -> dict[str, Path]:
    """What to submit with: srun --mpi=pmi2 needs MPICH."""
    return {"venv": request.getfixturevalue("mpich")} if launch == "pmi2" else {}


def test_the_time_limit(project: Project, must_be_whole: Check) -> None:
    job = project.submit("time", launch="mpirun", arguments=COMMIT_OFTEN)
    # Slurm looks every 30 s; the signal comes 300 s before the end, so that an earlier end is the time to send it
    stop_while_reading(job, lambda: scontrol("update", f"jobid={job.number}", "timelimit=5"))
    scontrol("update", f"jobid={job.number}", "timelimit=60")
    must_be_whole(job)
    assert job.restarts() == 1


@pytest.mark.parametrize("launch", ["pmix", "pmi2"])
def test_usr1_to_the_batch_script(
    project: Project, must_be_whole: Check, launch: str, request: pytest.FixtureRequest
) -> None:
    job = project.submit(f"hand-{launch}", launch=launch, arguments=COMMIT_OFTEN, **python_with(launch, request))
    stop_while_reading(job, lambda: signal_batch_script(job))
    must_be_whole(job)
    assert job.restarts() == 1


def test_usr1_twice(project: Project, must_be_whole: Check) -> None:
    job = project.submit("twice", launch="mpirun", arguments=COMMIT_OFTEN)

    def twice() -> None:
        signal_batch_script(job)
        job.wait_for_words("told to stop", 40)
        signal_batch_script(job)
        wait_until(lambda: job.words().count("told to stop") == 2, 40, "told twice to stop")

    stop_while_reading(job, twice)
    must_be_whole(job)
    assert job.restarts() == 1


def test_usr1_to_the_steps(project: Project, must_be_whole: Check) -> None:
    """srun hands it to the ranks, which leave with 75; the batch script hears nothing, and queues the job again."""
    job = project.submit("steps", launch="pmix", arguments=COMMIT_OFTEN)
    hold_while_reading(job)
    scancel("--signal=USR1", job.number)
    job.signal_ranks(signal.SIGCONT)
    must_be_whole(job)
    assert "stopped by signal SIGUSR1" in job.rank_logs()
    assert "told to stop" not in job.words()
    assert job.restarts() == 1


def test_a_signal_before_the_ranks_can_hear_it(project: Project, must_be_whole: Check) -> None:
    job = project.submit("early", launch="mpirun")
    wait_until(job.ranks, 30, "ranks")
    signal_batch_script(job)
    must_be_whole(job)
    assert job.restarts() == 1


@pytest.mark.parametrize("launch", ["mpirun", "pmix"])
def test_a_job_of_higher_priority(project: Project, must_be_whole: Check, launch: str) -> None:
    job = project.submit(f"displaced-{launch}", ALONE, launch=launch, arguments=COMMIT_OFTEN)
    urgent: list[Job] = []
    stop_while_reading(job, lambda: urgent.append(displace(project, job)))
    must_be_whole(job)
    assert job.restarts() == 1
    urgent[0].wait_for("COMPLETED")


@pytest.fixture
def lost_nodes() -> Iterator[list[str]]:
    """The nodes that a test loses; they come back after it."""
    names: list[str] = []
    yield names
    for name in names:
        laboratory("mend", name)


@pytest.mark.parametrize(
    ("launch", "which"),
    [("mpirun", 1), ("pmix", 1), ("pmi2", 1), ("mpirun", 0), ("pmix", 0)],
    ids=lambda value: {0: "of the batch script", 1: "of a rank"}.get(value, value),
)
def test_a_lost_node(
    project: Project,
    must_be_whole: Check,
    lost_nodes: list[str],
    launch: str,
    which: int,
    request: pytest.FixtureRequest,
) -> None:
    """The node's slurmd, its job processes and ranks are killed at once."""
    name = f"lost-{launch}-{which}"
    job = project.submit(name, ALONE, launch=launch, arguments=COMMIT_OFTEN, **python_with(launch, request))
    hold_while_reading(job)
    lost_nodes.append(nodes(job)[which])
    lose(job, lost_nodes[0])
    must_be_whole(job)
    assert job.restarts() == 1


@pytest.mark.parametrize("launch", ["mpirun", "pmix"])
def test_kill_9_of_a_rank(project: Project, must_be_whole: Check, launch: str) -> None:
    job = project.submit(f"killed-{launch}", launch=launch, arguments=COMMIT_OFTEN)
    hold_while_reading(job)
    os.kill(job.ranks()[-1], signal.SIGKILL)
    job.signal_ranks(signal.SIGCONT)
    must_be_whole(job)
    assert job.restarts() == 1
