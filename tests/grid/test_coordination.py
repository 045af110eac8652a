"""The queue, the coordinator and the frames, without MPI and without torch: one process plays all ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkvmpi.corpus.stream import Chunk
from rwkvmpi.grid.control import Control
from rwkvmpi.grid.coordinator import STOPPED_ON_ERROR, Coordinator
from rwkvmpi.grid.frame import Frame, Word, frame_room
from rwkvmpi.grid.layout import Grid
from rwkvmpi.grid.queue import BATCH_DOCUMENTS, DocumentQueue
from rwkvmpi.grid.relay import Relay
from rwkvmpi.grid.transport import Parcel, Room
from rwkvmpi.store.commits import Commit
from rwkvmpi.store.shards import Cut


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=80), st.data(), st.integers(1, 5))
def test_every_document_is_handed_out_once_and_the_begun_ones_first(sizes, data, takers):
    total = len(sizes)
    done = data.draw(st.sets(st.integers(0, total - 1)))
    begun = data.draw(st.sets(st.integers(0, total - 1))) - done
    nbytes = np.array(sizes, dtype=np.int64)
    order = np.argsort(-nbytes, kind="stable")
    queue = DocumentQueue(order, nbytes, np.array(sorted(done)), sorted(begun), takers)
    taken: list[int] = []
    while not queue.exhausted:
        portion = queue.take()
        assert 1 <= len(portion) <= BATCH_DOCUMENTS
        taken += portion
    assert queue.take() == []
    assert taken[: len(begun)] == sorted(begun)
    assert taken[len(begun) :] == [doc for doc in order if doc not in done | begun]


class Book:
    """Stands where store.ledger.Ledger stands, and writes down what it is told."""

    def __init__(self):
        self.applied = []
        self.written = 0

    def apply(self, replica, commit, cuts, in_flight):
        self.applied.append((replica, commit, sorted(cut.rank for cut in cuts), in_flight))

    def commit(self):
        return Commit(len(self.applied), 1, "", 0)

    def save(self, commit):
        self.written += 1


def coordinator(grid, stop_on_error=False):
    control, book = Control(None), Book()
    queue = DocumentQueue(np.arange(3), np.full(3, 10), np.zeros(0, np.int64), [])
    made = Coordinator(
        control,
        grid,
        queue,
        book,
        {},
        reference=lambda doc: {"index": doc},
        on_failed=lambda doc, error: None,
        stop_on_error=stop_on_error,
    )
    return control, book, made


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_cut_counts_when_all_ranks_reported_it_and_in_its_order(replicas, ranks, cuts, source):
    """Whatever the order in which reports of different ranks arrive; each rank's own arrive in order."""
    grid = Grid(ranks, 1, replicas)
    control, book, made = coordinator(grid)
    waiting = {rank: list(range(1, cuts + 1)) for rank in range(grid.size)}
    reported = {replica: dict.fromkeys(grid.members(replica), 0) for replica in range(replicas)}
    while waiting:
        rank = source.choice(sorted(waiting))
        commit = waiting[rank].pop(0)
        if not waiting[rank]:
            del waiting[rank]
        replica = grid.place(rank).replica
        flight = [7, 32 * commit, 5, 5] if rank == grid.source(replica) else None
        cut = Cut(1, rank, commit, (), ())
        control._dispatch(rank, {"kind": "report", "replica": replica, "cut": cut.to_json(), "in_flight": flight})
        reported[replica][rank] = commit
        applied = [entry[1] for entry in book.applied if entry[0] == replica]
        assert applied == list(range(1, min(reported[replica].values()) + 1))
    for replica, commit, members, flight in book.applied:
        assert members == list(grid.members(replica))
        assert flight.position == 32 * commit
    made.save_now()
    made.save_now()  # nothing new: nothing is written
    assert book.written == 1


def test_a_wish_to_stop_reaches_every_source_once():
    control, _, made = coordinator(Grid(1, 1, 1), stop_on_error=True)
    stops = []
    control.handle("stop", lambda source, message: stops.append(source))
    control._dispatch(0, {"kind": "failed", "doc": 1, "error": "gone"})
    control._dispatch(0, {"kind": "stop-wanted", "reason": "signal SIGTERM"})
    control.poll()
    assert stops == [0]
    assert made.stop_reason == STOPPED_ON_ERROR


@given(st.integers(1, 8), st.randoms(use_true_random=False))
def test_a_frame_carries_a_chunk_unchanged(blocks, source):
    size = 32 * blocks
    segments = np.arange(8 * blocks, dtype=np.int64).reshape(blocks, 8)[: source.randint(1, blocks)]
    tokens, targets = np.arange(size, dtype=np.int32), np.arange(size, dtype=np.int32)[::-1].copy()
    sent = Frame(size)
    sent.put_chunk(Chunk(5, tokens, targets, segments, (), None))
    room = frame_room(size, 7, with_v_first=True)
    assert (room.head, room.body) == (len(sent.head), 2 * 7 * 4 * size)
    arrived = Frame(size, Parcel(sent.head.copy(), np.zeros(room.body, dtype=np.uint8)))
    arrived.check(5)
    np.testing.assert_array_equal(arrived.tokens, tokens)
    np.testing.assert_array_equal(arrived.targets, targets)
    np.testing.assert_array_equal(arrived.segments, segments)
    assert arrived.cut is None
    below = Frame(size)
    below.copy_head(arrived)
    np.testing.assert_array_equal(below.segments, segments)
    arrived.header[Word.CUT_INDEX : Word.CUT_POSITION + 1] = (5, 3, 64)
    assert arrived.cut == (3, 64)
    with pytest.raises(RuntimeError, match="frame 5 arrived where frame 6 was due"):
        arrived.check(6)


def test_a_state_stays_where_it_is_on_a_ring_of_one():
    relay = Relay([Room(0, 16), Room(0, 0)], ["the state of layer 0", "what the task carries"])
    relay.outbox(0, 16)[:] = 9
    relay.leave(0, 0, 16)
    kept = relay.arrive(1, 0)
    assert kept is not None
    assert kept.tolist() == [9] * 16
    relay.leave(1, 0, 0)
    assert relay.arrive(2, 0) is None
