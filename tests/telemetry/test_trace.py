"""Traces: what is recorded is what is exported, whatever happens to the files."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkvmpi.errors import UserError
from rwkvmpi.grid.activity import COMMITS, HOPS, MAIN, WRITER, Activity
from rwkvmpi.store.identity import clear
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.telemetry import trace
from rwkvmpi.telemetry.trace import TraceRecorder
from rwkvmpi.telemetry.trace_export import export_trace

ABOUT = {"host": "n1", "stage": 0, "slot": 1, "replica": 0}
SECOND = 10**9


def recorder(run: Path, attempt: int = 1, rank: int = 0, clock: int = 0, wall: int = 0) -> TraceRecorder:
    return TraceRecorder(run, attempt, rank, ABOUT, clock, wall)


def exported(run: Path) -> list[dict[str, Any]]:
    with gzip.open(export_trace(run), "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return [event for event in events if event["ph"] != "M"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([MAIN, WRITER, COMMITS]), st.text(max_size=20), st.integers(0, 1 << 50), st.integers(0, 9)
        ),
        max_size=60,
    ),
    st.integers(0, 47),
)
def test_what_was_added_comes_out_but_for_what_a_kill_cut_off(tmp_path_factory, events, cut):
    run = tmp_path_factory.mktemp("run")
    record = recorder(run)
    for number, (track, name, begun, took) in enumerate(events):
        record.add(track, name, begun, begun + took * 1000, number)
    record.close()
    (path,) = (run / "trace").glob("*.events")
    path.write_bytes(path.read_bytes()[: max(0, 48 * len(events) - cut)])
    kept = events[: len(events) - (cut > 0)] if events else []
    found = exported(run)
    assert [(event["tid"], event["name"]) for event in found] == [(track, name) for track, name, _, _ in kept]
    assert [event["dur"] for event in found] == pytest.approx([took for *_, took in kept])
    starts = [begun / 1000 for _, _, begun, _ in kept]
    assert [event["ts"] - found[0]["ts"] for event in found] == pytest.approx([s - starts[0] for s in starts])


def test_ranks_lie_on_one_axis_and_a_hop_leads_from_its_sender_to_its_receiver(tmp_path):
    first, second = recorder(tmp_path), recorder(tmp_path, rank=1, clock=-5 * SECOND)
    first.add(MAIN, "chunk", 10 * SECOND, 11 * SECOND, 3)
    second.add(HOPS, "the state of layer 0", 15 * SECOND, 15 * SECOND + 2000, 64, 0)  # by its own clock
    first.close()
    second.close()
    chunk, begin, end, out, arrives = exported(tmp_path)
    assert (chunk["ts"], chunk["dur"], chunk["args"]) == (0, SECOND / 1000, {"chunk": 3})
    assert (begin["ph"], begin["pid"], begin["ts"], end["ts"]) == ("b", 1, 0, 2)
    assert (out["ph"], out["pid"], out["ts"]) == ("s", 0, 0)
    assert (arrives["ph"], arrives["pid"], arrives["ts"]) == ("f", 1, 2)
    assert out["id"] == arrives["id"]
    assert begin["args"] == {"bytes": 64, "from": 0}


def test_the_last_start_is_exported_and_a_full_or_unwritable_trace_harms_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "MAX_EVENTS", 5)
    monkeypatch.setattr(trace, "FLUSH_EVENTS", 2)
    for attempt in (1, 2):
        record = recorder(tmp_path, attempt)
        for number in range(20):
            record.add(MAIN, f"attempt {attempt}", number, number + 1)
        record.close()
    assert [event["name"] for event in exported(tmp_path)] == ["attempt 2"] * 5
    (tmp_path / "file").touch()
    nowhere = recorder(tmp_path / "file")
    nowhere.add(MAIN, "x", 0, 1)
    nowhere.close()


def test_threads_that_add_at_once_lose_nothing_and_share_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "FLUSH_EVENTS", 7)
    record = recorder(tmp_path)

    def add(thread: int) -> None:
        for number in range(3000):
            record.add(MAIN, f"{thread}: {number}", number, number + 1, thread * 3000 + number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    record.close()
    found = sorted((event["args"]["chunk"], event["name"]) for event in exported(tmp_path))
    assert found == [(t * 3000 + n, f"{t}: {n}") for t in range(4) for n in range(3000)]


def test_force_throws_an_earlier_trace_away(tmp_path):
    recorder(tmp_path).close()
    assert exported(tmp_path) == []
    clear(RunFolder(tmp_path))
    with pytest.raises(UserError, match="has no trace"):
        export_trace(tmp_path)


def test_a_place_that_cannot_be_written_to_is_told(tmp_path):
    recorder(tmp_path).close()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .* name another file with -o"):
        export_trace(tmp_path, tmp_path / "file" / "trace.json.gz")


def test_waits_within_waits_count_for_their_ranks(tmp_path):
    record = recorder(tmp_path)
    activity = Activity(record)
    outer = activity.begin_wait(1, "a state")
    inner = activity.begin_wait(None, "the GPU")
    assert activity.waiting is not None
    assert activity.waiting.what == "the GPU"
    activity.end_wait(inner)
    assert activity.waiting.rank == 1
    activity.end_wait(outer)
    assert activity.waiting is None
    assert list(activity.waited_s) == [1]
    record.close()
    assert [event["name"] for event in exported(tmp_path)] == ["waits for the GPU", "waits for a state"]


def test_what_is_no_trace_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match="has no trace; start the job with --trace"):
        export_trace(tmp_path)
    recorder(tmp_path).close()
    (head,) = (tmp_path / "trace").glob("*.json")
    head.write_text('{"format_version": 1, "names": 3}')
    with pytest.raises(UserError, match=r"cannot be read as the head of a trace .*; remove "):
        export_trace(tmp_path)
