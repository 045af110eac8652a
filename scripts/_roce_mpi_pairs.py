"""Two ranks of tests/roce/hop_program.py under the laboratory's roce-mpirun, with the face of _roce_pairs.Pair."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parents[1] / "tests" / "roce" / "hop_program.py"
MARK = "ROCE_TRIAL"  # in the environment of both ranks


class MpiPair:
    """The two ranks of one trial, MPI on the RoCE ports unless ROCE_MPI=local is in `environment`."""

    def __init__(
        self,
        seed: int,
        rounds: int,
        nbytes: int,
        deadline_s: float,
        environment: dict[str, str],
        transport: str = "mpi",
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - as long as the pair
        options = {"transport": transport, "seed": seed, "rounds": rounds, "bytes": nbytes, "deadline": deadline_s}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self._launcher = subprocess.Popen(
            ["roce-mpirun", sys.executable, str(PROGRAM), *words],
            env={**os.environ, **environment, MARK: self._mark}, stdin=subprocess.DEVNULL,
            stdout=self._out, stderr=self._err, start_new_session=True,
        )  # fmt: skip

    @property
    def code(self) -> int | None:
        """mpirun's exit code, None while it runs."""
        return self._launcher.poll()

    @property
    def complaints(self) -> str:
        """All that was written to stderr."""
        return _text(self._err)

    def alive(self) -> list[int]:
        """The ranks, until mpirun has ended; whether a rank lives that it has not yet missed is not asked."""
        if self._launcher.poll() is not None:
            return []
        return sorted(self._ranks()) or [0, 1]

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank; SIGKILL to one that does not exist goes to mpirun and all ranks."""
        pid = self._ranks().get(rank)
        with contextlib.suppress(ProcessLookupError):
            if pid is not None:
                os.kill(pid, number)
            elif number == signal.SIGKILL:
                os.killpg(self._launcher.pid, number)

    def end(self) -> None:
        """Kill everything that is left of it."""
        for rank in (0, 1):
            self.signal(rank, signal.SIGKILL)
        if self._launcher.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._launcher.pid, signal.SIGKILL)
            self._launcher.wait()

    def ready(self) -> bool:
        """Whether both ranks have connected."""
        return self.complaints.count('"ready"') == 2

    def ended(self) -> list[dict[str, Any]]:
        """What the ranks said at their end."""
        told = {}
        for line in _text(self._out).splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                said = json.loads(line)
                told[said["rank"]] = said
        last = " ".join(self.complaints.split())[-600:]
        nothing = {"outcome": "killed", "error": f"exit code {self._launcher.returncode}: {last}", "rounds": 0}
        return [told.get(rank, nothing) for rank in (0, 1)]

    def _ranks(self) -> dict[int, int]:
        """rank -> process id, of the ranks that have started and not ended."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                environment = dict(
                    word.split("=", 1) for word in (folder / "environ").read_text().split("\0") if "=" in word
                )
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if environment.get(MARK) == self._mark and "OMPI_COMM_WORLD_RANK" in environment and state != "Z":
                    found[int(environment["OMPI_COMM_WORLD_RANK"])] = int(folder.name)
        return found


def _text(file: Any) -> str:
    return os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")
