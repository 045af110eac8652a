"""A real job with --trace: every chunk, layer, hop and commit is in it, and the results do not notice."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from rwkvmpi.store.digest import content_digest

pytestmark = pytest.mark.parallel


def test_every_chunk_layer_hop_and_commit(rwkvmpi, small_model, write_documents, tmp_path):
    model, documents = small_model("7"), write_documents(tmp_path / "docs", [20_000, 33, 5000], seed=3)
    arguments = ["score", model, documents, "--chunk", 256, "--commit-every", "20c"]
    rwkvmpi(*arguments, "-o", tmp_path / "alone")
    run = tmp_path / "run"
    rwkvmpi(*arguments, "-o", run, "--stages", 2, "--ring", 2, "--trace", ranks=4)
    assert content_digest(run / "results.h5") == content_digest(tmp_path / "alone" / "results.h5")
    rwkvmpi("export", run, "--to", "trace", "-o", tmp_path / "trace.json.gz")
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]

    titles = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert [title.split(" on ")[0] for title in titles] == [
        "rank 0: stage 0, slot 0, replica 0",
        "rank 1: stage 1, slot 0, replica 0",
        "rank 2: stage 0, slot 1, replica 0",
        "rank 3: stage 1, slot 1, replica 0",
    ]
    whole = [event for event in events if event["ph"] == "X"]
    chunks = {
        rank: [e["args"]["chunk"] for e in whole if e["name"] == "chunk" and e["pid"] == rank] for rank in range(4)
    }
    assert chunks[0] == chunks[1] == list(range(0, len(chunks[0]) * 2, 2))
    assert chunks[2] == chunks[3] == list(range(1, len(chunks[2]) * 2, 2))
    layers = Counter((event["pid"], event["name"]) for event in whole if event["name"].startswith("layer"))
    assert set(layers.values()) <= {len(chunks[0]), len(chunks[2])}
    assert {name for rank, name in layers if rank in (0, 2)}.isdisjoint(name for rank, name in layers if rank in (1, 3))
    assert {event["pid"] for event in whole if event["name"] == "head and task"} == {1, 3}
    hops = Counter(event["pid"] for event in events if event["ph"] == "b")
    figures = json.loads((run / "SUCCESS").read_text())["figures"]
    assert [hops[rank] for rank in range(4)] == [figure["messages"] for figure in figures["hops"]]
    assert figures["commits"] == sum(event["name"] == "commit" for event in whole)
    assert any(event["name"] == "writes a shard" for event in whole)
    for layer in (event for event in whole if event["name"].startswith("layer")):
        around = [
            event
            for event in whole
            if event["name"] == "chunk" and event["pid"] == layer["pid"] and event["args"] == layer["args"]
        ]
        assert around[0]["ts"] <= layer["ts"]
        assert layer["ts"] + layer["dur"] <= around[0]["ts"] + around[0]["dur"] + 1e-3
