"""The parts of a corpus: disjoint, complete, in order, even, and the same documents as in the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpus_files import jsonl, write
from hypothesis import example, given
from hypothesis import strategies as st

from rwkvmpi.config import make_job
from rwkvmpi.corpus.index import CorpusIndex, build_index
from rwkvmpi.corpus.part import CorpusPart, cut, find_documents
from rwkvmpi.errors import UserError


@given(st.lists(st.integers(0, 2000) | st.integers(0, 1 << 50), max_size=60), st.integers(1, 80))
@example([0] * 7, 3)
@example([1 << 50], 999_999_999)
def test_every_document_is_in_one_part_and_parts_are_even(sizes: list[int], parts: int) -> None:
    nbytes = np.array(sizes, np.int64)
    numbers = range(1, parts + 1) if parts <= 80 else [1, parts // 2, parts // 2 + 1, parts]
    ranges = [cut(nbytes, number, parts) for number in numbers]
    if parts <= 80:
        assert [doc for first, stop in ranges for doc in range(first, stop)] == list(range(len(sizes)))
    weights = [size + 1 for size in sizes]
    for first, stop in ranges:
        assert abs(sum(weights[first:stop]) * parts - sum(weights)) <= max(weights, default=0) * parts


def test_a_part_is_a_window_on_the_whole(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "a.txt", b"x" * 5000)
    write(folder / "b.jsonl", jsonl([{"text": "one"}, {"words": 1}, {"text": "three", "id": "a.txt"}]) + b"{broken\n")
    (folder / "c.txt").symlink_to(folder / "nowhere")
    write(folder / "d.txt", b"")
    whole = build_index([str(folder)])
    parts = [CorpusPart(whole, number, 5) for number in range(1, 6)]
    assert [len(part) for part in parts] == [
        0,
        0,
        1,
        0,
        6,
    ]  # the first document is in the middle part: so is its middle
    assert [ref.id for part in parts for ref in part] == [ref.id for ref in whole]
    last = parts[-1]
    assert [ref.index for ref in last] == list(range(6))
    for number, ref in enumerate(last):
        other = whole[number + 1]
        assert (ref.id, ref.source, ref.locator, ref.nbytes, ref.error) == (
            other.id, other.source, other.locator, other.nbytes, other.error,
        )  # fmt: skip
        assert last.id(number) == ref.id
    assert last[-1] == last[5]
    assert last[1:3] == [last[1], last[2]]
    assert last.nbytes.tolist() == whole.nbytes.tolist()[1:]
    assert {number + 1: error for number, error in last.errors.items()} == whole.errors
    assert len(last.errors) == 3
    for number in (6, -7):
        with pytest.raises(IndexError):
            last[number]
    with pytest.raises(IndexError):
        parts[0].id(0)
    assert all(part.fingerprint() == whole.fingerprint() for part in parts)
    assert parts[0].summary() == "part 1 of 5 holds none of the 7 documents, which is no mistake"
    assert last.summary() == "part 5 of 5: documents 2 to 7 of the 7 documents"


def test_one_part_of_one_is_the_whole(tmp_path: Path) -> None:
    text = str(write(tmp_path / "a.txt", b"abc"))
    assert isinstance(find_documents([text], "text", "id", 1, 1), CorpusIndex)
    assert isinstance(find_documents([text], "text", "id", 1, 2), CorpusPart)


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "-1/3", "1/0", "1/3/5", "a/b", " 1/3"])
def test_what_is_no_part_is_refused(shard: str) -> None:
    with pytest.raises(UserError, match=r"is no part of a whole: write i/n with i from 1 to n"):
        make_job({"model": {"path": "x"}, "input": {"paths": ["y"], "shard": shard}}, "test")
