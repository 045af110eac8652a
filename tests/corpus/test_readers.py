"""Opening documents: the same bytes out of every kind of file, in any order, from any byte on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import zstandard
from corpus_files import compress, jsonl, parquet, write

from rwkvmpi.corpus.containers import KINDS, open_decompressed
from rwkvmpi.corpus.index import DocumentRef, build_index
from rwkvmpi.corpus.readers import TextReader, TextStream, open_text
from rwkvmpi.corpus.records import SHORT_LINE
from rwkvmpi.errors import DocumentError

TEXTS = ["", "a", "zwei Wörter", "\x00\n\r\n", "好" * 1000, "\ud800", "last"] * 3


def read_all(stream: TextStream, size: int = 1000) -> bytes:
    with stream:
        return b"".join(iter(lambda: stream.read(size), b""))


def store(folder: Path, kind: str) -> list[bytes]:
    """Files of this kind with the texts; returns these as bytes in the order of the index."""
    texts = [text.encode("utf-8", "surrogatepass") for text in TEXTS]
    if kind.startswith("txt"):
        for number, text in enumerate(texts):
            write(folder / f"{number:03}.{kind}", text + b"\xff")
        return [text + b"\xff" for text in texts]
    if kind.startswith("jsonl"):
        write(folder / f"a.{kind}", jsonl([{"n": 1, "text": text} for text in TEXTS]))
        return texts
    import pyarrow as pa

    write(folder / f"a.{kind}", parquet({"id": list(range(len(texts))), "text": pa.array(texts, pa.binary())}))
    column = pa.array(["x", "yy", "x"]).dictionary_encode()
    write(folder / f"b.{kind}", parquet({"text": column}))
    return [*texts, b"x", b"yy", b"x"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_any_order(tmp_path: Path, kind: str) -> None:
    texts = store(tmp_path, kind)
    index = build_index([str(tmp_path)])
    assert len(index) == len(texts)
    assert {ref.kind for ref in index} == {kind}
    if kind not in ("txt.gz", "txt.zst"):
        assert [ref.nbytes for ref in index] == list(map(len, texts))
    numbers = list(range(len(texts)))
    rng = random.Random(0)
    with TextReader() as reader:
        for places in (numbers, numbers[::-1], rng.sample(numbers, len(numbers)), numbers[::3]):
            for number in places:
                assert read_all(reader.open(index[number])) == texts[number]
        for number in numbers:
            start = rng.randint(0, len(texts[number]))
            with reader.open(index[number], start) as stream:  # a part, then the next document
                assert stream.read(5) == texts[number][start : start + 5]
            with pytest.raises(DocumentError, match="changed"):
                reader.open(index[number], len(texts[number]) + 1)
    assert read_all(open_text(index[5])) == texts[5]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_records_longer_than_what_is_parsed_at_once(tmp_path: Path, compression: str) -> None:
    piece = 'line with ümlaut, "quotes", \\ and 😀\n' + "plain " * 200
    long = piece * (SHORT_LINE // len(piece) + 1)
    records = [{"text": "before"}, {"id": "long", "text": long}, {"text": "after"}, {"text": long, "id": 5}]
    # The last one breaks off inside the text.
    write(tmp_path / f"a.jsonl{compression}", jsonl(records) + b'{"text": "' + b"x" * SHORT_LINE)
    index = build_index([str(tmp_path)])
    assert [ref.id.split("#")[-1] for ref in index] == ["1", "long", "3", "5", "5"]
    assert [ref.error is None for ref in index] == [True] * 4 + [False]
    assert [ref.nbytes for ref in index[:4]] == [len(record["text"].encode()) for record in records]  # type: ignore[attr-defined]
    with TextReader() as reader:
        for number in (0, 1, 2, 3, 1):
            assert read_all(reader.open(index[number]), 50_000) == str(records[number]["text"]).encode()
        with reader.open(index[1], 1_000_001) as stream:
            assert stream.read(100) == long.encode()[1_000_001:1_000_101]
        assert read_all(reader.open(index[2])) == b"after"


def test_broken_files(tmp_path: Path) -> None:
    text = random.Random(1).randbytes(300_000)
    refs = []
    for place, compression in enumerate(["gz", "zst", "zst", "gz", "zst"]):
        data = compress(text, compression)
        path = tmp_path / f"{place}.txt.{compression}"
        if place < 2:
            data = data[:-5]
        elif place == 2:
            data = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
        elif place == 3:
            data = b""
        else:
            data = b"nothing of the kind"
        path.write_bytes(data)
        refs.append(DocumentRef(place, "", str(path), f"txt.{compression}", 0, 0, None))
    with TextReader() as reader:
        for ref in refs:
            with pytest.raises(DocumentError, match=Path(ref.source).name):
                read_all(reader.open(ref))
        with pytest.raises(DocumentError, match="No such file"):
            reader.open(DocumentRef(0, "", str(tmp_path / "gone.txt"), "txt", 0, 0, None))


def test_vanished_record_file_and_replaced_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([{"text": "one"}, {"text": "two"}]))
    other = write(tmp_path / "b.parquet", parquet({"text": ["x", "y"]}))
    index = build_index([str(tmp_path)])
    path.write_bytes(b"{}")
    other.unlink()
    with TextReader() as reader:
        for ref, reason in zip(index, ["no key", "changed", "No such file", "No such file"], strict=True):
            with pytest.raises(DocumentError, match=reason):
                read_all(reader.open(ref))


def test_zstd_of_many_frames_and_one_that_swells(tmp_path: Path) -> None:
    frames = b"".join(zstandard.compress(b"%d," % number) for number in range(500))
    write(tmp_path / "many.txt", frames).rename(tmp_path / "many.txt.zst")
    with open_decompressed(str(tmp_path / "many.txt.zst"), "zst") as stream:
        assert stream.read() == b"".join(b"%d," % number for number in range(500))
    bomb = zstandard.compress(bytes(200 << 20))  # 200 MB in some KB: must come out in pieces
    (tmp_path / "bomb.txt.zst").write_bytes(bomb)
    with open_decompressed(str(tmp_path / "bomb.txt.zst"), "zst") as stream:
        assert len(stream.raw.read(1 << 30)) < 40 << 20  # type: ignore[attr-defined]


def test_lone_surrogates_and_pairs(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b'{"text": "\\ud83d\\ude00\\ud800"}\n')
    (ref,) = build_index([str(tmp_path)])
    assert read_all(open_text(ref)) == "😀".encode() + b"\xed\xa0\x80"
    assert json.loads(b'"\\ud800"').encode("utf-8", "surrogatepass") == b"\xed\xa0\x80"
