"""What a rank is doing at this moment: shown to whoever watches the job, and recorded where a trace was asked for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol

MAIN, WRITER, COMMITS, HOPS = range(4)  # tracks of a trace: the rank's main thread, its other two, messages to it


class Recorder(Protocol):
    """Takes what happened: telemetry.trace.TraceRecorder."""

    def add(self, track: int, name: str, begun_ns: int, ended_ns: int, a: int = -1, b: int = -1) -> None:
        """From begun_ns to ended_ns of the monotonic clock. a, b: chunk and rank (MAIN), bytes and commit (WRITER,
        COMMITS), bytes and the rank it came from (HOPS); -1 for none."""


class Waiting(NamedTuple):
    """A wait that goes on: for which rank (None: for something of the own rank), for what, since when (monotonic)."""

    rank: int | None
    what: str
    since_ns: int


class Activity:
    """One rank's. Written by its main thread; another thread may read it at any time, and sees each field whole.

    phase: "loading", "reading", "closing" or "done"; chunk: the one in flight; commit: the last one closed by this
    rank; waiting: what holds it up now; waited_s: what it waited for each rank so far.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder
        self.phase = "loading"
        self.chunk: int | None = None
        self.commit = 0
        self.waiting: Waiting | None = None
        self.waited_s: dict[int, float] = {}

    def begin_wait(self, rank: int | None, what: str) -> Waiting | None:
        """From now on the rank waits; returns what `end_wait` is to be given: waits may lie in one another."""
        outer, self.waiting = self.waiting, Waiting(rank, what, time.monotonic_ns())
        return outer

    def end_wait(self, outer: Waiting | None) -> None:
        """The wait is over."""
        ended, self.waiting = self.waiting, outer
        if ended is None:
            return
        now = time.monotonic_ns()
        if ended.rank is not None:
            self.waited_s[ended.rank] = self.waited_s.get(ended.rank, 0.0) + (now - ended.since_ns) / 1e9
        if self.recorder is not None:
            rank = -1 if ended.rank is None else ended.rank
            self.recorder.add(MAIN, f"waits for {ended.what}", ended.since_ns, now, -1, rank)

    def record(self, track: int, name: str, begun_ns: int, ended_ns: int, a: int = -1, b: int = -1) -> None:
        """Into the trace, if there is one; see Recorder.add."""
        if self.recorder is not None:
            self.recorder.add(track, name, begun_ns, ended_ns, a, b)

    @contextlib.contextmanager
    def recorded(self, track: int, name: str, a: int = -1, b: int = -1) -> Iterator[None]:
        """What is done inside goes into the trace."""
        begun = time.monotonic_ns()
        yield
        self.record(track, name, begun, time.monotonic_ns(), a, b)
