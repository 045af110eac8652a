"""What Slurm's queue says of a job: asked now and then by a thread of its own, since a busy controller answers late."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from dataclasses import dataclass

ASK_EVERY_S = 10.0
ANSWER_WITHIN_S = 20.0
# In these a job has not ended, or will be started again.
GOES_ON = frozenset(
    (
        "PENDING",
        "RUNNING",
        "SUSPENDED",
        "CONFIGURING",
        "COMPLETING",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "RESIZING",
        "RESV_DEL_HOLD",
        "SIGNALING",
        "SPECIAL_EXIT",
        "STAGE_OUT",
        "STOPPED",
    )
)


@dataclass(frozen=True)
class QueueEntry:
    """A job's state in Slurm's words ("" when Slurm no longer knows it); start, end: Slurm's text, else ""; reason: why
    it is not running; seconds_left: to the end of its allocation."""

    state: str
    start: str = ""
    reason: str = ""
    seconds_left: float | None = None

    @property
    def goes_on(self) -> bool:
        return self.state in GOES_ON


class SlurmQueue:
    """Follows one job at a time. `entry` is None as long as nothing is known: no Slurm here, or no answer yet."""

    def __init__(self) -> None:
        self.here = shutil.which("squeue") is not None
        self._job = ""
        self._entry: QueueEntry | None = None
        self._asked: threading.Thread | None = None
        self._next = 0.0

    def follow(self, job: str | None) -> QueueEntry | None:
        """What is known of this job; asks again when it is time. Never blocks."""
        if not self.here or not job or not job.isdecimal():
            return None
        if job != self._job:
            self._job, self._entry, self._next = job, None, 0.0
        if time.monotonic() >= self._next and not self.asking:
            self._next = time.monotonic() + ASK_EVERY_S
            self._asked = threading.Thread(target=self._ask, args=(job,), name="squeue", daemon=True)
            self._asked.start()
        return self._entry

    @property
    def asking(self) -> bool:
        """Whether an answer is being waited for."""
        return self._asked is not None and self._asked.is_alive()

    def _ask(self, job: str) -> None:
        entry = ask(job)
        if entry is not None and job == self._job:
            self._entry = entry


def ask(job: str) -> QueueEntry | None:
    """What squeue says of a job now; None when it does not answer."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%S|%L|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_WITHIN_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode != 0:
        return QueueEntry("") if "Invalid job id" in done.stderr else None
    fields = [field.strip() for field in done.stdout.partition("\n")[0].split("|")]
    if len(fields) != 4:
        return QueueEntry("")
    state, start, left, reason = fields
    known = "" if start in ("N/A", "NONE", "Unknown") else start
    return QueueEntry(state, known, "" if reason == "None" else reason, _seconds(left))


def _seconds(text: str) -> float | None:
    """D-HH:MM:SS, HH:MM:SS or MM:SS as seconds; None for UNLIMITED, NOT_SET and whatever else."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in parts) or not 2 <= len(parts) <= 3 or not (days.isdecimal() or not days):
        return None
    total = 0.0
    for part in parts:
        total = 60 * total + int(part)
    return total + 86400 * int(days or 0)
