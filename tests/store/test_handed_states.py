"""Going on from an earlier run: what is taken over, and what is refused with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from store_cases import (
    LAYERS,
    WIDTH,
    WKV,
    final_commit,
    last_of,
    new_run,
    results_of,
    sha256_of,
    simple_run,
    state_of,
)

from rwkvmpi.corpus.index import DocumentRef
from rwkvmpi.errors import UserError
from rwkvmpi.store.handoff import HandedStates, Handoff, take_over
from rwkvmpi.store.results import open_results
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.shards import ShardBuilder

LENGTHS = [100, 0, 7, 31]
SETTINGS = {"device": "cpu", "dtype": "float32"}


@pytest.fixture
def earlier(tmp_path: Path) -> RunFolder:
    """A finished run of the task read; document 2 failed."""
    run = simple_run(tmp_path / "old", LENGTHS, "read", failed=[2], job={"task": "read", "model": SETTINGS})
    run.write_success({"documents": 4, "failed": 1})
    return run


def take(run: RunFolder, ids: list[str], **changed: Any) -> Handoff:
    facts: dict[str, Any] = {"model_sha256": "ab" * 32, "tokenizer": "bytes", "settings": SETTINGS}
    shapes = {"state_shape": (LAYERS, *WKV), "shift_shape": (LAYERS, 2, WIDTH)}
    folder = run.path.with_name("new")
    return take_over(str(run.path), folder, **{**facts, **shapes, **changed}, count=len(ids), id_of=ids.__getitem__)


def test_documents_are_found_by_id_and_states_come_from_their_rows(earlier: RunFolder) -> None:
    handed = take(earlier, ["new", "doc3", "doc2", "doc0", "doc1"])
    assert handed.rows.tolist() == [-1, 3, -1, 0, 1]
    assert handed.bytes_before.tolist() == [0, 62, 0, 200, 0]
    assert handed.tokens_before.tolist() == [0, 31, 0, 100, 0]
    assert handed.bytes_left(np.full(5, 100)).tolist() == [100, 38, 100, 0, 100]
    said = handed.summary()
    assert "3 of 5 documents go on" in said
    assert "131 tokens" in said
    assert "from their start: 2, 1 of which failed there" in said
    ref = DocumentRef(1, "doc3", "x", "txt", 0, 500, None)
    assert (handed.reference(ref).handed_bytes, handed.reference(ref).handed_sha256) == (62, sha256_of(3).hex())
    start = DocumentRef(2, "doc2", "x", "txt", 0, 500, None)
    assert handed.reference(start) == start
    states = HandedStates.from_share(handed.share())
    for doc, row in ((1, 3), (3, 0), (4, 1)):
        assert np.array_equal(states.load_last(doc), last_of(row))
        for layer in range(LAYERS):
            for found, wanted in zip(states.load_state(doc, layer), state_of(row, layer), strict=True):
                assert np.array_equal(found, wanted)


def test_what_was_read_before_adds_up_over_runs(earlier: RunFolder) -> None:
    run = new_run(earlier.path.with_name("second"))
    builder = ShardBuilder(run.shards, 1, 0)
    for doc in range(2):
        for layer in range(LAYERS):
            builder.add_state(doc, layer, *state_of(doc, layer))
        builder.add_output(doc, last_of(doc))
        builder.add_document(doc, 20, 10, True, sha256=sha256_of(doc))
    before = np.array([200, 0]), np.array([100, 0])
    job = {"model": SETTINGS}
    digest = results_of(run, final_commit(builder.flush(), 2), "read", before=before, job=job)
    run.write_success({})
    with open_results(run.path) as results:
        row = results.documents[0]
        assert (row.bytes, row.tokens, row.bytes_before, row.tokens_before) == (20, 10, 200, 100)
        assert results.content_sha256 == digest
    handed = take(run, ["doc0", "doc1"])
    assert handed.content_sha256 == digest
    assert (handed.bytes_before.tolist(), handed.tokens_before.tolist()) == ([220, 20], [110, 10])


def refused(run: RunFolder, **changed: Any) -> str:
    with pytest.raises(UserError) as caught:
        take(run, ["doc0"], **changed)
    assert str(run.path) in str(caught.value)
    return str(caught.value)


def test_what_does_not_suit_is_refused(earlier: RunFolder, tmp_path: Path) -> None:
    said = refused(earlier, model_sha256="cd" * 32)
    assert "ab" * 32 in said
    assert "cd" * 32 in said
    assert "tokenizer bytes, and this job has world" in refused(earlier, tokenizer="world")
    assert "give --dtype float32" in refused(earlier, settings={**SETTINGS, "dtype": "bfloat16"})
    assert "device = cpu, and this job has cuda" in refused(earlier, settings={**SETTINGS, "device": "cuda"})
    assert "states/shift has shape" in refused(earlier, shift_shape=(LAYERS, 2, 8))
    scored = simple_run(tmp_path / "scored", [5])
    scored.write_success({})
    assert "task score, which keeps no states" in refused(scored)
    assert "holds no run" in refused(RunFolder(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="the run folder of -o too"):
        take_over(str(earlier.path), earlier.path / ".", model_sha256="", tokenizer="", settings={},
                  state_shape=(), shift_shape=(), count=0, id_of=str)  # fmt: skip
    earlier.success.unlink()
    assert "is not finished" in refused(earlier)


@pytest.mark.parametrize("dataset", ["states/wkv", "states/last", "states/text_sha256", "documents/bytes"])
def test_a_changed_value_is_found_before_anything_is_read(earlier: RunFolder, dataset: str) -> None:
    with h5py.File(earlier.results, "r+") as file:
        file[dataset][0] = file[dataset][0] + 1
    assert "SHA-256 differs" in refused(earlier)
    earlier.write_success({})  # who made the file anew has not made its digest
    assert "was recorded; restore it from a copy" in refused(earlier)


def test_results_of_the_first_version_are_read_but_not_gone_on_from(earlier: RunFolder) -> None:
    with h5py.File(earlier.results, "r+") as file:
        del file["states/last"], file["states/text_sha256"]
    with open_results(earlier.path) as results:
        assert results.state(0)[0].shape == (LAYERS, *WKV)
        with pytest.raises(UserError, match="kept no states/last"):
            results.last_output(0)
    assert "kept too little to go on from" in refused(earlier)


def test_a_file_that_was_replaced_during_the_job_is_noticed(earlier: RunFolder) -> None:
    states = HandedStates.from_share(take(earlier, ["doc0"]).share())
    other = simple_run(earlier.path.with_name("other"), [3], "read")
    other.results.replace(earlier.results)
    with pytest.raises(UserError, match="another file"):
        states.load_state(0, 0)
