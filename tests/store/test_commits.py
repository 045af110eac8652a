"""Commits: complete in themselves, verified before they are believed, small, and right over several attempts."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_cases import LAYERS, ids_of, logprobs_of, new_run, results_of, state_of

from rwkvmpi.errors import UserError
from rwkvmpi.store.commits import (
    Commit,
    InFlight,
    ReplicaCommit,
    load_last_commit,
    remove_unlisted,
    verify_shards,
    write_commit,
)
from rwkvmpi.store.ledger import Ledger
from rwkvmpi.store.progress import Progress, SavedStates
from rwkvmpi.store.results import open_results
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.shard_file import shard_name
from rwkvmpi.store.shards import Cut, ShardBuilder, ShardRef

NATURAL = st.integers(0, 2**53)
IN_FLIGHT = st.builds(InFlight, NATURAL, NATURAL, NATURAL, NATURAL)
KINDS = st.sampled_from(["results", "state"])
SHARDS = st.builds(
    lambda attempt, rank, kind, serial, version, sha, numbers: ShardRef(
        shard_name(attempt, rank, kind, serial, version), sha.hex(), numbers[0], kind, *numbers[1:]
    ),
    st.integers(1, 10**5),
    st.integers(0, 10**6),
    KINDS,
    st.integers(0, 10**6),
    st.integers(0, 10**4),
    st.binary(min_size=32, max_size=32),
    st.tuples(*[NATURAL] * 4),
)
COMMITS = st.builds(
    Commit,
    number=st.integers(1, 10**7),
    attempt=st.integers(1, 10**5),
    job_sha256=st.text(max_size=8),
    documents_total=NATURAL,
    shards=st.lists(SHARDS, unique_by=lambda ref: ref.name).map(lambda refs: tuple(sorted(refs, key=str))),
    replicas=st.lists(st.builds(ReplicaCommit, NATURAL, NATURAL, st.none() | IN_FLIGHT)).map(tuple),
    waiting=st.lists(IN_FLIGHT).map(tuple),
    restarted=st.dictionaries(NATURAL, NATURAL),
    extra=st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3)),
)


@given(COMMITS)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, commit: Commit) -> None:
    path = tmp_path_factory.getbasetemp() / "commit.json"
    path.write_bytes(commit.to_bytes())
    found = Commit.read(path)
    assert sorted(found.shards, key=str) == sorted(commit.shards, key=str)
    assert {**vars(found), "shards": ()} == {**vars(commit), "shards": ()}


def test_a_commit_of_very_many_shards_is_small(tmp_path: Path) -> None:
    """A billion tokens: 2,000 shards. 256 ranks with their states: 256 more."""
    names = [shard_name(1, number % 64, "results", number // 64, 17) for number in range(2000)]
    refs = [ShardRef(name, "ab" * 32, 4_300_000, "results") for name in names]
    refs += [ShardRef(shard_name(1, rank, "state", 700, 0), "cd" * 32, 900_000, "state") for rank in range(256)]
    assert len(Commit(700, 1, "ef" * 32, 10**6, tuple(refs)).to_bytes()) < 260_000


def test_a_changed_commit_is_not_believed(tmp_path: Path) -> None:
    ref = ShardRef(shard_name(1, 0, "results", 0, 0), "ab" * 32, 10, "results", 1, 0, 5)
    data = Commit(3, 1, "job", 9, (ref,), (ReplicaCommit(0, 2, InFlight(4, 32, 1, 2)),)).to_bytes()
    path = tmp_path / "000003.json"
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        with pytest.raises(ValueError, match="it "):
            Commit.read(path)
    for wrong in (b"", b"[]", b"null", data[:-1], b"{}", data.replace(b'"rank":0', b'"rank":1'), b'{"a":' * 100_000):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="it "):
            Commit.read(path)


def run_with_commits(path: Path, commits: int, limit: int = 1 << 22) -> RunFolder:
    """One document in flight, 64 tokens further at every commit."""
    run = new_run(path)
    ledger, builder = Ledger(run, 1, "job", 2), ShardBuilder(run.shards, 1, 0, limit)
    for number in range(1, commits + 1):
        first = 64 * (number - 1)
        builder.add_tokens(0, first, ids_of(0, first, 64), logprobs_of(0, first, 64))
        for layer in range(LAYERS):
            builder.add_inflight(0, 64 * number, layer, *state_of(0, layer, 64 * number))
        builder.add_carry(0, 64 * number, bytes([number]))
        cut = Cut(1, 0, number, tuple(builder.flush()), ())
        ledger.apply(0, number, [cut], InFlight(0, 64 * number, 60 * number, 64 * number - 4))
        ledger.write()
    return run


def check_progress(progress: Progress, number: int) -> None:
    assert progress.in_flight == [InFlight(0, 64 * number, 60 * number, 64 * number - 4)]
    assert (progress.documents_done, progress.tokens_done) == (0, 64 * number)
    ends = [0]
    for piece in progress.pieces(0):
        assert piece.first_token == ends[-1]
        ends.append(piece.first_token + piece.count)
    assert ends[-1] == 64 * number
    for layer in range(LAYERS):
        for found, wanted in zip(progress.load_state(0, layer), state_of(0, layer, 64 * number), strict=True):
            assert np.array_equal(found, wanted)
    assert progress.load_carry(0).tolist() == [number]


def test_two_commits_are_kept_and_shards_of_older_ones_removed(tmp_path: Path) -> None:
    run = run_with_commits(tmp_path / "run", 9, limit=1500)
    assert [path.name for path in run.commit_paths()] == ["000009.json", "000008.json"]
    listed = [{ref.name for ref in Commit.read(path).shards} for path in run.commit_paths()]
    assert {path.name for path in run.shard_paths()} == listed[0] | listed[1]
    assert sum("-s" in path.name for path in run.shard_paths()) == 2
    last = load_last_commit(run)
    assert last is not None
    check_progress(Progress(run, last), 9)
    assert remove_unlisted(run) == []


def test_both_kept_commits_stay_whole_when_replicas_take_turns(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    ledger, ranks = Ledger(run, 1, "job", 9), [Rank(run, 1, 0), Rank(run, 1, 1)]
    for number, replica in enumerate((0, 1, 1, 1, 0, 0, 1, 0, 0, 0), start=1):
        ranks[replica].read(replica, 64 * number, 64 * number + 64)
        ledger.apply(replica, number, [ranks[replica].cut(number, at(replica, 64))], at(replica, 64))
        ledger.write()
        for path in run.commit_paths():
            assert verify_shards(run.shards, Commit.read(path).shards) == []


def test_a_state_of_another_position_does_not_count(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    for order in ((32, 64, 96), (96, 64, 32)):
        builder = ShardBuilder(run.shards, order[0], 0)
        for position in order:
            builder.add_inflight(5, position, 1, *state_of(5, 1, position))
            builder.add_carry(5, position, bytes([position]))
        progress = Progress(run, Commit(1, 1, "job", 9, tuple(builder.flush()), waiting=(at(5, 64),)))
        assert np.array_equal(progress.load_state(5, 1)[0], state_of(5, 1, 64)[0])
        assert progress.load_carry(5).tolist() == [64]


def test_a_bad_commit_is_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for damage in ("commit", "shard", "missing"):
        run = run_with_commits(tmp_path / damage, 5)
        newest, older = run.commit_paths()
        only = {ref.name for ref in Commit.read(newest).shards} - {ref.name for ref in Commit.read(older).shards}
        shard = run.shards / sorted(only)[0]
        if damage == "missing":
            shard.unlink()
        else:
            path = newest if damage == "commit" else shard
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            last = load_last_commit(run, discard_bad=True)
        assert last is not None
        check_progress(Progress(run, last), 4)
        assert "passed over commit 000005.json" in caplog.text
        assert [path.name for path in run.commit_paths()] == ["000004.json"]
        assert set(remove_unlisted(run)) == only - ({shard.name} if damage == "missing" else set())


def test_when_no_commit_can_be_believed_the_user_is_told(tmp_path: Path) -> None:
    assert load_last_commit(new_run(tmp_path / "new")) is None
    run = run_with_commits(tmp_path / "run", 5)
    next(path for path in run.shard_paths() if "-s" not in path.name).write_bytes(b"")
    run.commit_paths()[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"no commit can be used \(000005.json: .*; 000004.json: .*has 0 bytes"):
        load_last_commit(run, discard_bad=True)
    assert len(run.commit_paths()) == 2  # nothing is thrown away


def test_every_flipped_bit_of_a_shard_is_found(tmp_path: Path) -> None:
    run = run_with_commits(tmp_path / "run", 2)
    last = load_last_commit(run)
    assert last is not None
    source = random.Random(1)
    for ref in last.shards:
        path = run.shards / ref.name
        data = path.read_bytes()
        for _ in range(60):
            changed = bytearray(data)
            changed[source.randrange(len(data))] ^= 1 << source.randrange(8)
            path.write_bytes(changed)
            assert verify_shards(run.shards, [ref]) == [f"{ref.name} is damaged (its SHA-256 differs)"]
        path.write_bytes(data)
    assert verify_shards(run.shards, last.shards) == []


class Rank:
    """One rank of one attempt, for jobs told by hand."""

    def __init__(self, run: RunFolder, attempt: int, rank: int = 0) -> None:
        self.attempt, self.rank = attempt, rank
        self.builder = ShardBuilder(run.shards, attempt, rank)
        self.finished: list[int] = []

    def read(self, doc: int, first: int, end: int) -> None:
        self.builder.add_tokens(doc, first, ids_of(doc, first, end - first), logprobs_of(doc, first, end - first))

    def finish(self, doc: int, tokens: int) -> None:
        self.builder.add_document(doc, tokens, tokens, True)
        self.finished.append(doc)

    def cut(self, number: int, in_flight: InFlight | None) -> Cut:
        if in_flight is not None:
            doc, position = in_flight.doc, in_flight.position
            for layer in range(LAYERS):
                self.builder.add_inflight(doc, position, layer, *state_of(doc, layer, position))
        finished, self.finished = tuple(self.finished), []
        return Cut(self.attempt, self.rank, number, tuple(self.builder.flush()), finished)


def at(doc: int, position: int) -> InFlight:
    return InFlight(doc, position, position, position)


def resume(run: RunFolder) -> tuple[int, Progress]:
    attempt = run.next_attempt()
    commit = load_last_commit(run, discard_bad=True)
    remove_unlisted(run)
    assert commit is not None
    return attempt, Progress(run, commit)


def test_documents_wait_through_attempts_until_they_are_taken_up(tmp_path: Path) -> None:
    """Three replicas leave three documents in flight; one rank goes on, is killed twice, and ends them all."""
    run = new_run(tmp_path / "run")
    lengths = [200, 200, 200, 96]
    ledger = Ledger(run, run.next_attempt(), "job", 4)
    for replica in (2, 0, 1):  # they cut at moments of their own
        rank = Rank(run, 1, replica)
        rank.read(replica, 0, 64)
        ledger.apply(replica, 1, [rank.cut(1, at(replica, 64))], at(replica, 64))
        ledger.write()
    assert ledger.waiting == []

    attempt, progress = resume(run)
    assert [entry.doc for entry in progress.in_flight] == [0, 1, 2]
    ledger, rank = Ledger(run, attempt, "job", 4, progress), Rank(run, attempt)
    ledger.write()  # nothing read yet: everything still waits
    rank.read(1, 64, 128)
    ledger.apply(0, 1, [rank.cut(1, at(1, 128))], at(1, 128))
    assert [entry.doc for entry in ledger.waiting] == [0, 2]
    ledger.write()
    rank.read(1, 128, 200)  # this is lost: no commit follows

    attempt, progress = resume(run)
    assert [(entry.doc, entry.position) for entry in progress.in_flight] == [(0, 64), (1, 128), (2, 64)]
    saved = SavedStates.from_json(progress.saved.to_json())
    for entry in progress.in_flight:
        for layer in range(LAYERS):
            wanted = state_of(entry.doc, layer, entry.position)
            assert np.array_equal(saved.load_state(entry.doc, layer)[0], wanted[0])
    with pytest.raises(UserError, match="state of layer 0 of document 3 was not saved"):
        saved.load_state(3, 0)
    with pytest.raises(UserError, match="carry of the task of document 1 was not saved"):
        saved.load_carry(1)

    ledger, rank = Ledger(run, attempt, "job", 4, progress), Rank(run, attempt)
    rank.read(1, 128, 200)
    rank.finish(1, 200)
    rank.read(3, 0, 32)
    ledger.apply(0, 1, [rank.cut(1, at(3, 32))], at(3, 32))
    ledger.write()
    assert [entry.doc for entry in ledger.waiting] == [0, 2]
    assert {ref.writer[0] for ref in ledger.commit().shards if ref.kind == "state"} == {1, 3}
    rank.read(3, 32, 96)
    rank.finish(3, 96)
    ledger.restart(2)  # the lead may also decide to read one from its start
    for doc, first in ((0, 64), (2, 0)):
        rank.read(doc, first, 200)
        rank.finish(doc, 200)
    ledger.apply(0, 2, [rank.cut(2, None)], None)
    ledger.write()

    attempt, progress = resume(run)
    assert progress.in_flight == []
    assert progress.done.tolist() == [0, 1, 2, 3]
    assert progress.tokens_done == sum(lengths)
    assert [ref for ref in progress.commit.shards if ref.kind == "state"] == []
    results_of(run, Ledger(run, attempt, "job", 4, progress).commit())
    with open_results(run.path) as results:
        for doc, length in enumerate(lengths):
            assert np.array_equal(results.tokens(doc)[1], logprobs_of(doc, 0, length))


def test_a_commit_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    builders = [ShardBuilder(run.shards, 1, rank) for rank in range(2)]
    for builder in builders:
        builder.add_document(0, 0, 0, True)
    refs = [ref for builder in builders for ref in builder.flush()]
    write_commit(run, Commit(1, 1, "job", 1, tuple(refs)))
    last = load_last_commit(run)
    assert last is not None
    with pytest.raises(UserError, match="has document 0 twice"):
        Progress(run, last)
    with pytest.raises(UserError, match="both as done and in flight"):
        Progress(run, Commit(1, 1, "job", 1, (refs[0],), waiting=(at(0, 32),)))


def test_reports_of_another_cut_are_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    ledger = Ledger(run, 1, "job", 4)
    with pytest.raises(ValueError, match="a report of cut 2 among those of cut 1"):
        ledger.apply(0, 1, [Cut(1, 0, 1, (), ()), Cut(1, 1, 2, (), ())], None)
