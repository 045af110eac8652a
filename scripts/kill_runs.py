"""Kills runs of rwkvmpi at random moments and checks that nothing is lost.

    python scripts/kill_runs.py --kills 60 --seed 1

Every trial starts a job on a random grid, kills a random rank, mpirun, or every process of it with SIGKILL, goes on
with another grid, and so on, until the job is done. The results must be those of an undisturbed run, bit for bit,
and 10 s after each kill no process of the job may be left. Prints a table, writes JSON with --json, and exits 1
when anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil

MARK = "RWKVMPI_KILL_MARK"  # in the environment of every process of a trial, children included
ORPHAN_LIMIT_S = 10.0
GRIDS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2)]
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--kills-per-run", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bytes", type=int, default=400_000, help="size of the longest document")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rwkvmpi-kill-") as folder:
        return Trials(Path(folder), arguments).run()


class Trials:
    """One model, one set of documents, one undisturbed run, many disturbed ones."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.arguments = folder, arguments
        self.random = random.Random(arguments.seed)
        self.model = folder / "model.safetensors"
        self.documents = folder / "documents"
        self.kills: list[dict[str, object]] = []

    def run(self) -> int:
        self.make_input()
        start = time.monotonic()
        reference = self.finish(self.folder / "undisturbed", (1, 1, 1))
        duration = time.monotonic() - start
        print(f"undisturbed: {duration:.1f} s, results {reference[:16]}", flush=True)
        wrong = trials = 0
        while len(self.kills) < self.arguments.kills:
            trials += 1
            run = self.folder / f"run{trials}"
            for _ in range(min(self.arguments.kills_per_run, self.arguments.kills - len(self.kills))):
                if not self.disturb(run, duration):
                    break  # done before the moment came: the next run gets the kill
            digest = self.finish(run, self.random.choice(GRIDS))
            same = digest == reference
            wrong += not same
            print(
                f"trial {trials}: {len(self.kills)} kills so far, results {'identical' if same else 'DIFFER'}",
                flush=True,
            )
            shutil.rmtree(run)
        orphans = sum(bool(kill["orphans"]) for kill in self.kills)
        slowest = max(float(str(kill["gone_after_s"])) for kill in self.kills)
        kinds = {kind: sum(kill["victim"] == kind for kill in self.kills) for kind in ("rank", "mpirun", "everything")}
        print(f"{len(self.kills)} kills ({kinds}) while the job ran, in {trials} runs")
        print(f"results that differ: {wrong}; processes left after {ORPHAN_LIMIT_S:.0f} s: {orphans}")
        print(f"the last process was gone after at most {slowest:.1f} s")
        if self.arguments.json:
            self.arguments.json.write_text(
                json.dumps({"wrong": wrong, "trials": trials, "kills": self.kills}, indent=1)
            )
        return 1 if wrong or orphans else 0

    def make_input(self) -> None:
        shape = ["--layers", "4", "--width", "64", "--vocab", "256", "--head-size", "32", "--seed", "3"]
        make = [*program(), "random-model", "7", *shape, "-o", str(self.model)]
        subprocess.run(make, check=True, capture_output=True)
        self.documents.mkdir()
        for number, size in enumerate([self.arguments.bytes, 40_000, 1, 31, 32, 33, 1023, 1024, 1025, 0, 5000]):
            text = bytes(self.random.choice(b"abcdefghij   \n,.") for _ in range(size))
            (self.documents / f"d{number:02d}.txt").write_bytes(text)

    def start(self, run: Path, grid: tuple[int, int, int], mark: str) -> subprocess.Popen[bytes]:
        options = ["--stages", str(grid[0]), "--ring", str(grid[1]), "--replicas", str(grid[2])]
        options += ["--chunk", "256", "--commit-every", f"{self.random.choice([20, 60, 200])}c"]
        command = [*program(), "score", str(self.model), str(self.documents), "-o", str(run), *options]
        ranks = grid[0] * grid[1] * grid[2]
        if ranks > 1:
            command = [mpirun(), "-n", str(ranks), *command]
        # temporary files of its own: what a killed mpirun leaves behind stops a later one with its process id
        environment = {**os.environ, **ENVIRONMENT, MARK: mark, "TMPDIR": tempfile.mkdtemp(dir=self.model.parent)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def disturb(self, run: Path, duration: float) -> bool:
        """Start, wait a random time, kill, and count what is left 10 s later. False: it was done before."""
        mark = uuid.uuid4().hex
        grid = self.random.choice(GRIDS)
        process = self.start(run, grid, mark)
        try:
            process.communicate(timeout=self.random.uniform(0.1, 1.0) * duration)
            return False
        except subprocess.TimeoutExpired:
            victim = self.random.choice(["rank", "rank", "mpirun", "everything"])
            self.kill(process, victim, mark)
        begun = time.monotonic()
        while (left := marked(mark)) and time.monotonic() - begun < ORPHAN_LIMIT_S:
            time.sleep(0.05)
        gone_after = time.monotonic() - begun
        for orphan in left:
            orphan.kill()
        process.communicate()
        self.kills.append(
            {
                "grid": grid,
                "victim": victim,
                "gone_after_s": round(gone_after, 2),
                "orphans": len(left),
                "exit_code": process.returncode,
            }
        )
        return True

    def kill(self, process: subprocess.Popen[bytes], victim: str, mark: str) -> None:
        """The victims may end by themselves while they are looked for."""
        if victim == "everything":
            for other in marked(mark):
                send_kill(other.pid)
        elif victim == "rank" and (ranks := [pid for pid in ranks_of(mark) if pid != process.pid]):
            send_kill(self.random.choice(ranks))
        else:
            send_kill(process.pid)

    def finish(self, run: Path, grid: tuple[int, int, int]) -> str:
        """Let the job go on to its end; the digest of its results."""
        process = self.start(run, grid, uuid.uuid4().hex)
        _, errors = process.communicate(timeout=600)
        if process.returncode != 0:
            raise SystemExit(f"{run}: the job ended with {process.returncode}:\n{errors.decode()}")
        return str(json.loads((run / "SUCCESS").read_text())["content_sha256"])


def program() -> list[str]:
    return [sys.executable, "-m", "rwkvmpi"]


def mpirun() -> str:
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else "mpirun"


def marked(mark: str) -> list[psutil.Process]:
    """All living processes of a trial."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def ranks_of(mark: str) -> list[int]:
    """The processes of a trial that compute."""
    found = []
    for process in marked(mark):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "score" in words and "mpirun" not in words[0] and "prterun" not in words[0]:
            found.append(process.pid)
    return found


def send_kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
