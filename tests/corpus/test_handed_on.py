"""Documents handed on: the child process reads on where an earlier run ended, and only behind the same text."""

from __future__ import annotations

import random
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from corpus_files import jsonl, parquet, write

from rwkvmpi.corpus.events import Begin, Block, End, Event, Failed, InFlight, TokenCursor
from rwkvmpi.corpus.feeder import Feeder
from rwkvmpi.corpus.index import DocumentRef, build_index

TEXT = "ünd so weiter, ".encode() * 20_000 + b"and so on"


def corpus(folder: Path) -> list[DocumentRef]:
    """The same text in every kind of file."""
    text = TEXT.decode()
    write(folder / "a.txt", TEXT)
    write(folder / "b.txt.zst", TEXT)
    write(folder / "c.jsonl.gz", jsonl([{"text": "x"}, {"text": text}, {"text": "y"}]))
    write(folder / "d.parquet", parquet({"text": ["x", text]}))
    return [ref for ref in build_index([str(folder)]) if ref.id[:1] in "ab" or ref.id.endswith("#2")]


def read(feeder: Feeder, ref: DocumentRef, resume: InFlight | None = None) -> list[Event]:
    feeder.request(ref, resume)
    events = []
    while feeder.outstanding:
        event = feeder.read()
        assert event is not None
        events.append(event)
    return events


def handed(ref: DocumentRef, count: int, text: bytes = TEXT) -> DocumentRef:
    return replace(ref, handed_bytes=count, handed_sha256=sha256(text[:count]).hexdigest())


def text_of(events: list[Event]) -> bytes:
    blocks = [event for event in events if isinstance(event, Block)]
    return b"".join(block.tokens.astype(np.uint8).tobytes() for block in blocks)


def test_the_rest_is_read_and_the_whole_text_is_hashed_also_after_a_stop(tmp_path: Path) -> None:
    source = random.Random(1)
    with Feeder("bytes", 256, digests=True) as feeder:
        for ref in corpus(tmp_path):
            for count in (0, 1, source.randrange(len(TEXT)), len(TEXT)):
                events = read(feeder, handed(ref, count))
                assert events[0] == Begin(ref.index, 1, True)
                assert text_of(events) == TEXT[count:]
                left = len(TEXT) - count
                assert events[-1] == End(ref.index, left, left, sha256(TEXT).digest())
                blocks = [event for event in events if isinstance(event, Block)]
                if len(blocks) > 1:
                    block = blocks[-1]  # where it goes on counts from where it was handed on, as the events do
                    cursor = TokenCursor(block.byte_start, block.first_token)
                    again = read(feeder, handed(ref, count), InFlight(ref.index, block.first_token + 33, cursor))
                    assert again[0] == Begin(ref.index, block.first_token + 33, True)
                    assert isinstance(again[1], Block)
                    assert again[1].tokens.tolist() == block.tokens.tolist()
                    assert again[-1] == events[-1]
            resumed = read(feeder, ref, InFlight(ref.index, 65_568, TokenCursor(65_536, 65_536)))
            assert resumed[-1] == End(ref.index, len(TEXT), len(TEXT), sha256(TEXT).digest())


def test_no_digest_where_nobody_asked_for_it(tmp_path: Path) -> None:
    with Feeder("bytes", 256) as feeder:
        ref = corpus(tmp_path)[0]
        assert read(feeder, ref)[-1] == End(ref.index, len(TEXT), len(TEXT))
        assert read(feeder, handed(ref, 70_000))[-1] == End(ref.index, len(TEXT) - 70_000, len(TEXT) - 70_000)


@pytest.mark.parametrize("digests", [False, True])
def test_another_beginning_is_a_failed_document_with_a_sentence(tmp_path: Path, digests: bool) -> None:
    with Feeder("bytes", 256, digests=digests) as feeder:
        for ref in corpus(tmp_path):
            for wrong, why in (
                (handed(ref, 70_000, b"U" + TEXT), "they have another SHA-256 now"),
                (handed(ref, len(TEXT) + 1, TEXT + b"!"), f"it has {len(TEXT):,} bytes now"),
            ):
                (failed,) = read(feeder, wrong)
                assert isinstance(failed, Failed)
                assert why in failed.error
                assert ref.source in failed.error
            assert isinstance(read(feeder, ref)[-1], End)  # the next one is not harmed
