"""Ways to disturb a job of the laboratory at a moment when it is reading."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from slurm_jobs import ENDED, Job, Project, laboratory, scancel, scontrol, wait_until

COMMIT_OFTEN = ("--commit-every", "20c")
ALONE = "--exclusive"  # a node that a test takes away must not be another test's


def newest_commit(run: Path) -> int:
    """The number of the last commit of a run folder; 0 before the first."""
    return max((int(file.stem) for file in run.glob("commits/*.json")), default=0)


def hold_while_reading(job: Job, after: int = 0, seconds: float = 120) -> None:
    """Stop all ranks once there is a commit after `after`; the document must not be over."""
    deadline = time.monotonic() + seconds
    ask = 0.0
    while newest_commit(job.run) <= after:
        now = time.monotonic()
        if now > ask:  # not every time: that takes longer than a commit
            assert job.state() in ("PENDING", "RUNNING", "COMPLETING"), f"{job.states}\n{job.words()}"
            ask = now + 1
        assert now < deadline, f"{seconds} s without a commit after {after}\n{job.words()}"
        time.sleep(0.01)
    job.signal_ranks(signal.SIGSTOP)
    assert not (job.run / "SUCCESS").exists()


def stop_while_reading(job: Job, stop: Callable[[], object], seconds: float = 40, after: int = 0) -> None:
    """Hold the ranks after a commit until the batch script has been told to stop, then let them go on."""
    told = job.words().count("told to stop")
    hold_while_reading(job, after)
    stop()
    wait_until(lambda: job.words().count("told to stop") > told, seconds, "told to stop")
    job.signal_ranks(signal.SIGCONT)
    job.wait_for("PENDING", "REQUEUED", *ENDED)
    assert "stopped by signal SIGUSR1" in job.rank_logs()
    assert not (job.run / "SUCCESS").exists()


def nodes(job: Job) -> list[str]:
    """Names of the nodes that a job has now; the first one is the batch script's."""
    listed = job.facts()["NodeList"]
    done = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True)
    return done.stdout.split()


def signal_batch_script(job: Job) -> None:
    """What --signal=B:USR1@... does, at once."""
    scancel("--batch", "--signal=USR1", job.number)


def displace(project: Project, job: Job) -> Job:
    """Submit a job of higher priority that takes just this job's nodes."""
    mine = nodes(job)
    return project.wrap("sleep 1", "--partition=urgent", f"--nodes={len(mine)}", f"--nodelist={','.join(mine)}", ALONE)


def lose(job: Job, node: str) -> None:
    """Kill everything on a node, while the ranks are held; those of other nodes go on."""
    laboratory("lose", node)
    job.signal_ranks(signal.SIGCONT)


def resize(job: Job, count: int) -> None:
    """Give a job that waits to start again another number of nodes, with one rank each."""
    job.wait_for("PENDING")
    scontrol("update", f"jobid={job.number}", f"numnodes={count}-{count}", f"numtasks={count}")
