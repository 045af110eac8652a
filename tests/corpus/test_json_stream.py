"""Records taken apart piece by piece: the same verdict and the same text as from json.loads()."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rwkvmpi.corpus.json_stream import JsonText
from rwkvmpi.errors import DocumentError

texts = st.text(st.characters(), max_size=30) | st.sampled_from(
    ["\ud83d\ude00", "\ud83d", "\ude00x", '"\\\n\x00', "é你😀"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
records = st.dictionaries(st.sampled_from(["a", "meta", "é"]), values, max_size=3)


def pieces_of(data: bytes, size: int) -> JsonText:
    pieces = iter([data[start : start + size] for start in range(0, len(data), size)])
    return JsonText(lambda: next(pieces, b""), "text", "id")


def by_the_library(data: bytes) -> tuple[bytes, Any] | None:
    """None when it is no JSON, no object, or has no text."""
    try:
        record = json.loads(data.decode("utf-8"))
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        return None
    identifier = record.get("id")
    return record["text"].encode("utf-8", "surrogatepass"), None if isinstance(identifier, dict | list) else identifier


def in_pieces(data: bytes, size: int) -> tuple[bytes, Any] | None:
    record = pieces_of(data, size)
    try:
        return b"".join(record.text()), record.identifier
    except DocumentError:
        return None


@given(
    records,
    texts,
    st.none() | st.integers() | texts | st.booleans(),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.integers(1, 40),
    st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_valid_records(
    record: dict[str, Any], text: str, identifier: Any, ascii_only: bool, indent: int | None, size: int, first: bool
) -> None:
    record = {"text": text, "id": identifier, **record} if first else {**record, "id": identifier, "text": text}
    try:
        data = json.dumps(record, ensure_ascii=ascii_only, indent=indent).encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate that is not escaped: there is no such file
        return
    assert in_pieces(data, size) == by_the_library(data)


@given(
    records,
    texts,
    st.integers(0, 200),
    st.sampled_from([b"", b",", b'"', b"}", b"]", b":", b"\\", b"\xff", b"1", b" "]),
    st.booleans(),
    st.integers(1, 40),
)
@example({}, "", 0, b"", False, 1)
@settings(deadline=None, max_examples=600)
def test_broken_records(record: dict[str, Any], text: str, place: int, junk: bytes, replace: bool, size: int) -> None:
    """One byte removed, replaced or put in: refused exactly when the library refuses it."""
    data = json.dumps({"meta": [], **record, "text": text}).encode()
    place %= len(data)
    data = data[:place] + junk + data[place + replace :]
    pairs: list[str] = []
    with contextlib.suppress(ValueError):
        json.loads(data, object_pairs_hook=lambda found: pairs.extend(key for key, _ in found))
    if pairs.count("text") < 2:  # twice: refused here, the last one wins there
        assert in_pieces(data, size) == by_the_library(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"text": "a", "text": "b"}', "twice"),
        (b'{"text": 3}', "not a string"),
        (b'{"tex": "a"}', "no key"),
        (b'["text"]', "not an object"),
        (b'{"text": "a"', "comma"),
        (b'{"text": "a', "does not end"),
        (b'{"text": "a\xff"}', "UTF-8"),
        (b'{"x": ' + b"[" * 10_000, "deep"),
        (b'{"x": ' + b"1" * 200_000, "too long"),
    ],
)
def test_reasons(data: bytes, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason):
        list(pieces_of(data, 1000).text())


def test_byte_order_mark_is_passed_over() -> None:
    assert in_pieces(b'\xef\xbb\xbf{"text": "x"}', 100) == (b"x", None)
