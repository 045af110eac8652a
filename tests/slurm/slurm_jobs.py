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
from collections.abc import Callable, Mapping
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
    "CHANGE_GROWN_TEXTS": "grown",
    "CHANGE_PARTITION": "batch",
    "CHANGE_ACCOUNT": "research",
    "CHANGE_DEVICES": "all",
    "CHANGE_GID_INDEX": "3",
    "CHANGE_TRAFFIC_CLASS": "106",
}
# small ones, where the parts or the links of a job count, or the GPU is emulated
OWN = {
    "array": {"CHANGE_TEXTS": "corpus"},
    "chain": {"CHANGE_TEXTS": "some"},
    "gpu-roce": {"CHANGE_TEXTS": "few", "CHANGE_MODEL.pth": "small.pth"},
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
    """A submitted job, or "12_3", element 3 of the array 12. `states` are those seen so far, each once in a row."""

    number: int | str
    output: Path
    run: Path
    launch: str = ""
    states: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, str]:
        """What scontrol knows: JobState, Restarts, ExitCode, NodeList, ..."""
        text = _answer("scontrol", "--oneliner", "show", "job", str(self.number))
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
        array, _, element = str(self.number).partition("_")
        names = {f"SLURM_JOB_ID={array}"}
        if element:
            names = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={element}"}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if not (Path(words[0].decode()).name.startswith("python") and b"run" in words):
                    continue
                if names <= set((folder / "environ").read_bytes().decode(errors="replace").split("\0")):
                    found.append(int(folder.name))
            except OSError:
                continue  # it has ended meanwhile
        return found

    def signal_ranks(self, number: signal.Signals) -> None:
        for pid in self.ranks():
            os.kill(pid, number)

    def continue_ranks(self) -> None:
        self.signal_ranks(signal.SIGCONT)

    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    def rank_logs(self) -> str:
        return "".join(file.read_text() for file in sorted(self.run.glob("logs/rank_*.log")))


class Project:
    """A user's folder: jobs/ copied, its placeholders filled in, and documents to read."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self._programs = folder, programs
        shutil.copytree(ROOT / "jobs", folder / "jobs")
        for file in filter(Path.is_file, (folder / "jobs").glob("*/*")):
            text = file.read_text()
            for placeholder, value in (PLACEHOLDERS | OWN.get(file.parent.name, {})).items():
                text = text.replace(placeholder, value)
            file.write_text(text)
        self.documents("texts", dict.fromkeys(TEXTS))

    def documents(self, folder: str, sizes: dict[str, int | None]) -> None:
        """Modules of Python's standard library as documents: the first so many bytes of each, or all."""
        (self.folder / folder).mkdir(exist_ok=True)
        for name, size in sizes.items():
            source = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
            (self.folder / folder / f"{name}.txt").write_bytes(source.read_bytes()[:size])

    def copy_place(self, name: str, other: str) -> None:
        """A second folder of jobs, to be changed; its script finds its own files."""
        shutil.copytree(self.folder / "jobs" / name, self.folder / "jobs" / other)
        script = self.folder / "jobs" / other / "rwkvmpi.sbatch"
        script.write_text(script.read_text().replace(f"jobs/{name}/", f"jobs/{other}/"))

    def submit(
        self,
        name: str,
        *options: str,
        launch: str,
        venv: Path = Path(sys.prefix),
        arguments: tuple[str, ...] = (),
        place: str = "cpu-partition",
        variables: Mapping[str, str] | None = None,
    ) -> Job:
        """sbatch OPTIONS jobs/PLACE/rwkvmpi.sbatch ARGUMENTS, from this folder."""
        script = f"jobs/{place}/rwkvmpi.sbatch"
        sizes = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--job-name={name}")
        known = self.environment() | {"LAUNCH": launch, "VENV": str(venv), **(variables or {})}
        answer = _answer("sbatch", "--parsable", *sizes, *options, script, *arguments, cwd=self.folder, env=known)
        number = int(answer.strip())
        return Job(number, self.folder / f"rwkvmpi-{number}.out", self.folder / "runs" / name, launch)

    def start(self, *command: str, variables: Mapping[str, str] | None = None, seconds: float = 200) -> str:
        """A program of the user's, as jobs/array/submit.sh, in this folder, to its end; its words."""
        known = self.environment() | {"VENV": sys.prefix, **(variables or {})}
        return _answer(*command, cwd=self.folder, env=known, seconds=seconds)

    def environment(self) -> dict[str, str]:
        return environment(
            PATH=f"{self._programs}{os.pathsep}{os.environ['PATH']}", PYTHONPATH=str(Path(rwkvmpi.__file__).parents[1])
        )

    def wrap(self, command: str, *options: str) -> Job:
        """sbatch OPTIONS --wrap COMMAND."""
        number = int(_answer("sbatch", "--parsable", *options, "--wrap", command, cwd=self.folder).strip())
        return Job(number, self.folder / f"slurm-{number}.out", self.folder)


def scontrol(*arguments: object) -> None:
    _answer("scontrol", *map(str, arguments))


def scancel(*arguments: object) -> None:
    _answer("scancel", *map(str, arguments))


def _answer(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None, seconds: float = 60) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, cwd=cwd, env=env)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
