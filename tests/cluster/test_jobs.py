"""The batch scripts: they parse, their job files are jobs, and what they do around mpirun, with real ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpirun_ranks import MPIRUN, PROGRAM, environment, wait_until

from rwkvmpi.config import load_job, make_job

JOBS = Path(__file__).parents[2] / "jobs"
SCRIPTS = sorted([*JOBS.rglob("*.sh"), *JOBS.rglob("*.sbatch")])


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) == 4


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("file", sorted(JOBS.rglob("job.toml")), ids=lambda path: path.parent.name)
def test_job_files_are_jobs(file: Path) -> None:
    job = make_job(load_job(file), str(file))
    assert job.model.path == "CHANGE_MODEL.pth"


def test_the_readme_names_every_key_and_no_other() -> None:
    text = (JOBS / "README.md").read_text()
    job = make_job({"model": {"path": "m"}, "input": {"paths": ["t"]}}, "here").model_dump()
    keys = {f"{section}.{key}" for section, values in job.items() for key in values}
    named = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `") and "." in line.split("`")[1]}
    assert named == keys


@pytest.mark.parametrize(
    ("code", "told", "commit_age", "again"),
    [
        (0, "", None, True),  # mpirun lost a node
        (75, "", None, True),
        (2, "yes", 0, False),  # a mistake stays one
        (1, "", None, False),
        (1, "", 100, False),  # a crash, and the commit is of a start before
        (1, "", 0, True),
        (138, "yes", None, True),  # the signal came before the ranks could hear it
    ],
)
def test_what_is_worth_another_start(tmp_path: Path, code: int, told: str, commit_age: int | None, again: bool) -> None:
    started = int(time.time()) - 10
    if commit_age is not None:
        (tmp_path / "commits").mkdir()
        commit = tmp_path / "commits" / "000001.json"
        commit.touch()
        os.utime(commit, (time.time() - commit_age,) * 2)
    body = f"set -u; source {JOBS}/launch.sh; CODE={code} TOLD={told} STARTED={started}; worth_another_start {tmp_path}"
    assert (subprocess.run(["bash", "-c", body], check=False).returncode == 0) == again


class BatchScript:
    """launch.sh around rank_program.py as a batch script runs it; requeueing is written down instead of done."""

    def __init__(self, folder: Path, how: str, who: int, **settings: str) -> None:
        self.run = folder / "run"
        self.run.mkdir()
        self.requeued = folder / "requeued"
        scontrol = folder / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" >> {self.requeued}\n')
        scontrol.chmod(0o755)
        ranks = f"{sys.executable} {PROGRAM} '{how}' {who} {self.run}"
        body = f"set -u; source {JOBS}/launch.sh; launch {ranks}; judge_and_requeue {self.run}"
        assert MPIRUN is not None
        path = f"{folder}:{Path(MPIRUN).parent}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", "-c", body],
            env=environment() | {"PATH": path, "SLURM_NTASKS": "2", "SLURM_JOB_ID": "77"} | settings,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_for_ranks(self) -> None:
        wait_until(lambda: (self.run / "pid_0").exists() and (self.run / "pid_1").exists(), 30)

    def end(self) -> tuple[int, str, str]:
        _, words = self.process.communicate(timeout=40)
        return self.process.returncode, words, self.requeued.read_text() if self.requeued.exists() else ""


parallel = pytest.mark.parallel
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun on this machine")


@parallel
@needs_mpirun
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_script_stops_all_ranks_and_queues_the_job_again(tmp_path: Path, number: int) -> None:
    script = BatchScript(tmp_path, "stop", -1)
    script.wait_for_ranks()
    script.process.send_signal(number)
    code, words, requeued = script.end()
    assert (code, requeued) == (75, "requeue 77\n"), words
    for rank in range(2):
        assert "stop because of signal SIGUSR1" in (script.run / f"logs/rank_{rank:05d}.log").read_text()


@parallel
@needs_mpirun
def test_what_a_person_stopped_is_not_queued_again(tmp_path: Path) -> None:
    script = BatchScript(tmp_path, "stop", -1)
    script.wait_for_ranks()
    (script.run / "STOP").touch()
    code, words, requeued = script.end()
    assert (code, requeued) == (75, ""), words


@parallel
@needs_mpirun
@pytest.mark.parametrize(
    ("how", "who", "success", "settings", "expected"),
    [
        ("code", 1, True, {}, (0, "")),  # exit code 3 with results: some documents failed
        ("code", 9, False, {}, (75, "requeue 77\n")),  # exit code 0 without results: mpirun lost a node
        ("code", 9, False, {"SLURM_RESTART_COUNT": "4", "MAX_RESTARTS": "4"}, (75, "")),
        ("crash", 1, False, {}, (1, "")),
        ("mistake before MPI", -1, False, {}, (2, "")),
    ],
    ids=["some failed", "node lost", "too often", "crash", "mistake"],
)
def test_success_is_judged_by_the_file(
    tmp_path: Path, how: str, who: int, success: bool, settings: dict[str, str], expected: tuple[int, str]
) -> None:
    script = BatchScript(tmp_path, how, who, **settings)
    if success:
        (script.run / "SUCCESS").touch()
    code, words, requeued = script.end()
    assert (code, requeued) == expected, words
