"""Submitting the shipped job scripts to the laboratory of scripts/slurm_lab.sh, and watching what becomes of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launching import environment

import rwkvmpi

ROOT = Path(__file__).parents[2]
LABORATORY = ROOT / "scripts" / "slurm_lab.sh"
TEXTS = ("argparse", "bisect")  # of Python's standard library: 100 KB
PLACEHOLDERS = {
    "CHANGE_MODEL.pth": "bundled",
    "CHANGE_TEXTS": "texts",
    "CHANGE_PARTITION": "batch",
    "CHANGE_ACCOUNT": "research",
}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until the condition holds; an assertion fails with `what` when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{seconds} s without: {what}"
        time.sleep(0.1)


def laboratory(*arguments: str) -> None:
    """scripts/slurm_lab.sh ARGUMENTS on the laboratory that is up."""
    subprocess.run([str(LABORATORY), *arguments], check=True, timeout=60)


@dataclass
class Job:
    """A submitted job. `states` are those seen so far, each once in a row."""

    number: int
    output: Path
    run: Path
    states: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, str]:
        """What scontrol knows: JobState, Restarts, ExitCode, NodeList, ..."""
        text = _slurm("scontrol", "--oneliner", "show", "job", str(self.number))
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self) -> str:
        state = self.facts()["JobState"]
        if self.states[-1:] != [state]:
            self.states.append(state)
        return state

    def wait_for(self, *states: str, seconds: float = 90) -> None:
        wait_until(lambda: self.state() in states, seconds, f"{states}; it was {self.states}\n{self.words()}")

    def wait_for_commit(self, seconds: float = 60) -> None:
        """Until the first commit lies in the run folder, which must not be the last."""

        def committed() -> bool:
            assert self.state() in ("PENDING", "RUNNING"), f"{self.states}\n{self.words()}"
            return any(self.run.glob("commits/*.json"))

        wait_until(committed, seconds, "a commit")
        assert not (self.run / "SUCCESS").exists()

    def wait_for_words(self, words: str, seconds: float) -> None:
        wait_until(lambda: words in self.words(), seconds, words)

    def words(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def ranks(self) -> list[int]:
        """Process ids of the program's ranks, on all nodes."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if not (Path(words[0].decode()).name.startswith("python") and b"run" in words):
                    continue
                if f"SLURM_JOB_ID={self.number}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue  # it has ended meanwhile
        return found

    def signal_ranks(self, number: signal.Signals) -> None:
        for pid in self.ranks():
            os.kill(pid, number)

    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    def rank_logs(self) -> str:
        return "".join(file.read_text() for file in sorted(self.run.glob("logs/rank_*.log")))


class Project:
    """A user's folder: jobs/ copied, its placeholders filled in, and documents to read."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self._programs = folder, programs
        shutil.copytree(ROOT / "jobs", folder / "jobs")
        for file in (folder / "jobs" / "cpu-partition").iterdir():
            text = file.read_text()
            for placeholder, value in PLACEHOLDERS.items():
                text = text.replace(placeholder, value)
            file.write_text(text)
        texts = folder / "texts"
        texts.mkdir()
        for name in TEXTS:
            shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", texts / f"{name}.txt")

    def submit(
        self, name: str, *options: str, launch: str, venv: Path = Path(sys.prefix), arguments: tuple[str, ...] = ()
    ) -> Job:
        """sbatch OPTIONS jobs/cpu-partition/rwkvmpi.sbatch ARGUMENTS, from this folder."""
        script = "jobs/cpu-partition/rwkvmpi.sbatch"
        sizes = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--job-name={name}")
        variables = self.environment() | {"LAUNCH": launch, "VENV": str(venv)}
        answer = _slurm("sbatch", "--parsable", *sizes, *options, script, *arguments, cwd=self.folder, env=variables)
        number = int(answer.strip())
        return Job(number, self.folder / f"rwkvmpi-{number}.out", self.folder / "runs" / name)

    def environment(self) -> dict[str, str]:
        return environment(
            PATH=f"{self._programs}{os.pathsep}{os.environ['PATH']}", PYTHONPATH=str(Path(rwkvmpi.__file__).parents[1])
        )

    def wrap(self, command: str, *options: str) -> Job:
        """sbatch OPTIONS --wrap COMMAND."""
        number = int(_slurm("sbatch", "--parsable", *options, "--wrap", command, cwd=self.folder).strip())
        return Job(number, self.folder / f"slurm-{number}.out", self.folder)


def scontrol(*arguments: object) -> None:
    _slurm("scontrol", *map(str, arguments))


def scancel(*arguments: object) -> None:
    _slurm("scancel", *map(str, arguments))


def _slurm(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=cwd, env=env)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
