"""The record of what a rank did when: RUN/trace/0002-00003.events (attempt, rank), and the same with .json beside it.

Events are rows of six little-endian int64: track, number of the name, begin and end (ns of this rank's monotonic
clock), and two numbers whose meaning goes by the track. The .json says whose they are, which names there are, and how
the clock relates to the others'; it is written again whenever there are new names. Nothing is synced: a trace may be
lost, and must not slow the run down.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from rwkvmpi.cluster.logs import LOGGER

FORMAT_VERSION = 1
COLUMNS = 6
FLUSH_EVENTS = 8192  # some 3 ms of work
MAX_EVENTS = 2_000_000  # 96 MB a rank


def trace_folder(run: Path) -> Path:
    """RUN/trace"""
    return run / "trace"


class TraceRecorder:
    """Takes the events of one rank in one start of the job; any thread may add some.

    about: what tells the rank from others (host, stage, slot, replica). clock_ns: rank 0's monotonic clock minus this
    rank's; wall_ns: rank 0's wall clock (unix) minus its monotonic one, by which starts can be compared. It ends
    quietly, with a line in the log, when MAX_EVENTS are there or the disk takes no more.
    """

    def __init__(self, run: Path, attempt: int, rank: int, about: dict[str, Any], clock_ns: int, wall_ns: int) -> None:
        self._path = trace_folder(run) / f"{attempt:04d}-{rank:05d}.events"
        self._head = {"format_version": FORMAT_VERSION, "attempt": attempt, "rank": rank, **about}
        self._head |= {"clock_ns": clock_ns, "wall_ns": wall_ns}
        self._names: dict[str, int] = {}
        self._named = 0  # names that are in the file
        self._events: list[tuple[int, ...]] = []
        self._written = 0
        self._lock = threading.Lock()
        self._open = True
        with self._quietly():
            self._path.parent.mkdir(exist_ok=True)
            self._path.write_bytes(b"")
            self._write_head()

    def add(self, track: int, name: str, begun_ns: int, ended_ns: int, a: int = -1, b: int = -1) -> None:
        """See grid.activity.Recorder."""
        number = self._names.get(name)
        if number is None:
            with self._lock:  # two threads with new names must not get one number
                number = self._names.setdefault(name, len(self._names))
        self._events.append((track, number, begun_ns, ended_ns, a, b))
        if len(self._events) >= FLUSH_EVENTS:
            self.flush()

    def flush(self) -> None:
        """Write what has been added."""
        with self._lock, self._quietly():
            events = self._events[:]
            del self._events[: len(events)]  # of the same list: another thread may be adding to it
            if not (self._open and events):
                return
            room = MAX_EVENTS - self._written
            with open(self._path, "ab") as file:
                file.write(np.array(events[:room], dtype="<i8").tobytes())
            self._written += len(events)
            if len(self._names) > self._named:
                self._write_head()
            if self._written >= MAX_EVENTS:
                self._end(f"is full with {MAX_EVENTS:,} events; the rest of the run is not recorded")

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._open = False

    def _write_head(self) -> None:
        self._named = len(self._names)
        temporary = self._path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps({**self._head, "names": list(self._names)}))
        os.replace(temporary, self._path.with_suffix(".json"))

    @contextlib.contextmanager
    def _quietly(self) -> Any:
        try:
            yield
        except OSError as error:
            self._end(f"cannot be written ({error}); the run goes on without it")

    def _end(self, why: str) -> None:
        self._open = False
        logging.getLogger(LOGGER).info("the trace %s %s", self._path, why)
