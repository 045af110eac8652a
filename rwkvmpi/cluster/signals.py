"""When to stop early: a signal, the file RUN/STOP, or the end of the time granted.

A signal only sets a flag; the engine looks at it between two chunks, commits, and leaves with exit code 75. Signals
are a courtesy, the periodic commit is the guarantee: `kill mpirun` leaves the ranks half a second (Open MPI 5 sends
SIGTERM and 0.25 s later SIGKILL), while SIGUSR1 sent to mpirun is passed on to every rank and kills nobody.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from rwkvmpi.cluster.launcher import slurm_seconds_left
from rwkvmpi.errors import UserError

STOP_FILE = "STOP"
STOP_FILE_EVERY_S = 0.5
SLURM_MARGIN_S = 120.0
GENTLE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class StopRequest:
    """Collects every wish to stop; `reason` is None until there is one.

    run:           the run folder, whose file STOP is looked for (at most twice a second); None: no file
    max_time:      text as `parse_duration` reads it, counted from now; empty: Slurm's end of the job, less a margin
    """

    def __init__(self, run: Path | None = None, max_time: str = "", environ: Mapping[str, str] | None = None) -> None:
        self._file = run / STOP_FILE if run is not None else None
        self._next_look = 0.0
        self._reason: str | None = None
        self._previous: dict[int, Any] = {}
        self.deadline, self._deadline_text = _deadline(max_time, environ)

    def install(self) -> StopRequest:
        """Take over SIGTERM, SIGUSR1, SIGHUP and the first Ctrl-C (main thread only). What is ignored stays ignored."""
        for number in GENTLE:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._previous[number] = signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    @property
    def reason(self) -> str | None:
        """Why to stop, as words for a sentence; None: go on. Cheap enough to ask before every layer."""
        if self._reason is None:
            now = time.monotonic()
            if now >= self.deadline:
                self.request(self._deadline_text)
            elif self._file is not None and now >= self._next_look:
                self._next_look = now + STOP_FILE_EVERY_S
                if self._file.exists():
                    self.request(f"the file {self._file}")
        return self._reason

    def request(self, reason: str) -> None:
        """Ask for a stop from inside, for instance because another rank did. The first reason stands."""
        if self._reason is None:
            self._reason = reason

    def clear_stop_file(self) -> None:
        """Remove a STOP left from the stop before: who starts the job again wants it to go on (one rank calls this)."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request(f"signal {signal.Signals(number).name}")

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.request("Ctrl-C")
        os.write(2, b"\nrwkvmpi: finishing the chunk and committing; Ctrl-C again leaves at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)


def parse_duration(text: str) -> float:
    """Seconds of '90s', '30m', '12h', '2d', 'HH:MM:SS' or 'D-HH:MM:SS'; UserError for anything else, bare numbers too.

    A bare number is refused because it is seconds to some programs and minutes to Slurm.
    """
    stripped = text.strip().lower()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", stripped):
        seconds = float(match[1]) * _UNITS[match[2]]
    elif match := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", stripped):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = ((days * 24 + hours) * 60 + minutes) * 60.0 + rest
    else:
        raise UserError(f"max_time {text!r} is no duration; write it as 90s, 30m, 12h, HH:MM:SS or D-HH:MM:SS")
    if seconds <= 0:
        raise UserError(f"max_time {text!r} leaves no time at all; give a duration above zero")
    return seconds


def _deadline(max_time: str, environ: Mapping[str, str] | None) -> tuple[float, str]:
    if max_time:
        return time.monotonic() + parse_duration(max_time), f"the time limit of {max_time}"
    left = slurm_seconds_left(environ)
    if left is None:
        return float("inf"), ""
    # a tenth at most: a job of five minutes should not give two of them away
    margin = min(SLURM_MARGIN_S, max(0.0, left) / 10)
    return time.monotonic() + left - margin, "the end of the Slurm job"
