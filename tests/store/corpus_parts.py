"""Made-up runs of the parts of one corpus, and of the whole: the same documents, numbered anew in every part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from store_cases import (
    LAYERS,
    WIDTH,
    WKV,
    entries,
    final_commit,
    ids_of,
    last_of,
    logprobs_of,
    new_run,
    sha256_of,
    state_of,
    vector_of,
)

from rwkvmpi.config import make_job
from rwkvmpi.store.files import write_durably
from rwkvmpi.store.identity import write_identity
from rwkvmpi.store.results import write_results
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.shards import ShardBuilder

LENGTHS = [100, 0, 1, 70_000, 31, 300, 0, 5]
FAILED = [4, 6]
CUTS = [0, 0, 3, 4, 8]  # four parts; the first one is empty
MODEL, TOKENIZER = "ab" * 32, ["bytes", "cd"]


def part_run(path: Path, number: int = 0, task: str = "score", before: bool = False, **identity: Any) -> RunFolder:
    """The finished run of part `number` of len(CUTS) - 1; 0: of the whole."""
    parts = len(CUTS) - 1
    first, stop = (CUTS[number - 1], CUTS[number]) if number else (0, CUTS[-1])
    run = new_run(path)
    builder = ShardBuilder(run.shards, run.next_attempt(), 0)
    for doc in range(first, stop):
        count, here = LENGTHS[doc], doc - first
        if doc in FAILED:
            builder.add_document(here, 0, 0, False, f"document {doc} is broken")
            continue
        if task == "score" and count:
            builder.add_tokens(here, 0, ids_of(doc, 0, count), logprobs_of(doc, 0, count))
        for window in range(0, count, 40) if task == "embed" else ():
            tokens = min(40, count - window)
            builder.add_embedding(here, window // 40, window, tokens, vector_of(doc, window))
        if task == "read":
            for layer in range(LAYERS):
                builder.add_state(here, layer, *state_of(doc, layer))
            builder.add_output(here, last_of(doc))
        builder.add_document(here, 2 * count, count, True, sha256=sha256_of(doc) if task == "read" else b"")
    shard = f"{number}/{parts}" if number else ""
    values = {"model": {"path": "m"}, "input": {"paths": ["in"], "shard": shard}, "task": {"name": task}}
    job = make_job({**values, "grid": {"stages": 1 + number % 2, "ring": 2}}, "test")
    facts = {
        "task": task,
        "model": MODEL,
        "tokenizer": TOKENIZER,
        "chunk": 1024,
        "input": [["in/a.txt", 5, "ef"]],
        "shard": [number, parts] if number else None,
        "documents": [first, stop, CUTS[-1]] if number else None,
    }
    write_identity(run, {**facts, **identity})
    write_durably(run.job_toml, job.to_toml().encode())
    were = np.arange(first, stop) * 10
    digest = write_results(
        run,
        final_commit(builder.flush(), stop - first),
        entries(CUTS[-1])[first:stop],
        task=task,
        model_sha256=MODEL,
        tokenizer=TOKENIZER,
        job=job.model_dump(),
        provenance={"argv": ["rwkvmpi", task], "versions": {"rwkvmpi": "0"}},
        layers=LAYERS,
        width=WIDTH,
        wkv_shape=WKV,
        before=(were, were + 1) if before else None,
    )
    failed = sum(first <= doc < stop for doc in FAILED)
    run.write_success({"documents": stop - first, "failed": failed, "content_sha256": digest})
    run.remove_parts()
    return run


def all_parts(folder: Path, task: str = "score", **more: Any) -> list[RunFolder]:
    """The runs part-01, part-02, ... in a folder."""
    return [part_run(folder / f"part-{number:02}", number, task, **more) for number in range(1, len(CUTS))]
