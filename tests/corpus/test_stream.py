"""The stream: documents come back out of the chunks as they went in, wherever it is cut."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvmpi.corpus.events import Begin, Block, End, Event, Failed, InFlight, TokenCursor
from rwkvmpi.corpus.stream import (
    BEGINS,
    CONTINUES,
    COUNT,
    DOC,
    ENDS,
    FAILED,
    FLAGS,
    HANDED_ON,
    JOIN,
    NTOKENS,
    POSITION,
    RESUMES,
    ROW,
    Chunk,
    ChunkBuilder,
    chunks_of,
)


def tokens_of(doc: int, length: int) -> np.ndarray:
    return np.random.default_rng(doc).integers(1, 60000, length, dtype=np.int32)


HANDED = 1000  # documents from this number on are handed on


def events_of(doc: int, length: int, block: int, start: int = 0, position: int = 0) -> Iterator[Event]:
    """The events of one document of 3 bytes a token, from the block that begins at token `start`."""
    tokens = tokens_of(doc, length)
    yield Begin(doc, position or int(doc >= HANDED), doc >= HANDED)
    for first in range(start, length, block):
        yield Block(doc, 3 * first, first, tokens[first : first + block])
    yield End(doc, 3 * length, length)


def check_layout(chunks: list[Chunk], rows: int) -> None:
    """What must hold for every chunk, whatever is in it."""
    crossing = False
    for number, chunk in enumerate(chunks):
        assert chunk.index == number
        assert chunk.tokens.shape == chunk.targets.shape == (rows,)
        assert 1 <= len(chunk.segments) <= rows // 32
        covered = np.zeros(rows, dtype=bool)
        for place, segment in enumerate(chunk.segments):
            row, count, flags = segment[ROW], segment[COUNT], segment[FLAGS]
            assert row % 32 == 0
            handed = segment[DOC] >= HANDED
            assert segment[POSITION] % 32 == handed
            assert count >= (0 if flags & HANDED_ON else 1)
            assert not covered[row : row + max(count, 1)].any()
            covered[row : row + max(count, 1)] = True
            assert bool(flags & CONTINUES) == (crossing and place == 0)
            assert bool(flags & BEGINS) == (segment[POSITION] == 0)
            assert bool(flags & HANDED_ON) == (segment[POSITION] == 1)
            assert bin(flags & (BEGINS | CONTINUES | RESUMES | HANDED_ON)).count("1") == 1
            join = chunk.tokens[row] if count else -1
            assert segment[JOIN] == (join if flags & HANDED_ON else 0)
            assert flags & ENDS or place == len(chunk.segments) - 1
            assert (segment[NTOKENS] >= 0) == (flags & (ENDS | FAILED) == ENDS)
        assert not chunk.tokens[~covered].any()
        assert (chunk.targets[~covered] == -1).all()
        assert np.array_equal(chunk.rows, chunk.segments[:, [ROW, COUNT]])
        crossing = not chunk.segments[-1][FLAGS] & ENDS
        assert crossing == (chunk.in_flight is not None)
    assert not crossing


def collect(chunks: list[Chunk]) -> dict[int, dict[int, tuple[int, int]]]:
    """{doc: {position: (input, target)}}"""
    found: dict[int, dict[int, tuple[int, int]]] = {}
    for chunk in chunks:
        for segment in chunk.segments:
            document = found.setdefault(int(segment[DOC]), {})
            for offset in range(int(segment[COUNT])):
                row, position = int(segment[ROW]) + offset, int(segment[POSITION]) + offset
                assert position not in document
                document[position] = (int(chunk.tokens[row]), int(chunk.targets[row]))
    return found


def expected(doc: int, length: int) -> dict[int, tuple[int, int]]:
    tokens = [0, *tokens_of(doc, length).tolist(), -1]
    return {position: (tokens[position], tokens[position + 1]) for position in range(doc >= HANDED, length + 1)}


lengths_strategy = st.lists(
    st.one_of(st.integers(0, 200), st.sampled_from([31, 32, 33, 63, 64, 95, 96, 127])), max_size=8
)
rows_strategy = st.sampled_from([32, 64, 96, 128, 256])


handed_strategy = st.integers(0, 255)  # a bit for each document: whether it is handed on


def numbered(lengths: list[int], handed: int) -> dict[int, int]:
    """{doc: length}, documents in order, those with a bit in `handed` from HANDED on."""
    return {doc + HANDED * (handed >> doc & 1): length for doc, length in enumerate(lengths)}


@given(lengths_strategy, handed_strategy, rows_strategy, st.integers(1, 100))
@settings(deadline=None, max_examples=150)
def test_documents_survive(lengths: list[int], handed: int, rows: int, block: int) -> None:
    documents = numbered(lengths, handed)
    events = [event for doc, length in documents.items() for event in events_of(doc, length, block)]
    chunks = list(chunks_of(events, rows))
    check_layout(chunks, rows)
    assert collect(chunks) == {doc: expected(doc, length) for doc, length in documents.items()}
    ended = [document for chunk in chunks for document in chunk.ended]
    assert ended == [(doc, 3 * length, length, None, b"") for doc, length in documents.items()]
    used = sum(max(-(-(length + (doc < HANDED)) // 32), 1) for doc, length in documents.items())
    assert len(chunks) == -(-used * 32 // rows)  # nothing is wasted


@given(lengths_strategy, handed_strategy, rows_strategy, rows_strategy, st.integers(1, 100), st.integers(0, 30))
@settings(deadline=None, max_examples=150)
def test_cut_and_resume(lengths: list[int], handed: int, rows: int, rows_later: int, block: int, keep: int) -> None:
    """Stop after any chunk, go on with what is left, in chunks of another size too: every row as without a stop."""
    documents = numbered(lengths, handed)
    events = [event for doc, length in documents.items() for event in events_of(doc, length, block)]
    before = list(chunks_of(events, rows))[:keep]
    flight = before[-1].in_flight if before else None
    done = {ended.doc for chunk in before for ended in chunk.ended}
    rest: list[Event] = []
    if flight is not None:
        assert flight.position % 32 == (flight.doc >= HANDED)
        assert flight.cursor == TokenCursor(3 * flight.cursor.tokens_before, flight.cursor.tokens_before)
        assert flight.cursor.tokens_before <= flight.position - 1 < flight.cursor.tokens_before + block
        start, position = flight.cursor.tokens_before, flight.position
        rest += events_of(flight.doc, documents[flight.doc], block, start, position)
    for doc, length in documents.items():
        if doc not in done and (flight is None or doc != flight.doc):
            rest += events_of(doc, length, block)
    after = list(chunks_of(rest, rows_later))
    check_layout(after, rows_later)
    if flight is not None:
        assert after[0].segments[0][FLAGS] & RESUMES
        assert after[0].segments[0][POSITION] == flight.position
    both = collect(before)
    for doc, positions in collect(after).items():
        assert not both.get(doc, {}).keys() & positions.keys()
        both.setdefault(doc, {}).update(positions)
    assert both == {doc: expected(doc, length) for doc, length in documents.items()}


@given(lengths_strategy, rows_strategy, st.integers(1, 100), st.integers(0, 200))
@settings(deadline=None, max_examples=150)
def test_broken_document_leaves_the_others_alone(lengths: list[int], rows: int, block: int, after: int) -> None:
    """A document that breaks off after some tokens, between others."""
    events = list(events_of(90, 40, block))
    events += list(events_of(91, after, block))[:-1]
    events.append(Failed(91, "cut off"))
    for doc, length in enumerate(lengths):
        events += events_of(doc, length, block)
    builder = ChunkBuilder(rows)
    chunks = []
    for event in events:
        builder.push(event)
        while (chunk := builder.pop_chunk()) is not None:
            chunks.append(chunk)
            assert builder.cursor() == chunk.in_flight
    if (chunk := builder.finish()) is not None:
        chunks.append(chunk)
    check_layout(chunks, rows)
    found = collect(chunks)
    for doc, length in enumerate(lengths):
        assert found[doc] == expected(doc, length)
    ended = {document.doc: document for chunk in chunks for document in chunk.ended}
    marks = [segment[FLAGS] for chunk in chunks for segment in chunk.segments if segment[DOC] == 91]
    if after:
        assert builder.failed == []
        assert ended[91] == (91, 0, 0, "cut off", b"")
        assert marks[-1] & FAILED
        assert not any(mark & ENDS for mark in marks[:-1])
    else:  # nothing was laid of it
        assert [(failed.doc, failed.error) for failed in builder.failed] == [(91, "cut off")]
        assert builder.failed[0].before_chunk == 64 // rows
        assert 91 not in ended
        assert not marks


def test_document_that_fails_after_its_last_chunk_was_given() -> None:
    builder = ChunkBuilder(32)
    builder.push(Begin(5))
    builder.push(Block(5, 0, 0, tokens_of(5, 32)))
    first = builder.pop_chunk()
    assert first is not None
    assert first.in_flight == InFlight(5, 32, TokenCursor(0, 0))
    assert builder.pop_chunk() is None
    builder.push(Failed(5, "gone"))
    last = builder.pop_chunk()  # full at once: the next document would begin at row 32
    assert last is not None
    assert last.segments.tolist() == [[0, 1, 5, 32, CONTINUES | ENDS | FAILED, -1, 0, 0]]


def test_chunk_waits_for_the_target_of_its_last_row() -> None:
    builder = ChunkBuilder(32)
    builder.push(Begin(0))
    builder.push(Block(0, 0, 0, tokens_of(0, 31)))  # rows 0..31 are laid, what row 31 predicts is unknown
    assert builder.pop_chunk() is None
    builder.push(End(0, 31, 31))
    chunk = builder.pop_chunk()
    assert chunk is not None
    assert chunk.targets[31] == -1
    assert builder.finish() is None


def test_unopened_document_and_shrunken_document_are_failed_records() -> None:
    builder = ChunkBuilder(64)
    builder.push(Failed(3, "vanished"))
    builder.push(Begin(4, 64))
    builder.push(Block(4, 0, 0, tokens_of(4, 20)))
    builder.push(End(4, 20, 20))
    assert [(failed.doc, failed.before_chunk) for failed in builder.failed] == [(3, 0), (4, 0)]
    assert "changed" in builder.failed[1].error
    assert builder.finish() is None


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        ChunkBuilder(48)
    builder = ChunkBuilder(64)
    with pytest.raises(ValueError, match="position 33"):
        builder.push(Begin(0, 33))
    with pytest.raises(ValueError, match="32: no one more"):
        builder.push(Begin(0, 32, handed_on=True))
    builder.push(Begin(0))
    with pytest.raises(ValueError, match="inside"):
        builder.push(Begin(1))
    builder.push(Block(0, 0, 0, tokens_of(0, 10)))
    with pytest.raises(ValueError, match="token 11"):
        builder.push(Block(0, 11, 11, tokens_of(0, 10)))
    with pytest.raises(ValueError, match="has not ended"):
        builder.finish()
