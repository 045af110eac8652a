"""Jobs that start many times, with other numbers of nodes, or must not start again."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from disturbing import COMMIT_OFTEN, hold_while_reading, newest_commit, resize, signal_batch_script, stop_while_reading
from slurm_jobs import ENDED, Job, Project, scancel, wait_until
from table import grids, record

Check = Callable[[Job], None]


def wait_for_restart(job: Job, number: int) -> None:
    wait_until(lambda: job.restarts() >= number, 90, f"restart {number} after {job.states}")


def test_six_time_slots(project: Project, must_be_whole: Check) -> None:
    """Each slot ends by --max-time, after its first commit: how fast the machine is does not matter."""
    slot = 6.0
    job = project.submit("slots", launch="mpirun", arguments=("--commit-every", "2c", "--max-time", f"{slot:.0f}s"))
    commit = 0
    for restart in range(1, 6):
        hold_while_reading(job, commit)
        time.sleep(slot)
        job.signal_ranks(signal.SIGCONT)
        wait_for_restart(job, restart)
        commit = newest_commit(job.run)  # stopping made one more
    job.wait_for(*ENDED, seconds=400)  # a slow machine needs more slots
    must_be_whole(job)
    assert job.restarts() >= 5
    assert job.rank_logs().count(f"stopped by the time limit of {slot:.0f}s") == job.restarts()


def test_other_numbers_of_nodes(project: Project, must_be_whole: Check) -> None:
    job = project.submit("nodes", launch="pmix", arguments=("--commit-every", "10c"))
    commit = 0
    for count in (1, 3):
        stop_while_reading(job, lambda: signal_batch_script(job), after=commit)
        resize(job, count)
        commit = newest_commit(job.run)
    must_be_whole(job)
    assert job.restarts() == 2
    assert [stages * ring * replicas for stages, ring, replicas in grids(job)] == [2, 1, 3]


def test_cancelled_and_submitted_again(project: Project, must_be_whole: Check) -> None:
    job = project.submit("again", launch="mpirun", arguments=COMMIT_OFTEN)
    hold_while_reading(job)
    scancel(job.number)
    job.signal_ranks(signal.SIGCONT)
    job.wait_for("CANCELLED")
    assert job.restarts() == 0
    second = project.submit("again", launch="pmix", arguments=COMMIT_OFTEN)
    must_be_whole(second)
    assert "going on from commit" in second.words()


def ends_at_once(job: Job) -> None:
    """The job must fail with exit code 2 and must not be queued again."""
    job.wait_for(*ENDED)
    assert job.states[-1] == "FAILED", job.words()
    assert job.facts()["ExitCode"] == "2:0"
    assert job.restarts() == 0
    assert "queueing" not in job.words()


def test_a_run_folder_in_use(project: Project, must_be_whole: Check, request: pytest.FixtureRequest) -> None:
    first = project.submit("same", launch="mpirun", arguments=COMMIT_OFTEN)
    hold_while_reading(first)
    second = project.submit("same", launch="pmix", arguments=COMMIT_OFTEN)
    ends_at_once(second)
    record(request, second)
    assert any(f"is in use by process {rank} " in second.words() for rank in first.ranks())
    assert f"Slurm job {first.number}" in second.words()
    first.signal_ranks(signal.SIGCONT)
    must_be_whole(first)
    assert first.restarts() == 0


def test_wrong_input(project: Project, request: pytest.FixtureRequest) -> None:
    job = project.submit("wrong-input", launch="pmix", arguments=("--set", 'input.paths=["nowhere"]'))
    ends_at_once(job)
    record(request, job)
    assert "nowhere" in job.words()


def test_no_more_restarts_than_allowed(project: Project, must_be_whole: Check, request: pytest.FixtureRequest) -> None:
    job = project.submit(
        "restarts", launch="mpirun", arguments=("--commit-every", "10c"), variables={"MAX_RESTARTS": "1"}
    )
    stop_while_reading(job, lambda: signal_batch_script(job))
    stop_while_reading(job, lambda: signal_batch_script(job), after=newest_commit(job.run))
    job.wait_for(*ENDED)
    record(request, job)
    assert job.states[-1] == "FAILED"
    assert job.facts()["ExitCode"] == "75:0"
    assert job.restarts() == 1
    assert "not done after 1 restarts; submit the same job again to go on" in job.words()
    must_be_whole(project.submit("restarts", launch="mpirun"))
