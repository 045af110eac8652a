"""Finding documents: which files, in which order, under which ids, and what is wrong with them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from corpus_files import jsonl, parquet, write
from hypothesis import given
from hypothesis import strategies as st

from rwkvmpi.corpus.index import build_index, compare_fingerprints, order
from rwkvmpi.corpus.unique import rename_duplicates
from rwkvmpi.errors import UserError


def test_files_in_order_with_ids(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "b" / "deep.txt", b"12345")
    write(folder / "a.jsonl.gz", jsonl([{"text": "é", "id": "x"}, {"text": ""}]) + b"\n  \n" + jsonl([{"text": "z"}]))
    write(folder / "c.parquet", parquet({"text": ["one", "three"], "id": [7, None]}))
    write(folder / "d.TXT", b"")
    write(folder / "notes.md", b"not read")
    index = build_index([str(folder)])
    found = [(ref.index, ref.id, os.path.relpath(ref.source, folder), ref.kind, ref.nbytes, ref.error) for ref in index]
    assert found == [
        (0, "x", "a.jsonl.gz", "jsonl.gz", 2, None),
        (1, "a.jsonl.gz#2", "a.jsonl.gz", "jsonl.gz", 0, None),
        (2, "a.jsonl.gz#3", "a.jsonl.gz", "jsonl.gz", 1, None),
        (3, "b/deep.txt", "b/deep.txt", "txt", 5, None),
        (4, "7", "c.parquet", "parquet", 3, None),
        (5, "c.parquet#2", "c.parquet", "parquet", 5, None),
        (6, "d.TXT", "d.TXT", "txt", 0, None),
    ]
    assert index[-1] == index[6]
    assert [ref.id for ref in index[1:3]] == ["a.jsonl.gz#2", "a.jsonl.gz#3"]
    with pytest.raises(IndexError):
        index[7]
    assert list(pickle.loads(pickle.dumps(index))) == list(index)


def test_each_file_once_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in" / "a.txt", b"a")
    write(tmp_path / "in" / "sub" / "b.txt", b"b")
    (tmp_path / "in" / "sub" / "round").symlink_to(tmp_path / "in")
    (tmp_path / "link.txt").symlink_to("in/a.txt")
    index = build_index(["in", "link.txt", "in/a.txt", "in/**/*.txt", "in/s*"])
    assert [(ref.id, ref.source) for ref in index] == [("a.txt", "in/a.txt"), ("sub/b.txt", "in/sub/b.txt")]
    assert [ref.id for ref in build_index(["in/**/b.txt"])] == ["sub/b.txt"]
    assert [ref.id for ref in build_index(["in/sub/b.txt", "in/a.txt"])] == ["a.txt", "b.txt"]
    write(tmp_path / "in" / "odd[1].txt", b"")
    assert [ref.id for ref in build_index(["in/odd[1].txt"])] == ["odd[1].txt"]


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([], "no input"),
        (["nowhere.txt"], "does not exist"),
        (["*.jsonl"], "matches no file"),
        (["empty"], "matches no file"),
        (["read.me"], "no suffix that is read"),
        (["void.jsonl"], "no document"),
    ],
)
def test_inputs_that_are_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "read.me", b"x")
    write(tmp_path / "v" / "void.jsonl", b"\n \n")
    if inputs == ["void.jsonl"]:
        monkeypatch.chdir(tmp_path / "v")
    with pytest.raises(UserError, match=reason):
        build_index(inputs)


def test_what_cannot_be_read_is_a_document_with_an_error(tmp_path: Path) -> None:
    lines = [
        b'{"text": "fine", "id": "same"}',
        b'{"tex": 1}',
        b"{oops",
        b'["text"]',
        b'{"text": null}',
        b'{"text": "\xff"}',
    ]
    write(tmp_path / "a.jsonl", b"\n".join([*lines, b"[" * 100_000, b'{"text": "last", "id": "same"}']))
    whole = write(tmp_path / "b.jsonl.gz", jsonl([{"text": str(i)} for i in range(20_000)])).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "c.parquet", parquet({"text": ["x", None]}))
    write(tmp_path / "d.parquet", parquet({"body": ["x"]}))
    write(tmp_path / "e.parquet", b"PAR1 this is none PAR1")
    write(tmp_path / "f.parquet", parquet({"text": [1, 2]}))
    (tmp_path / "g.txt").symlink_to("gone.txt")
    os.mkfifo(tmp_path / "h.txt")
    write(tmp_path / "i.jsonl.zst", b"")
    (tmp_path / "i.jsonl.zst").write_bytes(b"not zstd")
    index = build_index([str(tmp_path)])
    errors = {ref.id: ref.error for ref in index if ref.error}
    assert [index[i].id for i in (0, 7)] == ["same", "same#2"]
    assert index[7].nbytes == 4
    half = next(identifier for identifier in errors if identifier.startswith("b.jsonl.gz"))
    assert int(half.split("#")[1]) > 100  # what comes before the break is read
    reasons = {
        "a.jsonl#2": "no key 'text'", "a.jsonl#3": "not JSON", "a.jsonl#4": "not a JSON object",
        "a.jsonl#5": "not a string", "a.jsonl#6": "not UTF-8", "a.jsonl#7": "not JSON", half: "cut off",
        "c.parquet#2": "null", "d.parquet#1": "its columns are: body", "e.parquet#1": "cannot be read",
        "f.parquet#1": "holds int64", "g.txt": "No such file", "h.txt": "not a regular file", "i.jsonl.zst#1": "zst",
    }  # fmt: skip
    assert errors.keys() == reasons.keys()
    for identifier, reason in reasons.items():
        assert reason in str(errors[identifier])


@given(st.lists(st.sampled_from(["a", "b", "a#2", "a#3", "a#2#2", "b#2"]), max_size=12))
def test_ids_become_unique(ids: list[str]) -> None:
    renamed = rename_duplicates(len(ids), ids.__getitem__)
    after = [renamed.get(number, identifier) for number, identifier in enumerate(ids)]
    assert len(set(after)) == len(ids)
    for number, (old, new) in enumerate(zip(ids, after, strict=True)):
        assert new == old if old not in ids[:number] else new.startswith(old + "#")


def test_order_is_by_size_class(tmp_path: Path) -> None:
    sizes = [5, 1000, 0, 4, 600, 7, 1024, 1]
    write(tmp_path / "a.jsonl", jsonl([{"text": "x" * size} for size in sizes]))
    queued = order(build_index([str(tmp_path)]).nbytes)
    assert queued.dtype == np.int64
    assert [sizes[doc] for doc in queued] == [1024, 1000, 600, 5, 4, 7, 1, 0]


def test_changed_input_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x" * 300_000)
    write(tmp_path / "b.txt", b"b")
    before = build_index([str(tmp_path)]).fingerprint()
    assert [size for _, size, _ in before] == [300_000, 1]
    assert compare_fingerprints([list(entry) for entry in before], before) is None
    write(tmp_path / "a.txt", b"x" * 299_999 + b"y")
    after = build_index([str(tmp_path)]).fingerprint()
    assert "a.txt has changed" in str(compare_fingerprints(before, after))
    assert "b.txt is no longer there" in str(compare_fingerprints(before, before[:1]))
    assert "b.txt is new" in str(compare_fingerprints(before[:1], before))
