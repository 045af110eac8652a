"""A job watched by its user: in the queue, while it reads, between its starts, to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from disturbing import COMMIT_OFTEN, signal_batch_script, stop_while_reading
from slurm_jobs import Job, Project

Check = Callable[[Job], None]


def test_a_watched_job_from_before_its_start_to_its_end(project: Project, must_be_whole: Check, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "rwkvmpi", "watch", "runs/watched", "--json", "--every", "0.2"]
    with (
        open(tmp_path / "told", "w+") as told,
        subprocess.Popen(program, cwd=project.folder, env=project.environment(), stdout=told) as watch,
    ):
        job = project.submit("watched", launch="mpirun", arguments=COMMIT_OFTEN)
        stop_while_reading(job, lambda: signal_batch_script(job))
        must_be_whole(job)
        assert watch.wait(timeout=60) == 0
        told.seek(0)
        moments = [json.loads(line) for line in told]
    assert (moments[0]["state"], moments[-1]["state"]) == ("not started", "finished")
    assert moments[-1]["ended"]["code"] == 0
    attempts = [moment["attempt"] for moment in moments if moment["state"] == "running" and moment["attempt"]]
    assert sorted(set(attempts)) == [1, 2]
    assert "stopped" in {moment["state"] for moment in moments}
    assert {moment["slurm_job"] for moment in moments if moment["ranks"]} <= {str(job.number), None}
    assert "RUNNING" in {moment["slurm_state"] for moment in moments}
    assert len(moments[-1]["ranks"]) == 2
    assert all(moment["ended"] is None for moment in moments[:-1])
