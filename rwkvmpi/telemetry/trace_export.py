"""Traces as one file for ui.perfetto.dev: Chrome's trace event format, JSON, compressed by gzip.

Every rank is a process of its own there, with its main thread, the one that writes shards, on rank 0 the one that
commits, and the messages that came to it; arrows lead from the sender to the receiver.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from rwkvmpi.errors import UserError
from rwkvmpi.grid.activity import COMMITS, HOPS, MAIN, WRITER
from rwkvmpi.store.files import remove_quietly
from rwkvmpi.telemetry.trace import COLUMNS, FORMAT_VERSION, trace_folder

_NAME = re.compile(r"(\d{4,})-(\d{5,})\.events")
_THREADS = {MAIN: "reads", WRITER: "writes shards", COMMITS: "commits"}
_STORED = ("bytes", "commit")
_ARGUMENTS = {MAIN: ("chunk", "rank"), WRITER: _STORED, COMMITS: _STORED, HOPS: ("bytes", "from")}
_BLOCK = 65_536  # events in memory at a time


@dataclass
class RankTrace:
    """One rank's file: its .json checked, and the events that are whole."""

    path: Path
    attempt: int
    rank: int
    title: str
    clock_ns: int
    wall_ns: int
    names: list[str]

    @classmethod
    def open(cls, path: Path) -> RankTrace:
        """UserError when the .json beside it is missing or is not one of ours."""
        head_path = path.with_suffix(".json")
        try:
            head = json.loads(head_path.read_text())
            numbers = [head[key] for key in ("attempt", "rank", "clock_ns", "wall_ns")]
            names = head["names"]
            fits = all(isinstance(n, int) for n in numbers) and all(isinstance(name, str) for name in names)
            if not fits or head["format_version"] != FORMAT_VERSION:
                raise ValueError("it has other fields, or is of another version")
            place = "stage {stage}, slot {slot}, replica {replica} on {host}".format(**head)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{head_path}: cannot be read as the head of a trace ({error}); remove {path}") from None
        return cls(path, numbers[0], numbers[1], f"rank {numbers[1]}: {place}", numbers[2], numbers[3], names)

    def events(self) -> Iterator[np.ndarray]:
        """int64 [n, 6], a block at a time; half an event at the end, left by a kill, is dropped."""
        row = 8 * COLUMNS
        with open(self.path, "rb") as file:
            while data := file.read(_BLOCK * row):
                rows: np.ndarray = np.frombuffer(data[: len(data) // row * row], dtype="<i8").reshape(-1, COLUMNS)
                known = (rows[:, 1] >= 0) & (rows[:, 1] < len(self.names)) & (rows[:, 3] >= rows[:, 2])
                yield rows[known & (rows[:, 0] >= MAIN) & (rows[:, 0] <= HOPS)]


def export_trace(run: Path, output: Path | None = None) -> Path:
    """Write the trace of the last start that has one: RUN/trace.json.gz, or `output`. Returns its path.

    UserError when there is none.
    """
    files = sorted(path for path in trace_folder(run).glob("*.events") if _NAME.fullmatch(path.name))
    if not files:
        raise UserError(f"{run}: has no trace; start the job with --trace to record one")
    traces = [RankTrace.open(path) for path in files if path.name.split("-")[0] == files[-1].name.split("-")[0]]
    output = output or run / "trace.json.gz"
    temporary = output.with_name(output.name + ".tmp")
    try:
        with gzip.open(temporary, "wt", compresslevel=3, encoding="utf-8") as file:
            _write(file, traces)
        temporary.replace(output)
    except OSError as error:
        remove_quietly(temporary)
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); name another file with -o") from None
    return output


def _write(file: IO[str], traces: list[RankTrace]) -> None:
    starts = ((trace, _first(trace)) for trace in traces)
    zero = min((trace.wall_ns + trace.clock_ns + start for trace, start in starts if start is not None), default=0)
    file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
    first = True
    for trace in traces:
        for event in _events_of(trace, zero):
            file.write(("" if first else ",\n") + json.dumps(event, separators=(",", ":")))
            first = False
    file.write("\n]}\n")


def _first(trace: RankTrace) -> int | None:
    """When its first event begins, by its own clock; None when it has none. What began first ended among the first."""
    rows = next(trace.events(), None)
    return int(rows[:, 2].min()) if rows is not None and len(rows) else None


def _events_of(trace: RankTrace, zero: int) -> Iterator[dict[str, Any]]:
    pid = trace.rank
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": trace.title}}
    yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
    for thread, name in _THREADS.items():
        yield {"ph": "M", "pid": pid, "tid": thread, "name": "thread_name", "args": {"name": name}}
    shift = trace.clock_ns + trace.wall_ns - zero
    number = 0
    for rows in trace.events():
        for track, name, begun, ended, a, b in rows.tolist():
            start, end = (begun + shift) / 1000, (ended + shift) / 1000  # microseconds
            arguments = {key: value for key, value in zip(_ARGUMENTS[track], (a, b), strict=True) if value >= 0}
            event = {"name": trace.names[name], "pid": pid, "ts": start, "args": arguments}
            if track != HOPS:
                yield {"ph": "X", "tid": track, "dur": end - start, **event}
                continue
            number += 1
            identity = {"cat": "hop", "id": f"{pid}.{number}"}
            yield {"ph": "b", "tid": MAIN, **identity, **event}
            yield {"ph": "e", "tid": MAIN, **identity, **event, "ts": end}
            if b >= 0:
                yield {"ph": "s", "tid": MAIN, **identity, **event, "pid": b}
                yield {"ph": "f", "bp": "e", "tid": MAIN, **identity, **event, "ts": end}
