"""The batch scripts: they parse, their job files are jobs, and what they do around mpirun, with real ranks."""

from __future__ import annotations

import os
import re
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
    places = {path.parent.name for path in JOBS.rglob("*.toml")}
    assert places == {"array", "chain", "cpu-partition", "gpu-roce", "workstation"}
    assert {path.parent.name for path in SCRIPTS} >= places


def test_scripts_of_one_kind_ask_for_the_same_things() -> None:
    """What every reading of a batch script needs: the signal in time, requeueing, and an output that is kept."""
    for script in JOBS.rglob("rwkvmpi.sbatch"):
        lines = script.read_text().splitlines()
        for option in ("--signal=B:USR1@300", "--requeue", "--open-mode=append"):
            assert f"#SBATCH {option}" in lines, script


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("file", sorted(JOBS.rglob("*.toml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_job_files_are_jobs(file: Path) -> None:
    job = make_job(load_job(file), str(file))
    assert job.model.path == "CHANGE_MODEL.pth"


def test_the_readme_names_every_key_and_no_other() -> None:
    text = (JOBS / "README.md").read_text()
    job = make_job({"model": {"path": "m"}, "input": {"paths": ["t"]}}, "here").model_dump()
    keys = {f"{section}.{key}" for section, values in job.items() for key in values}
    named = set(re.findall(r"^\| `([a-z]+\.[a-z_]+)`", text, re.MULTILINE))
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


@pytest.mark.parametrize(
    ("code", "age", "done"),
    [
        (0, 100, True),  # done before: nothing to do
        (3, 100, True),
        (2, 0, False),  # refused: SUCCESS is another job's
        (1, 100, False),  # it did not even start
        (134, 0, True),  # MPI's end went wrong, after the results
    ],
)
def test_whose_success_it_is(tmp_path: Path, code: int, age: int, done: bool) -> None:
    success = tmp_path / "SUCCESS"
    success.touch()
    os.utime(success, (time.time() - age,) * 2)
    body = f"set -u; source {JOBS}/launch.sh; CODE={code} STARTED={int(time.time()) - 10}; is_done {tmp_path}"
    assert (subprocess.run(["bash", "-c", body], check=False).returncode == 0) == done


@pytest.mark.parametrize(
    ("answer", "cancelled"),
    [
        ("JobId=77 JobState=RUNNING Reason=None Dependency=(null)", False),
        ("JobId=77 JobState=COMPLETING Reason=None Dependency=(null)", True),
        ("JobId=77 JobState=CANCELLED Reason=None Dependency=(null)", True),
        ("JobId=77 JobState=COMPLETING Reason=TimeLimit Dependency=(null)", False),  # it could not stop in time
        ("", False),  # the controller is away
    ],
)
def test_what_slurm_ends_itself(tmp_path: Path, answer: str, cancelled: bool) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\n[ \"$*\" = '--oneliner show job 12_3' ] && echo '{answer}' | grep .\n")
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    body = f"set -u; source {JOBS}/launch.sh; is_cancelled"
    known = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert (subprocess.run(["bash", "-c", body], check=False, env=known).returncode == 0) == cancelled


@pytest.mark.parametrize(("counts", "tasks"), [("2(x3),1", "7"), ("4", "4"), ("", "2")])
def test_tasks_are_those_of_the_nodes_that_the_job_has_now(counts: str, tasks: str) -> None:
    body = f"SLURM_TASKS_PER_NODE='{counts}' SLURM_NTASKS=2; source {JOBS}/launch.sh; count_tasks; echo $SLURM_NTASKS"
    assert subprocess.run(["bash", "-c", body], check=True, capture_output=True, text=True).stdout == f"{tasks}\n"


class BatchScript:
    """launch.sh around rank_program.py as a batch script runs it; requeueing is written down instead of done."""

    def __init__(self, folder: Path, how: str, who: int, before: str = "", **settings: str) -> None:
        self.run = folder / "run"
        self.run.mkdir()
        self.requeued = folder / "requeued"
        scontrol = folder / "scontrol"
        scontrol.write_text(f'#!/bin/sh\n[ "$1" != requeue ] || echo "$@" >> {self.requeued}\n')
        scontrol.chmod(0o755)
        ranks = f"{sys.executable} {PROGRAM} '{how}' {who} {self.run}"
        body = f"set -u; source {JOBS}/launch.sh; {before}launch {ranks}; judge_and_requeue {self.run}"
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


def test_a_signal_before_the_ranks_are_started(tmp_path: Path) -> None:
    code, words, requeued = BatchScript(tmp_path, "stop", -1, before="kill -USR1 $$; ").end()
    assert (code, requeued) == (75, "requeue 77\n"), words
    assert "told to stop" in words
    assert not list((tmp_path / "run").iterdir())  # no rank was there


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
