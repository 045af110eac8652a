"""How ranks end together, seen from outside with a real mpirun: exit codes, words on stderr, no survivors."""

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

from rwkvmpi.cluster.launcher import started_at

pytestmark = [pytest.mark.parallel, pytest.mark.skipif(MPIRUN is None, reason="no mpirun on this machine")]


class Job:
    """One mpirun of rank_program.py, with its output in a file."""

    def __init__(self, run: Path, ranks: int, how: str, who: int, wrapper: tuple[str, ...] = ()) -> None:
        self.run, self.ranks, self.output = run, ranks, run / "stderr"
        assert MPIRUN is not None
        with self.output.open("wb") as stream:
            self.process = subprocess.Popen(
                [MPIRUN, "-n", str(ranks), *wrapper, sys.executable, str(PROGRAM), how, str(who), str(run)],
                env=environment(), stdout=stream, stderr=stream,
            )  # fmt: skip

    def started(self) -> list[int]:
        """Process ids of the ranks, once all of them are in MPI."""
        files = [self.run / f"pid_{rank}" for rank in range(self.ranks)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files), 30)
        return [int(file.read_text().split()[0]) for file in files]

    def end(self, seconds: float = 30) -> tuple[int, str]:
        code = self.process.wait(seconds)
        return code, self.output.read_text(errors="replace")

    def log(self, rank: int) -> str:
        return (self.run / "logs" / f"rank_{rank:05d}.log").read_text()


@pytest.mark.parametrize("who", [0, 2, -1])
def test_exit_code_of_any_rank_is_mpiruns(tmp_path: Path, who: int) -> None:
    code, output = Job(tmp_path, 3, "code", who).end()
    assert code == 3, output
    assert "exit code 3 (done, some documents failed)" in output
    assert "Traceback" not in output


def test_success_is_silent(tmp_path: Path) -> None:
    assert Job(tmp_path, 2, "code", 99).end() == (0, "")


def test_a_mistake_of_the_user_is_said_once(tmp_path: Path) -> None:
    code, output = Job(tmp_path, 4, "mistake before MPI", -1).end()
    assert code == 2
    assert output.count("the same mistake on all ranks") == 1
    assert "Traceback" not in output


def test_a_mistake_found_by_one_rank_ends_all(tmp_path: Path) -> None:
    code, output = Job(tmp_path, 3, "user error", 1).end()
    assert code == 2
    assert output.count("[1/3] rwkvmpi: a mistake found by one rank\n") == 1
    assert "Traceback" not in output


@pytest.mark.parametrize("how", ["crash", "crash in a thread"])
def test_a_crash_ends_all_with_rank_host_and_traceback(tmp_path: Path, how: str) -> None:
    job = Job(tmp_path, 3, how, 2)
    job.started()
    before = time.monotonic()
    code, output = job.end(10)
    assert time.monotonic() - before < 5
    assert code == 1
    assert re.search(r"crash on rank 2 of 3 on \S+, process \d+", output)
    assert "ValueError: an accident" in output or "IndexError" in output
    assert "Traceback" in job.log(2)


@pytest.mark.parametrize("target", ["mpirun", "rank"])
def test_usr1_to_mpirun_and_term_to_a_rank_stop_in_good_order(tmp_path: Path, target: str) -> None:
    job = Job(tmp_path, 2, "stop", -1)
    pids = job.started()
    if target == "mpirun":
        job.process.send_signal(signal.SIGUSR1)
    else:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
    code, output = job.end()
    assert code == 75
    name = "SIGUSR1" if target == "mpirun" else "SIGTERM"
    for rank in range(2):
        assert f"stop because of signal {name}" in job.log(rank), output


@pytest.mark.parametrize("how", ["wait", "blocked in MPI"])
def test_kill_9_of_a_rank_ends_the_others(tmp_path: Path, how: str) -> None:
    job = Job(tmp_path, 3, how, -1)
    pids = job.started()
    os.kill(pids[1], signal.SIGKILL)
    code, _ = job.end(10)
    assert code not in (0, 2, 3, 75)
    wait_until(lambda: all(started_at(pid) is None for pid in pids), 5)


@pytest.mark.parametrize("how", ["wait", "blocked in MPI"])
@pytest.mark.parametrize("wrapper", [(), ("sh", "-c", '"$@"; exit $?', "sh")], ids=["direct", "in a shell"])
def test_kill_9_of_mpirun_leaves_no_rank_behind(tmp_path: Path, how: str, wrapper: tuple[str, ...]) -> None:
    job = Job(tmp_path, 2, how, -1, wrapper)
    pids = job.started()
    job.process.kill()
    job.process.wait()
    wait_until(lambda: all(started_at(pid) is None for pid in pids), 8)


def test_a_world_of_one_under_a_launcher_of_four_is_refused(tmp_path: Path) -> None:
    """Open MPI's library starts alone under another launcher: every process would do the whole job."""
    strange = environment() | {"PMI_SIZE": "4", "PMI_RANK": "0", "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "0"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "code", "0", str(tmp_path)], env=strange, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert re.search(
        r"MPICH's mpirun started 4 ranks, but the world of Open MPI v\S+ has 1; .*MPI4PY_LIBMPI", done.stderr
    )
    assert "Traceback" not in done.stderr
