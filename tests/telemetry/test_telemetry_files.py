"""Reading samples that somebody may have torn, forged or put in the way."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvmpi.telemetry import client, files, network, sample

GOOD: dict[str, Any] = {
    "rank": 3, "ranks": 4, "time": 1e9, "attempt": 2, "host": "n2", "pid": 1, "stage": 0, "slot": 1, "replica": 0,
    "phase": "reading", "chunk": None, "chunks": 3, "tokens": 3072, "tokens_per_second": 1.5, "busy_s": 1.0,
    "reading_s": 2, "waits": {"state": 0.5}, "neighbours": {"2": 0.5}, "rss_bytes": 1 << 40, "device_bytes": None,
    "waiting": {"rank": None, "what": "a chunk", "since_s": 0.1}, "commit": None, "job": {"grid": [1, 4, 1], "a": {}},
}  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def test_a_sample_comes_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    files.write_sample(tmp_path, 3, sample.encode({**GOOD, "host": "a longer name before"}))
    files.write_sample(tmp_path, 3, sample.encode(GOOD))
    assert client.latest(tmp_path) == {3: GOOD}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(GOOD)), json_values)
def test_whatever_stands_in_a_field_a_sample_keeps_its_types(key: str, value: Any) -> None:
    found = sample.parse(json.dumps({**GOOD, key: value}).encode())
    if found is None:
        return
    assert all(type(found[name]) is int and found[name] >= 0 for name in ("rank", "ranks", "attempt", "tokens"))
    assert all(math.isfinite(found[name]) for name in ("time", "tokens_per_second", "busy_s"))
    assert all(
        isinstance(seconds, int | float) for seconds in [*found["waits"].values(), *found["neighbours"].values()]
    )
    assert found["waiting"] is None or isinstance(found["waiting"]["what"], str)
    assert isinstance(found["host"], str)
    assert found["host"].isprintable()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200) | st.builds(lambda n, s: sample.encode(GOOD)[:n] + s, st.integers(0, 400), st.binary()))
def test_any_bytes_in_the_files_are_read_or_left_out(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as run:
        folder = files.folder_of(run)
        folder.mkdir(parents=True)
        (folder / "rank_00003.json").write_bytes(data)
        (folder / "rank_00001.json").write_bytes(sample.encode({**GOOD, "rank": 1}))
        (folder / files.ENDPOINT).write_bytes(data)
        assert 1 in client.latest(run)
        assert files.read_endpoint(run) is None


@settings(deadline=None)
@given(json_values, st.sampled_from(["host", "addresses", "port", "key"]))
def test_any_ticket_is_refused_or_can_be_tried(value: Any, key: str) -> None:
    ticket = {"host": "n1", "addresses": ["192.0.2.1"], "port": 4711, "key": "k" * 40, key: value}
    if files.is_endpoint(ticket):
        assert all(isinstance(address, str) for address in network.candidates(ticket))


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 60_000,
        b'{"rank":0,"ranks":1,"attempt":1,"time":1' + b"0" * 5000 + b"}",
        b'{"rank":0,"ranks":1,"attempt":1,"time":NaN}',
        b'{"rank":0,"ranks":1,"attempt":1,"time":1,"x":[[[[[[[[1]]]]]]]]}',
        b'{"rank":0,"ranks":1,"attempt":1,"time":1,"x":"' + b"y" * sample.MAX_BYTES + b'"}',
        b'{"rank":true,"ranks":1,"attempt":1,"time":1}',
        b'{"rank":0,"ranks":1,"attempt":1}',
        b"",
    ],
)
def test_what_would_burden_or_mislead_a_reader_is_no_sample(line: bytes) -> None:
    assert sample.parse(line) is None


def test_no_text_moves_the_cursor() -> None:
    found = sample.parse(sample.encode({**GOOD, "host": "n\x1b[2J" + "x" * 1000, "job": {"k\n": "\u202e"}}))
    assert found is not None
    assert found["host"].startswith("n?[2J")
    assert len(found["host"]) == 300
    assert found["job"] == {"k?": "?"}


def test_what_lies_in_the_way_is_passed_over(tmp_path: Path) -> None:
    folder = files.folder_of(tmp_path)
    folder.mkdir(parents=True)
    os.mkfifo(folder / "rank_00000.json")
    (folder / "rank_00001.json").mkdir()
    (folder / "rank_00002.json").symlink_to("/dev/zero")
    (folder / "rank_00003.json").write_bytes(sample.encode({**GOOD, "rank": 2}))  # says that it is another
    assert client.latest(tmp_path) == {}
    for rank in (0, 1, 2):
        with pytest.raises(OSError, match="rank_0000"):
            files.write_sample(tmp_path, rank, b"{}")


def test_the_newest_start_counts_even_where_counting_began_anew(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for rank, attempt, moment in [(0, 1, 2e9), (1, 1, 2e9 - 1), (2, 5, 1e9)]:
        files.write_sample(tmp_path, rank, sample.encode({**GOOD, "rank": rank, "attempt": attempt, "time": moment}))
    assert set(client.latest(tmp_path)) == {0, 1}
