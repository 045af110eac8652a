"""Shards: what goes in comes out, few files however often one commits, and errors that reach the caller."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from store_cases import ENVIRONMENT, ids_of, logprobs_of, state_of, vector_of

from rwkvmpi.errors import UserError
from rwkvmpi.store.shard_file import ShardFile
from rwkvmpi.store.shards import Cut, ShardBuilder, ShardWriter, merge_cuts


def add(builder: ShardBuilder, doc: int, first: int, count: int) -> None:
    builder.add_tokens(doc, first, ids_of(doc, first, count), logprobs_of(doc, first, count))


def pieces_of(folder: Path, name: str) -> list[tuple[int, int, int]]:
    with ShardFile(folder / name) as file:
        columns = [file.column("pieces", column).tolist() for column in ("document", "first_token", "count")]
        return list(zip(*columns, strict=True))


def test_adjacent_pieces_are_one_and_everything_comes_back(tmp_path: Path) -> None:
    builder = ShardBuilder(tmp_path, 3, 7)
    add(builder, 5, 0, 10)
    add(builder, 5, 10, 1)
    add(builder, 5, 12, 3)
    add(builder, 6, 15, 2)
    builder.add_embedding(1, 2, 30, 4, vector_of(1, 2))
    builder.add_state(4, 1, *state_of(4, 1))
    builder.add_document(5, 99, 15, True)
    builder.add_document(6, 1, 2, False, "schlecht \udcff")
    builder.add_inflight(8, 64, 2, *state_of(8, 2, 64))
    builder.add_carry(8, 64, b"abc")
    builder.add_carry(9, 32, np.arange(5, dtype=np.uint8))
    results, states = builder.flush()
    assert (results.kind, states.kind) == ("results", "state")
    assert (results.writer, states.writer) == ((3, 7), (3, 7))
    assert (results.documents, results.failed, results.tokens) == (2, 1, 15)
    assert pieces_of(tmp_path, results.name) == [(5, 0, 11), (5, 12, 3), (6, 15, 2)]
    with ShardFile(tmp_path / results.name) as file:
        wanted = [ids_of(5, 0, 11), ids_of(5, 12, 3), ids_of(6, 15, 2)]
        assert np.array_equal(file.column("tokens", "id"), np.concatenate(wanted))
        assert np.array_equal(file.column("tokens", "logprob")[11:14], logprobs_of(5, 12, 3))
        assert np.array_equal(file.column("embeddings", "vector")[0], vector_of(1, 2))
        assert np.array_equal(file.column("states", "wkv")[0], state_of(4, 1)[0])
        assert file.errors() == ["", "schlecht \\udcff"]
        assert file.column("documents", "ok").tolist() == [1, 0]
    with ShardFile(tmp_path / states.name) as file:
        assert np.array_equal(file.column("inflight", "shift")[0], state_of(8, 2, 64)[1])
        assert file.column("carry", "data").tobytes() == b"abc\0\1\2\3\4"
        assert file.column("carry", "end").tolist() == [3, 8]
    assert builder.flush() == []


def test_what_is_given_may_change_afterwards(tmp_path: Path) -> None:
    builder = ShardBuilder(tmp_path, 1, 0)
    ids, logprobs, (wkv, shift) = ids_of(0, 0, 8), logprobs_of(0, 0, 8), state_of(1, 1)
    builder.add_tokens(0, 0, ids, logprobs)
    builder.add_state(1, 1, wkv, shift)
    builder.add_inflight(1, 32, 1, wkv, shift)
    for array in (ids, logprobs, wkv, shift):
        array[:] = 0
    results, states = builder.flush()
    with ShardFile(tmp_path / results.name) as one, ShardFile(tmp_path / states.name) as other:
        assert np.array_equal(one.column("tokens", "id"), ids_of(0, 0, 8))
        assert np.array_equal(one.column("states", "wkv")[0], state_of(1, 1)[0])
        assert np.array_equal(other.column("inflight", "shift")[0], state_of(1, 1)[1])


def test_many_commits_make_few_shards(tmp_path: Path) -> None:
    """100 commits of 100 tokens each: as many shards as 10,000 tokens fill, each in its newest version."""
    builder = ShardBuilder(tmp_path, 1, 0, limit_bytes=13_000)
    current: list = []
    for commit in range(100):
        add(builder, 0, 100 * commit, 100)
        builder.add_inflight(0, 100 * commit, 0, *state_of(0, 0))
        current = merge_cuts(current, [Cut(1, 0, commit, tuple(builder.flush()), ())])
        assert sum(ref.kind == "state" for ref in current) == 1
    results = [ref for ref in current if ref.kind == "results"]
    assert 6 <= len(results) <= 7
    pieces = [piece for ref in results for piece in pieces_of(tmp_path, ref.name)]
    assert [first for _, first, _ in pieces] == [sum(count for *_, count in pieces[:n]) for n in range(len(pieces))]
    assert sum(count for *_, count in pieces) == 10_000


def test_large_items_make_larger_shards(tmp_path: Path) -> None:
    builder = ShardBuilder(tmp_path, 1, 0, limit_bytes=1000)
    wkv, shift = np.zeros((4, 16, 16), np.float32), np.zeros((2, 64), np.float32)
    for doc in range(40):
        builder.add_state(doc, 0, wkv, shift)
    assert [ref.nbytes > 16 * wkv.nbytes for ref in builder.flush()] == [True, True, False]


def test_a_cut_has_two_moments(tmp_path: Path) -> None:
    """Results between begin_cut and end_cut belong to the next commit, states to this one."""
    writer = ShardWriter(tmp_path, 1, 0, limit_bytes=4000)
    add(writer, 0, 0, 64)
    writer.add_document(3, 1, 1, True)
    writer.begin_cut(1)
    writer.add_inflight(0, 64, 0, *state_of(0, 0))
    add(writer, 0, 64, 1000)  # over the limit: written while the cut is open
    writer.add_document(4, 1, 1, True)
    writer.add_carry(0, 64, b"x")
    with pytest.raises(RuntimeError, match="commit 2 begins while commit 1 is still open"):
        writer.begin_cut(2)
    first = writer.end_cut(1).result()
    assert first.documents == (3,)
    assert [ref.kind for ref in first.refs] == ["results", "state"]
    assert pieces_of(tmp_path, first.refs[0].name) == [(0, 0, 64)]
    second = writer.cut(2).result()
    assert second.documents == (4,)
    assert pieces_of(tmp_path, second.refs[0].name) == [(0, 0, 1064)]
    merged = merge_cuts(merge_cuts([], [first]), [second])
    assert sum(ref.documents for ref in merged) == 2
    assert [ref.kind for ref in merged if ref.name not in {r.name for r in second.refs}] == []
    assert Cut.from_json(second.to_json()) == second
    assert writer.cut(3).result().refs == ()
    writer.close()


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    builder = ShardBuilder(tmp_path, 1, 0)
    good = ids_of(0, 0, 3), logprobs_of(0, 0, 3)
    for ids, logprobs in (
        (good[0].astype(np.int64), good[1]),
        (good[0], good[1].astype(np.float64)),
        (good[0][:2], good[1]),
        (good[0][:0], good[1][:0]),
        (good[0].reshape(3, 1), good[1]),
    ):
        with pytest.raises(ValueError, match=r"int32|float32|log-prob"):
            builder.add_tokens(0, 0, ids, logprobs)
    with pytest.raises(ValueError, match="shift is float32 of shape"):
        builder.add_state(0, 0, np.zeros((2, 2), np.float32), np.zeros(4, np.float32))
    assert builder.flush() == []


FULL = textwrap.dedent(
    """
    import resource, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from store_cases import *
    from rwkvmpi.errors import UserError
    from rwkvmpi.store.shards import ShardWriter
    folder = Path(sys.argv[1])
    run = new_run(folder)
    if sys.argv[3] == "shards":
        writer = ShardWriter(run.shards, 1, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        writer.add_tokens(0, 0, ids_of(0, 0, 100_000), logprobs_of(0, 0, 100_000))
        future = writer.cut(1)
        try:
            future.result()
        except UserError as error:
            print("future:", error)
        try:
            writer.add_document(0, 1, 1, True)
        except UserError as error:
            print("next call:", error)
    else:
        builder = ShardBuilder(run.shards, 1, 0)
        for doc in range(20):
            builder.add_tokens(doc, 0, ids_of(doc, 0, 10_000), logprobs_of(doc, 0, 10_000))
            builder.add_document(doc, 1, 10_000, True)
        refs = builder.flush()
        results_of(run, final_commit(refs, 20))
        before = run.results.read_bytes()
        for limit in (int(sys.argv[4]), len(before) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                results_of(run, final_commit(refs, 20))
            except UserError as error:
                print("results:", error)
        assert run.results.read_bytes() == before
    print(sorted(path.name for path in folder.rglob("*.tmp")))
    """
)


def full_disk(tmp_path: Path, what: str, limit: int = 0) -> str:
    arguments = [str(tmp_path / "run"), str(Path(__file__).parent), what, str(limit)]
    command = [sys.executable, "-c", FULL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.endswith("[]\n")
    return done.stdout


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    said = full_disk(tmp_path, "shards").splitlines()
    sentence = f"{tmp_path}/run/shards: 0001-00000-00000-000.h5 ("
    assert said[0].startswith(f"future: {sentence}")
    assert said[1].startswith(f"next call: {sentence}")
    assert "bytes) cannot be written: File too large; free some space" in said[0]


@pytest.mark.parametrize("limit", [100, 5_000, 300_000])
def test_a_full_disk_does_not_harm_the_results(tmp_path: Path, limit: int) -> None:
    """HDF5 itself crashes the process when it cannot write while closing a file."""
    said = full_disk(tmp_path, "results", limit).splitlines()
    assert len(said) == 3
    assert all(line.startswith(f"results: {tmp_path}/run: results.h5") for line in said[:2])


def test_the_compute_loop_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an fsync of 0.2 s, a cut of four shards returns at once; the Future comes when all are safe."""
    import os

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.1), fsync(descriptor))[1])
    writer = ShardWriter(tmp_path, 1, 0, limit_bytes=100_000)
    begun = time.perf_counter()
    for start in range(0, 40_000, 1000):
        add(writer, 0, start, 1000)
    future = writer.cut(1)
    asked = time.perf_counter() - begun
    cut = future.result()
    assert len(cut.refs) >= 4
    assert time.perf_counter() - begun > 0.2 * len(cut.refs) > 4 * asked
    assert writer.waited_s == 0
    writer.close()


def test_damaged_shards_are_refused_with_a_sentence(tmp_path: Path) -> None:
    builder = ShardBuilder(tmp_path, 1, 0)
    add(builder, 0, 0, 20_000)
    name = builder.flush()[0].name
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    place = data.index(ids_of(0, 0, 100).tobytes()) + 17
    data[place] ^= 4
    path.write_bytes(data)
    with ShardFile(path) as file, pytest.raises(UserError, match="/tokens/id is damaged"):
        file.column("tokens", "id")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be opened as HDF5"):
        ShardFile(path)
