"""Made-up runs for the tests of the store: what a document's results are depends on its number alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

import rwkvmpi
from rwkvmpi.store.commits import Commit, ReplicaCommit
from rwkvmpi.store.results import write_results
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.shards import ShardBuilder, ShardRef

WIDTH, LAYERS, WKV = 6, 3, (2, 3, 3)

# what a child process needs to find the package, installed or not
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(rwkvmpi.__file__).parents[1])}


@dataclass(frozen=True)
class Entry:
    """A row of the index, as write_results wants it."""

    id: str
    source: str


def entries(count: int) -> list[Entry]:
    return [Entry(f"doc{number}", f"/in/file{number // 3}.txt") for number in range(count)]


def ids_of(doc: int, first: int, count: int) -> np.ndarray:
    return ((np.arange(first, first + count) * 7919 + doc * 104729) % 65536).astype(np.int32)


def logprobs_of(doc: int, first: int, count: int) -> np.ndarray:
    """Of very different sizes, so that the order in which they are added shows in the last bits of the sum."""
    x = np.arange(first, first + count, dtype=np.float64)
    return (-(10 ** (6 * np.sin(x * 1.37 + doc)))).astype(np.float32)


def vector_of(doc: int, window: int) -> np.ndarray:
    return np.sin(np.arange(WIDTH, dtype=np.float32) + 10 * doc + window).astype(np.float32)


def state_of(doc: int, layer: int, position: int = -1) -> tuple[np.ndarray, np.ndarray]:
    base = np.float32(100 * doc + layer + 0.001 * position)
    wkv = base + np.arange(np.prod(WKV), dtype=np.float32).reshape(WKV)
    return wkv, (wkv.reshape(-1)[: 2 * WIDTH] * 2).reshape(2, WIDTH)


def last_of(doc: int) -> np.ndarray:
    return np.cos(np.arange(WIDTH, dtype=np.float32) + doc).astype(np.float32)


def sha256_of(doc: int) -> bytes:
    return sha256(f"text {doc}".encode()).digest()


def new_run(path: Path) -> RunFolder:
    run = RunFolder(path)
    run.create()
    return run


def final_commit(refs: Iterable[ShardRef], documents: int) -> Commit:
    return Commit(1, 1, "job", documents, tuple(refs), (ReplicaCommit(0, 1),))


def results_of(run: RunFolder, commit: Commit, task: str = "score", **changed: object) -> str:
    """write_results with plain values for everything else."""
    facts = {"model_sha256": "ab" * 32, "tokenizer": "bytes", "job": {"task": task}, "provenance": {"argv": ["x"]}}
    shape = {"layers": LAYERS, "width": WIDTH, "wkv_shape": WKV}
    documents = entries(commit.documents_total)
    return write_results(run, commit, documents, task=task, **{**facts, **shape, **changed})  # type: ignore[arg-type]


def simple_run(
    path: Path, lengths: Sequence[int], task: str = "score", failed: Sequence[int] = (), **changed: object
) -> RunFolder:
    """A finished run of one rank that read the documents one after the other; results.h5 is written."""
    run = new_run(path)
    builder = ShardBuilder(run.shards, 1, 0)
    for doc, count in enumerate(lengths):
        if doc in failed:
            builder.add_document(doc, 0, 0, False, f"document {doc} is broken")
            continue
        if task == "score" and count:
            builder.add_tokens(doc, 0, ids_of(doc, 0, count), logprobs_of(doc, 0, count))
        if task == "embed":
            builder.add_embedding(doc, 0, 0, count, vector_of(doc, 0))
        if task == "read":
            for layer in range(LAYERS):
                builder.add_state(doc, layer, *state_of(doc, layer))
            builder.add_output(doc, last_of(doc))
        builder.add_document(doc, 2 * count, count, True, sha256=sha256_of(doc) if task == "read" else b"")
    results_of(run, final_commit(builder.flush(), len(lengths)), task, **changed)
    return run
