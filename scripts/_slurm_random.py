"""Runs in the Slurm laboratory that are interrupted at random moments, in random ways, on random grids."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disturbing import ALONE, displace, newest_commit, nodes, signal_batch_script
from slurm_jobs import ENDED, ROOT, Job, Project, laboratory, scancel, scontrol
from table import observed

from rwkvmpi.store.digest import content_digest

COMMIT_EVERY, CHUNK = 40, 256
DOCUMENTS = (200_000, 30_000, 1, 31, 33, 1024, 0, 5000)  # bytes, and so tokens: the model reads bytes
COMMITS = sum(DOCUMENTS) // CHUNK // COMMIT_EVERY
GRIDS = {
    2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)],
    3: [(3, 1, 1), (1, 3, 1), (1, 1, 3)],
    4: [(2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 4, 1)],
}
ACTIONS = (
    "USR1 to the batch script",
    "USR1 to the steps",
    "time limit",
    "job of higher priority",
    "lost node of the batch script",
    "lost node of ranks",
    "kill -9 of a rank",
    "kill -9 of the launcher",
    "scancel",
)
LIMIT_S = 600.0
MODEL = ("--layers", "4", "--width", "64", "--vocab", "256", "--head-size", "32", "--seed", "3")
JOB_FILE = """
[model]
path = "{model}"
device = "cpu"
dtype = "float32"
chunk = {chunk}
[input]
paths = ["{documents}"]
[grid]
stages = {grid[0]}
ring = {grid[1]}
replicas = {grid[2]}
[run]
commit_every = "{commit_every}c"
"""


@dataclass
class Trial:
    """One run: what is to happen to it, and what became of it."""

    name: str
    launch: str
    ranks: int
    hosts: int
    actions: list[str]
    moments: list[tuple[int, float]]  # the commit to wait for, or 0: while it starts; seconds more
    grids: list[tuple[int, int, int]]  # of the first start, and after each action
    pick: list[int]  # which of the ranks is killed
    jobs: list[Job] = field(default_factory=list)
    happened: list[str] = field(default_factory=list)


class RandomRuns:
    """One model, one set of documents, one undisturbed run, many disturbed ones in `folder`."""

    def __init__(self, folder: Path, project: Project, mpich: Path | None, side_by_side: int) -> None:
        self.folder, self.project, self.mpich, self.side_by_side = folder, project, mpich, side_by_side
        self.model, self.documents = folder / "model.safetensors", folder / "documents"
        chance = random.Random(0)
        self.documents.mkdir()
        for number, size in enumerate(DOCUMENTS):
            text = bytes(chance.choice(b"abcdefghij   \n,.") for _ in range(size))
            (self.documents / f"d{number:02d}.txt").write_bytes(text)
        self._rwkvmpi("random-model", "7", *MODEL, "-o", self.model)
        alone = folder / "alone.toml"
        self._write_job(alone, (1, 1, 1))
        self._rwkvmpi("run", alone, "-o", folder / "undisturbed")
        self.undisturbed = content_digest(folder / "undisturbed" / "results.h5")

    def run(self, count: int, seed: int, tell: Callable[[dict[str, object]], None]) -> list[dict[str, object]]:
        """Do so many runs, several side by side; a row of the table for each, told as soon as it is there."""
        chance = random.Random(seed)
        trials = [self._plan(number, chance) for number in range(1, count + 1)]

        def one(trial: Trial) -> dict[str, object]:
            row = self._do(trial)
            while not row["interrupted"] and "error" not in row:  # it was done before the moment came: once more
                shutil.rmtree(self.project.folder / "runs" / trial.name)
                trial.jobs, trial.happened = [], []
                row = self._do(trial)
            tell(row)
            return row

        with ThreadPoolExecutor(self.side_by_side) as pool:
            return list(pool.map(one, trials))

    def _plan(self, number: int, chance: random.Random) -> Trial:
        launch = chance.choice(["mpirun", "pmix", "pmi2"] if self.mpich else ["mpirun", "pmix"])
        ranks = chance.choice([2, 2, 3, 4])
        # every action comes first as often as any other; some runs are interrupted twice
        first = ACTIONS[number % len(ACTIONS)]
        actions = [first, *chance.sample(ACTIONS, chance.choice([0, 0, 1]))]
        moments = [
            (0 if chance.random() < 0.2 else chance.randrange(1, COMMITS * 3 // 4), chance.uniform(0, 0.4))
            for _ in actions
        ]
        moments = [(commit, seconds if commit else 10 * seconds) for commit, seconds in moments]
        grids = [chance.choice(GRIDS[ranks]) for _ in range(len(actions) + 1)]
        pick = [chance.randrange(100) for _ in actions]
        hosts = 2 if ranks == 4 else ranks
        return Trial(f"random-{number:02d}", launch, ranks, hosts, actions, sorted(moments), grids, pick)

    def _do(self, trial: Trial) -> dict[str, object]:
        begun = time.monotonic()
        lost: list[str] = []
        try:
            self._start(trial, trial.grids[0])
            for number, action in enumerate(trial.actions):
                if self._wait_for_moment(trial, trial.moments[number]):
                    self._act(trial, action, trial.pick[number], lost)
                    trial.happened.append(action)
                    self._go_on(trial, trial.grids[number + 1], begun)
            error = self._finish(trial, begun)
        except Exception as trouble:  # a row that says so is worth more than the end of all runs
            if not trial.jobs:
                raise
            error = f"{type(trouble).__name__}: {trouble}"
        finally:
            for node in lost:
                laboratory("mend", node)
        return self._row(trial, error, time.monotonic() - begun)

    def _row(self, trial: Trial, error: str, seconds: float) -> dict[str, object]:
        results = self.project.folder / "runs" / trial.name / "results.h5"
        digest = content_digest(results) if not error else ""
        parts = [observed(job, digest, digest == self.undisturbed) for job in trial.jobs]
        row: dict[str, Any] = {"scenario": trial.name, "action": ", ".join(trial.happened) or "none", **parts[-1]}
        row["grids"] = " ".join(str(part["grids"]) for part in parts)
        row["states"] = " ".join(str(part["states"]) for part in parts)
        moments = ", ".join(f"commit {commit} + {seconds:.2f} s" for commit, seconds in trial.moments)
        row["restarts"] = sum(int(str(part["restarts"])) for part in parts)
        row |= {"submitted": len(parts), "hosts": trial.hosts, "moments": moments, "seconds": round(seconds, 1)}
        row["interrupted"] = row["restarts"] + len(parts) - 1
        return row | ({"error": error} if error else {})

    def _start(self, trial: Trial, grid: tuple[int, int, int]) -> None:
        job_file = self.folder / f"{trial.name}.toml"
        self._write_job(job_file, grid)
        venv = self.mpich if trial.launch == "pmi2" and self.mpich else Path(sys.prefix)
        sizes = (f"--nodes={trial.hosts}", f"--ntasks-per-node={trial.ranks // trial.hosts}", ALONE)
        job = self.project.submit(trial.name, *sizes, launch=trial.launch, venv=venv, variables={"JOB": str(job_file)})
        trial.jobs.append(job)

    def _wait_for_moment(self, trial: Trial, moment: tuple[int, float]) -> bool:
        """False: the run was over before the moment came."""
        job, (commit, seconds) = trial.jobs[-1], moment
        deadline = time.monotonic() + LIMIT_S
        while job.state() != "RUNNING" or newest_commit(job.run) < commit:
            if job.states[-1] in ENDED or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        time.sleep(seconds)
        return job.state() == "RUNNING"

    def _act(self, trial: Trial, action: str, pick: int, lost: list[str]) -> None:
        job = trial.jobs[-1]
        match action:
            case "USR1 to the batch script":
                signal_batch_script(job)
            case "USR1 to the steps":
                scancel("--signal=USR1", job.number)
            case "time limit":  # the signal comes 300 s before the end; Slurm looks every 30 s
                job.signal_ranks(signal.SIGSTOP)
                scontrol("update", f"jobid={job.number}", "timelimit=5")
                with contextlib.suppress(AssertionError):
                    job.wait_for_words("told to stop", 60)
                job.signal_ranks(signal.SIGCONT)
            case "job of higher priority":
                displace(self.project, job)
            case "lost node of the batch script" | "lost node of ranks":
                mine = nodes(job)
                lost.append(mine[0] if action.endswith("script") else mine[1 + pick % (len(mine) - 1)])
                laboratory("lose", lost[-1])
            case "kill -9 of a rank":
                kill(job.ranks(), pick)
            case "kill -9 of the launcher":
                kill(launchers(job.number))
            case "scancel":
                scancel(job.number)

    def _go_on(self, trial: Trial, grid: tuple[int, int, int], begun: float) -> None:
        """Wait until the job is queued again or over; from then on another grid."""
        job = trial.jobs[-1]
        starts = job.restarts()
        while job.state() in ("RUNNING", "COMPLETING") and job.restarts() == starts:
            if time.monotonic() > begun + LIMIT_S:
                return
            time.sleep(0.1)
        self._write_job(self.folder / f"{trial.name}.toml", grid)
        if job.facts()["TimeLimit"] == "00:05:00":
            scontrol("update", f"jobid={job.number}", "timelimit=60")
        if job.states[-1] in ENDED and job.states[-1] != "COMPLETED":
            self._start(trial, grid)

    def _finish(self, trial: Trial, begun: float) -> str:
        """Wait for success, submitting again what has ended without it, as a person would; what is wrong, or ''."""
        while True:
            state = trial.jobs[-1].state()
            if state == "COMPLETED":
                return "" if (trial.jobs[-1].run / "SUCCESS").exists() else "COMPLETED without SUCCESS"
            if state in ENDED:
                if len(trial.jobs) > len(trial.actions) + 1:
                    return f"{state}: {trial.jobs[-1].words()[-1000:]}"
                self._start(trial, trial.grids[-1])
            if time.monotonic() > begun + LIMIT_S:
                return f"not done after {LIMIT_S:.0f} s: {trial.jobs[-1].words()[-1000:]}"
            time.sleep(0.1)

    def _write_job(self, file: Path, grid: tuple[int, int, int]) -> None:
        values = {"model": self.model, "documents": self.documents, "chunk": CHUNK, "commit_every": COMMIT_EVERY}
        temporary = file.with_suffix(".new")
        temporary.write_text(JOB_FILE.format(**values, grid=grid))
        os.replace(temporary, file)

    def _rwkvmpi(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "rwkvmpi", *map(str, arguments)]
        subprocess.run(command, env=self.project.environment(), cwd=ROOT, check=True, capture_output=True)


def launchers(job: int | str) -> list[int]:
    """Process ids of the mpirun or srun that a batch script has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program = Path(os.readlink(folder / "exe")).name
            variables = (folder / "environ").read_bytes().split(b"\0")
            if program in ("mpirun", "prterun", "mpiexec", "mpiexec.hydra", "srun") and (
                f"SLURM_JOB_ID={job}".encode() in variables
            ):
                found.append(int(folder.name))
    return found


def kill(processes: list[int], pick: int | None = None) -> None:
    """kill -9 of one of the processes, or of all; some may just have ended."""
    if pick is not None and processes:
        processes = [sorted(processes)[pick % len(processes)]]
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
