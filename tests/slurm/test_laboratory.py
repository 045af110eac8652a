"""The laboratory itself: a second one beside the first, and that nothing stays behind however it ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_jobs import LABORATORY, wait_until


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where a second laboratory may be; short, because sockets lie in it."""
    parent = tempfile.mkdtemp(prefix="lab-", dir="/tmp")
    yield Path(parent) / "lab"
    subprocess.run(**arguments(Path(parent) / "lab", "down"), check=True, timeout=60)
    shutil.rmtree(parent)


def arguments(folder: Path, *words: str) -> dict[str, object]:
    variables = {name: value for name, value in os.environ.items() if name != "SLURM_CONF"}
    return {"args": [str(LABORATORY), *words], "env": variables | {"SLURM_LAB": str(folder)}, "text": True}


def left(folder: Path) -> list[str]:
    """Command lines of the processes that have this folder in their command line, environment or open files."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            words = (process / "cmdline").read_bytes()
            said = words + (process / "environ").read_bytes()
            files = [os.readlink(file) for file in (process / "fd").iterdir()]
        except OSError:
            continue  # it has ended meanwhile, or is another user's
        if str(folder).encode() in said or any(name.startswith(str(folder)) for name in files):
            found.append(words.decode(errors="replace"))
    return found


def test_a_second_laboratory_runs_a_command_and_leaves_nothing(folder: Path) -> None:
    again = '"$0" up; "$0" run -- true || echo refused $?'
    command = f"set -e; {again}; srun -N2 hostname -s; srun -n1 sleep 100 & sleep 1; exit 7"
    done = subprocess.run(
        **arguments(folder, "run", "-n", "2", "--", "bash", "-c", command, str(LABORATORY)),
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    host = socket.gethostname().split(".")[0]
    assert done.stdout.splitlines()[-3:] == ["refused 125", host, host]
    assert "is up already" in done.stderr
    assert not folder.exists()


@pytest.mark.parametrize("how", ["Ctrl-C", "TERM", "KILL"])
def test_it_ends_with_whoever_started_it(folder: Path, how: str) -> None:
    command = "srun -n1 sleep 1000 & echo begun; exec sleep 1000"
    running = subprocess.Popen(
        **arguments(folder, "run", "-n", "1", "--", "bash", "-c", command), stdout=subprocess.PIPE, process_group=0
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    if how == "Ctrl-C":
        os.killpg(running.pid, signal.SIGINT)
    else:
        running.send_signal(signal.Signals[f"SIG{how}"])
    expected = {"Ctrl-C": 130, "TERM": 143, "KILL": -signal.SIGKILL}
    assert running.wait(30) == expected[how]
    if how == "KILL":
        os.killpg(running.pid, signal.SIGKILL)  # what was its command is nobody's
    wait_until(lambda: not folder.exists() and not left(folder), 30, f"the end of {left(folder)}")


def test_a_folder_with_other_files_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "mine").touch()
    done = subprocess.run(**arguments(folder, "up"), capture_output=True, timeout=30)
    assert done.returncode == 125
    assert "holds other files; name another folder in SLURM_LAB" in done.stderr
    assert (folder / "mine").exists()
