"""Jobs that are stopped, displaced or lose a node: queued again, and the result is the undisturbed run's."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_jobs import ENDED, Job, Project, laboratory, scancel, scontrol, wait_until

COMMIT_OFTEN = ("--commit-every", "20c")
Check = Callable[[Job], None]


def stop_while_reading(job: Job, stop: Callable[[], None], seconds: float = 40) -> None:
    """Hold the ranks after their first commit until the batch script has been told to stop, then let them go on."""
    job.wait_for_commit()
    job.signal_ranks(signal.SIGSTOP)
    stop()
    job.wait_for_words("told to stop", seconds)
    job.signal_ranks(signal.SIGCONT)
    job.wait_for("PENDING", "REQUEUED", *ENDED)
    assert "stopped by signal SIGUSR1" in job.rank_logs()
    assert not (job.run / "SUCCESS").exists()


def test_the_time_limit(project: Project, must_be_whole: Check) -> None:
    job = project.submit("time", launch="mpirun", arguments=COMMIT_OFTEN)
    # Slurm looks every 30 s; the signal comes 300 s before the end, so that an earlier end is the time to send it
    stop_while_reading(job, lambda: scontrol("update", f"jobid={job.number}", "timelimit=5"))
    scontrol("update", f"jobid={job.number}", "timelimit=60")
    must_be_whole(job)
    assert job.restarts() == 1


def test_a_signal_by_hand_under_pmix(project: Project, must_be_whole: Check) -> None:
    job = project.submit("hand-pmix", launch="pmix", arguments=COMMIT_OFTEN)
    stop_while_reading(job, lambda: scancel("--batch", "--signal=USR1", job.number))
    must_be_whole(job)
    assert job.restarts() == 1


def test_a_signal_by_hand_under_pmi2(project: Project, mpich: Path, must_be_whole: Check) -> None:
    job = project.submit("hand-pmi2", launch="pmi2", venv=mpich, arguments=COMMIT_OFTEN)
    stop_while_reading(job, lambda: scancel("--batch", "--signal=USR1", job.number))
    must_be_whole(job)
    assert job.restarts() == 1


def test_a_signal_before_the_ranks_can_hear_it(project: Project, must_be_whole: Check) -> None:
    job = project.submit("early", launch="mpirun")
    wait_until(job.ranks, 30, "ranks")
    scancel("--batch", "--signal=USR1", job.number)
    must_be_whole(job)
    assert job.restarts() == 1


def test_a_job_of_higher_priority(project: Project, must_be_whole: Check) -> None:
    job = project.submit("displaced", launch="mpirun", arguments=COMMIT_OFTEN)
    urgent = []
    everything = ("--partition=urgent", "--nodes=4", "--exclusive")
    stop_while_reading(job, lambda: urgent.append(project.wrap("sleep 2", *everything)))
    must_be_whole(job)
    assert job.restarts() == 1
    assert urgent[0].state() == "COMPLETED"


@pytest.fixture
def lost_node() -> Iterator[list[str]]:
    """The nodes that a test loses; they come back after it."""
    names: list[str] = []
    yield names
    for name in names:
        laboratory("mend", name)


@pytest.mark.parametrize("launch", ["mpirun", "pmix"])
def test_a_lost_node(project: Project, must_be_whole: Check, lost_node: list[str], launch: str) -> None:
    job = project.submit(f"lost-{launch}", launch=launch, arguments=COMMIT_OFTEN)
    job.wait_for_commit()
    job.signal_ranks(signal.SIGSTOP)
    lost_node.append("n2")
    laboratory("lose", "n2")
    job.signal_ranks(signal.SIGCONT)
    must_be_whole(job)
    assert job.restarts() == 1
