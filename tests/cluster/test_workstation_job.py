"""jobs/workstation as shipped, with real ranks: Ctrl-C, TERM, a lost terminal and restarts of its own; one result."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from mpirun_ranks import MPIRUN, environment, wait_until

from rwkvmpi.store.digest import content_digest

JOBS = Path(__file__).parents[2] / "jobs"
LENGTHS = [400_000, 700]
pytestmark = [pytest.mark.parallel, pytest.mark.skipif(MPIRUN is None, reason="no mpirun on this machine")]


class Workstation:
    """A user's folder, a run in it, and the job's script in a terminal of its own (or in none)."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.run, self.log = folder, folder / "runs" / name, folder / f"runs/{name}.log"

    def command(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        programs = os.pathsep.join((str(self.folder), str(Path(str(MPIRUN)).parent), os.environ["PATH"]))
        known = environment() | {"VENV": sys.prefix, "RANKS": "2", "RUN": str(self.run), "PATH": programs}
        return ["jobs/workstation/rwkvmpi.sh", "--commit-every", "4c", *arguments], known

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
        command, known = self.command(*arguments)
        return subprocess.Popen(command, cwd=self.folder, env=known | settings, stdin=subprocess.DEVNULL)

    def start_in_terminal(self) -> tuple[int, int]:
        """(process id, the terminal's other end)"""
        command, known = self.command()
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(self.folder)
            os.execvpe(command[0], command, known)
        return pid, terminal

    def commits(self) -> set[str]:
        return {path.name for path in self.run.glob("commits/*.json")}

    def wait_for_commit(self, before: Collection[str] = ()) -> None:
        wait_until(lambda: bool(self.commits().difference(before)), 60)
        assert not (self.run / "SUCCESS").exists()


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, small_model: Callable[[str], Path], write_documents: Callable[..., Path]
) -> Iterator[Path]:
    """jobs/ copied and filled in, and texts."""
    folder = tmp_path_factory.mktemp("workstation")
    shutil.copytree(JOBS, folder / "jobs")
    write_documents(folder / "texts", LENGTHS)
    file = folder / "jobs/workstation/job.toml"
    text = file.read_text().replace("CHANGE_MODEL.pth", str(small_model("7"))).replace("CHANGE_TEXTS", "texts")
    file.write_text(text)
    program = folder / "rwkvmpi"  # found where the environment has no rwkvmpi installed
    program.write_text('#!/bin/sh\nexec python -m rwkvmpi "$@"\n')
    program.chmod(0o755)
    yield folder
    for pid in ranks(folder / "runs"):  # what a test that failed may have left
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> str:
    command = [sys.executable, "-m", "rwkvmpi", "run", "jobs/workstation/job.toml", "-o", "runs/undisturbed"]
    subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True, timeout=120)
    return content_digest(folder / "runs/undisturbed/results.h5")


def shown(terminal: int) -> str:
    """Everything that came to the terminal, until the last process has closed it."""
    words = b""
    with suppress(OSError):
        while piece := os.read(terminal, 65536):
            words += piece
    return words.decode()


def test_stopped_in_every_way_and_gone_on_with(folder: Path, undisturbed: str) -> None:
    workstation = Workstation(folder, "stopped")
    pid, terminal = workstation.start_in_terminal()
    workstation.wait_for_commit()
    os.write(terminal, b"\x03")
    words = shown(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75, words
    assert "told to stop: the ranks commit and leave" in words
    assert "stopped by signal SIGUSR1" in words

    before = workstation.commits()
    pid, terminal = workstation.start_in_terminal()
    workstation.wait_for_commit(before)
    os.close(terminal)  # the window is closed: hang-up
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75, workstation.log.read_text()

    before = workstation.commits()
    process = workstation.start()
    workstation.wait_for_commit(before)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    log = workstation.log.read_text()
    assert f"process {process.pid}: 2 ranks" in log
    assert log.count("told to stop") == log.count("the same command goes on from here") == 3
    assert not (workstation.run / "SUCCESS").exists()

    assert workstation.start().wait(60) == 0
    assert content_digest(workstation.run / "results.h5") == undisturbed


def test_it_goes_on_by_itself_as_often_as_told(folder: Path, undisturbed: str) -> None:
    """Its ranks die after commits: such a start is worth another one."""
    workstation = Workstation(folder, "dying")
    process = workstation.start(MAX_RESTARTS="1")
    for _ in range(2):
        workstation.wait_for_commit(workstation.commits())
        for pid in ranks(workstation.run):
            os.kill(pid, signal.SIGKILL)
    assert process.wait(60) == 75, workstation.log.read_text()
    assert "restart 1 of 1" in workstation.log.read_text()
    assert workstation.start().wait(60) == 0
    assert content_digest(workstation.run / "results.h5") == undisturbed


def ranks(run: Path) -> list[int]:
    """Process ids of the ranks that work on this run folder, or on one in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if Path(words[0]).name.startswith("python") and any(word.startswith(str(run)) for word in words[1:]):
                found.append(int(process.name))
    return found
