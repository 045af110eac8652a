"""results.h5: the same whatever way its parts came about, exact, and refused when something is missing."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import (
    LAYERS,
    Entry,
    entries,
    final_commit,
    ids_of,
    last_of,
    logprobs_of,
    new_run,
    results_of,
    sha256_of,
    simple_run,
    state_of,
    vector_of,
)

from rwkvmpi.errors import UserError
from rwkvmpi.store.commits import Commit
from rwkvmpi.store.results import content_digest, open_results, write_results
from rwkvmpi.store.shards import ShardBuilder

LENGTHS = [100, 0, 1, 65_536, 31, 70_000]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digest of each task's results when one rank reads LENGTHS in order; document 4 fails."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        task: content_digest(simple_run(folder / task, LENGTHS, task, failed=[4]).results)
        for task in ("score", "embed", "read")
    }


@st.composite
def arrangements(draw: st.DrawFn) -> list[tuple[int, int, int, int, int]]:
    """(doc, first, count, attempt, rank) of pieces in any order, cut anywhere."""
    parts = []
    for doc, length in enumerate(LENGTHS):
        cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=5)) if length > 1 else [])
        for first, end in zip([0, *cuts], [*cuts, length], strict=True):
            if end > first:
                parts.append((doc, first, end - first, draw(st.integers(1, 3)), draw(st.integers(0, 2))))
    return draw(st.permutations(parts))


@settings(max_examples=12, deadline=None)
@given(arrangements(), st.permutations(range(len(LENGTHS))), st.sampled_from([600, 40_000, 1 << 22]), st.booleans())
def test_any_arrangement_of_the_parts_gives_the_same_results(
    undisturbed: dict[str, str],
    pieces: list[tuple[int, int, int, int, int]],
    order: list[int],
    limit: int,
    flush_between: bool,
) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        for task, digest in undisturbed.items():
            run = new_run(folder / task)
            builders = {(a, r): ShardBuilder(run.shards, a, r, limit) for a in (1, 2, 3) for r in (0, 1, 2)}
            refs = {}
            for doc, first, count, attempt, rank in pieces if task == "score" else ():
                builder = builders[attempt, rank]
                builder.add_tokens(doc, first, ids_of(doc, first, count), logprobs_of(doc, first, count))
                if flush_between:
                    refs.update({ref.slot: ref for ref in builder.flush()})
            for number, doc in enumerate(order):
                builder = builders[1 + number % 3, number % 2]
                ok = doc != 4
                if task == "embed":
                    builder.add_embedding(doc, 0, 0, LENGTHS[doc], vector_of(doc, 0))
                for layer in range(LAYERS) if task == "read" else ():
                    builders[1 + layer % 3, layer % 2].add_state(doc, layer, *state_of(doc, layer))
                if task == "read":
                    builders[1 + doc % 3, 2].add_output(doc, last_of(doc))
                text = sha256_of(doc) if task == "read" and ok else b""
                error = "" if ok else "document 4 is broken"
                builder.add_document(doc, 2 * LENGTHS[doc], LENGTHS[doc], ok, error, text)
            for builder in builders.values():
                refs.update({ref.slot: ref for ref in builder.flush()})
            assert results_of(run, final_commit(refs.values(), len(LENGTHS)), task) == digest
            assert content_digest(run.results) == digest
    finally:
        shutil.rmtree(folder)


def test_values_and_sums(tmp_path: Path) -> None:
    run = simple_run(tmp_path / "run", LENGTHS, failed=[4])
    with h5py.File(run.results) as file, open_results(run.path) as results:
        for doc, length in enumerate(LENGTHS):
            row = results.documents[doc]
            ids, logprobs = results.tokens(doc)
            if doc == 4:
                assert (row.status, row.tokens, row.bytes, row.error) == ("failed", 0, 0, "document 4 is broken")
                assert math.isnan(row.nll)
                assert math.isnan(row.bits_per_byte)
                continue
            assert (row.id, row.source, row.status) == (f"doc{doc}", f"/in/file{doc // 3}.txt", "ok")
            assert (row.tokens, row.bytes) == (length, 2 * length)
            assert np.array_equal(ids, ids_of(doc, 0, length))
            assert np.array_equal(logprobs, logprobs_of(doc, 0, length))
            assert row.nll == pytest.approx(-math.fsum(logprobs.tolist()), rel=1e-12)
            assert row.bits_per_byte == (row.nll / math.log(2) / (2 * length) if length else 0.0)
            assert file["documents/first_token"][doc] == sum(LENGTHS[n] for n in range(doc) if n != 4)
        assert file["documents/status"].dtype.metadata["enum"] == {"ok": 0, "failed": 1}
        bare = [path for path in results.shapes() if not file[path].fletcher32]
        assert bare == ["documents/id", "documents/source", "documents/error"]  # HDF5 cannot, for text
        assert len(file["tokens/id"]) == sum(LENGTHS) - LENGTHS[4]


def test_a_sum_depends_on_its_document_alone(tmp_path: Path) -> None:
    """Documents around it move it across windows and blocks; its nll keeps its bits."""
    alone = simple_run(tmp_path / "alone", [70_000])
    among = simple_run(tmp_path / "among", [70_000, 200_001, 262_144 - 70_000 - 1, 5])
    shifted = new_run(tmp_path / "shifted")
    builder = ShardBuilder(shifted.shards, 1, 0)
    for doc, (like, count) in enumerate([(7, 262_100), (0, 70_000), (8, 33)]):
        builder.add_tokens(doc, 0, ids_of(like, 0, count), logprobs_of(like, 0, count))
        builder.add_document(doc, count, count, True)
    results_of(shifted, final_commit(builder.flush(), 3))
    sums = []
    for run, doc in ((alone, 0), (among, 0), (shifted, 1)):
        with open_results(run.path) as results:
            sums.append(results.documents[doc].nll)
    assert sums[0] == sums[1] == sums[2]
    with open_results(among.path) as results:  # the window's edge lies inside its first block
        assert results.documents[1].nll == pytest.approx(-math.fsum(logprobs_of(1, 0, 200_001).tolist()), rel=1e-12)


def broken(tmp_path: Path, task: str, *parts: tuple) -> str:
    """The complaint about a run of two documents of 10 tokens to which these parts were added."""
    run = new_run(tmp_path / "run")
    builder = ShardBuilder(run.shards, 1, 0)
    for doc in range(2):
        builder.add_document(doc, 10, 10, True)
    for doc, place, count in parts:
        if task == "score":
            builder.add_tokens(doc, place, ids_of(doc, place, count), logprobs_of(doc, place, count))
        elif task == "embed":
            builder.add_embedding(doc, place // 5, place, count, vector_of(doc, place))
        else:
            builder.add_state(doc, place, *state_of(doc, place))
    with pytest.raises(UserError) as caught:
        results_of(run, final_commit(builder.flush(), 2), task)
    assert list(run.path.glob("results*")) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("task", "parts", "complaint"),
    [
        ("score", [(0, 0, 10), (1, 0, 4), (1, 6, 4)], "document 1: token 4 is missing"),
        ("score", [(0, 0, 10), (1, 0, 6), (1, 5, 5)], "document 1: token 5 was recorded more than once"),
        ("score", [(0, 0, 10), (1, 0, 10), (1, 0, 10)], "document 1: token 0 was recorded more than once"),
        ("score", [(0, 3, 7), (1, 0, 10)], "document 0: token 0 is missing"),
        ("score", [(0, 0, 10), (1, 0, 9)], "document 1: token 9 is missing"),
        ("score", [(0, 0, 11), (1, 0, 10)], "document 0: token 10 was recorded, which it does not have"),
        ("score", [(0, 0, 10)], "document 1: token 0 is missing"),
        ("embed", [(0, 0, 5), (0, 5, 5), (1, 0, 10), (1, 0, 10)], "document 1: token 0 was recorded more than once"),
        ("embed", [(0, 0, 5), (1, 0, 10)], "document 0: token 5 is missing"),
        ("embed", [(0, 0, 3), (0, 3, 7), (1, 0, 10)], "document 0: window 1 was recorded as window 0"),
        (
            "read",
            [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (1, 2, 0)],
            "document 1: the state of layer 1 is missing",
        ),
        ("read", [(0, n, 0) for n in (0, 1, 1, 2)], "document 0: the state of layer 1 was recorded more than once"),
        ("read", [(0, n, 0) for n in (0, 1, 2, 3)], "document 0: a state of a layer outside 0..2"),
        ("read", [(n // 3, n % 3, 0) for n in range(6)], "document 0: the output after its last token is missing"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path: Path, task: str, parts: list[tuple], complaint: str) -> None:
    assert complaint in broken(tmp_path, task, *parts)


def test_missing_documents_and_other_input_are_named(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    builder = ShardBuilder(run.shards, 1, 0)
    builder.add_document(0, 0, 0, True)
    refs = builder.flush()
    with pytest.raises(UserError, match="document 1: no result was recorded"):
        results_of(run, final_commit(refs, 2))
    with pytest.raises(UserError, match=r"outside 0\.\.-1"):
        results_of(run, final_commit(refs, 0))
    again = ShardBuilder(run.shards, 2, 0)
    again.add_document(0, 0, 0, True)
    with pytest.raises(UserError, match="document 0: more than one result"):
        results_of(run, final_commit([*refs, *again.flush()], 1))
    facts = {"task": "score", "model_sha256": "", "tokenizer": "", "job": {}, "provenance": {}, "layers": 1}
    with pytest.raises(UserError, match="input has 2 documents, the run 1"):
        write_results(run, final_commit(refs, 1), entries(2), **facts)  # type: ignore[arg-type]


def test_what_failed_or_was_begun_again_leaves_no_trace(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    first, second = ShardBuilder(run.shards, 1, 0), ShardBuilder(run.shards, 2, 0)
    first.add_tokens(0, 0, ids_of(5, 0, 64), logprobs_of(5, 0, 64))  # then attempt 2 read document 0 from its start
    first.add_tokens(1, 0, ids_of(1, 0, 32), logprobs_of(1, 0, 32))  # then document 1 broke off
    second.add_tokens(0, 0, ids_of(0, 0, 100), logprobs_of(0, 0, 100))
    second.add_document(0, 200, 100, True)
    second.add_document(1, 99, 32, False, "cut off")
    second.add_document(2, 0, 0, True)
    refs = (*first.flush(), *second.flush())
    results_of(run, Commit(1, 2, "job", 3, refs, restarted={0: 2}))
    with open_results(run.path) as results:
        assert np.array_equal(results.tokens(0)[0], ids_of(0, 0, 100))
        assert [row.tokens for row in results.documents] == [100, 0, 0]
        assert results.documents[1].error == "cut off"
        assert results.documents[2].bits_per_byte == 0.0


def test_embeddings_and_states(tmp_path: Path) -> None:
    run = new_run(tmp_path / "windows")
    builder = ShardBuilder(run.shards, 1, 0)
    for doc, window, first, count in ((1, 1, 5, 5), (0, 0, 0, 5), (1, 2, 10, 2), (0, 1, 5, 1), (1, 0, 0, 5)):
        builder.add_embedding(doc, window, first, count, vector_of(doc, window))
    for doc, count in enumerate((6, 12, 0)):
        builder.add_document(doc, count, count, True)
    results_of(run, final_commit(builder.flush(), 3), "embed")
    with open_results(run.path) as results:
        rows = results.embeddings(1)
        assert rows["first_token"].tolist() == [0, 5, 10]
        assert rows["tokens"].tolist() == [5, 5, 2]
        assert np.array_equal(rows["vector"], np.stack([vector_of(1, window) for window in range(3)]))
        assert results.embeddings()["document"].tolist() == [0, 0, 1, 1, 1]
        with pytest.raises(UserError, match="task embed, which has no tokens"):
            results.tokens(0)
    run = simple_run(tmp_path / "states", [3, 4, 5], "read", failed=[1])
    with open_results(run.path) as results:
        for doc in (0, 2):
            wkv, shift = results.state(doc)
            assert np.array_equal(wkv, np.stack([state_of(doc, layer)[0] for layer in range(LAYERS)]))
            assert np.array_equal(shift, np.stack([state_of(doc, layer)[1] for layer in range(LAYERS)]))
        assert all(np.isnan(values).all() for values in results.state(1))


def test_the_digest_covers_what_is_said_and_nothing_else(tmp_path: Path) -> None:
    run = simple_run(tmp_path / "run", [40, 2])
    digest = content_digest(run.results)
    simple_run(tmp_path / "other", [40, 2])
    with h5py.File(run.results, "r+") as file:
        file.attrs["creator"] = "somebody else"
        file.attrs["job"] = "{}"
        file["provenance"].attrs["host"] = "another"
        assert content_digest_changes(file, run.results, digest) == []
        changes = content_digest_changes(
            file,
            run.results,
            digest,
            lambda f: f["tokens/logprob"].__setitem__(39, -0.5),
            lambda f: f["documents/id"].__setitem__(0, "doc1"),
            lambda f: f["documents/status"].__setitem__(1, 1),
            lambda f: f.attrs.__setitem__("tokenizer", "world"),
            lambda f: f["documents"].move("error", "mistake"),
        )
    assert len(changes) == 5
    assert len(set(changes)) == 5


def content_digest_changes(file: h5py.File, path: Path, digest: str, *changes: object) -> list[str]:
    """The digests after each change, one upon the other, that differ from the one before."""
    found = []
    for change in changes or (lambda _: None,):
        change(file)  # type: ignore[operator]
        file.flush()
        copy = path.with_name("copy.h5")
        shutil.copyfile(path, copy)
        now = content_digest(copy)
        if now != digest:
            found.append(now)
        digest = now
    return found


def test_nasty_texts_survive(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    builder = ShardBuilder(run.shards, 1, 0)
    names = ["", "a\0b", "\udcff", "\ud800x", "日本", "e\u0301\U0001f600", "x" * 100_000]
    for doc, name in enumerate(names):
        builder.add_document(doc, 0, 0, False, name)
    facts = {"task": "score", "model_sha256": "", "tokenizer": ["20B", "ff"], "layers": 1}
    provenance = {"ranks": [{"host": "n" * 50}] * 5000, "argv": "x"}
    commit = final_commit(builder.flush(), len(names))
    documents = [Entry(name, name) for name in names]
    digest = write_results(run, commit, documents, job={"a": "\ud800" * 70_000}, provenance=provenance, **facts)  # type: ignore[arg-type]
    assert content_digest(run.results) == digest
    with open_results(run.path) as results:
        shown = ["", "a\\x00b", "\\udcff", "\\ud800x", *names[4:]]
        assert [row.id for row in results.documents] == [row.error for row in results.documents] == shown
        assert results.tokenizer == "20B ff"
        assert len(results.provenance["ranks"]) > 1 << 18


def test_other_peoples_files_are_refused(tmp_path: Path) -> None:
    run = simple_run(tmp_path / "run", [40, 2])

    def refused(change: object) -> str:
        copy = tmp_path / "copy.h5"
        shutil.copyfile(run.results, copy)
        with h5py.File(copy, "r+") as file:
            change(file)  # type: ignore[operator]
        with pytest.raises(UserError) as caught:
            open_results(copy)
        return str(caught.value)

    assert "is not a results file" in refused(lambda f: f.attrs.__setitem__("format", "x"))
    assert "reads 1; use the version" in refused(lambda f: f.attrs.__setitem__("format_version", 2))
    assert "task 'x' is unknown" in refused(lambda f: f.attrs.__setitem__("task", "x"))
    assert "/documents/nll is missing" in refused(lambda f: f.__delitem__("documents/nll"))
    assert "different lengths" in refused(lambda f: replace(f, "tokens/id", np.zeros(3, np.int32)))
    assert "/tokens/id is int64" in refused(lambda f: replace(f, "tokens/id", np.zeros(42, np.int64)))
    (tmp_path / "no.h5").write_bytes(b"no HDF5")
    with pytest.raises(UserError, match="cannot be opened as HDF5"):
        open_results(tmp_path / "no.h5")
    with pytest.raises(UserError, match="there is no such file"):
        open_results(tmp_path / "nowhere.h5")


def replace(file: h5py.File, path: str, values: np.ndarray) -> None:
    del file[path]
    file[path] = values
