"""The child process that reads ahead: complete, in order, bounded, and no longer alive than its parent."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from corpus_files import jsonl, write

import rwkvmpi
from rwkvmpi.corpus.counting import count_tokens
from rwkvmpi.corpus.events import Begin, Block, End, Event, Failed, InFlight, TokenCursor
from rwkvmpi.corpus.feeder import Feeder
from rwkvmpi.corpus.index import CorpusIndex, build_index
from rwkvmpi.corpus.stream import ALIGNMENT, COUNT, DOC, POSITION, ROW, Chunk, ChunkBuilder
from rwkvmpi.corpus.tokenizers import load_tokenizer


@pytest.fixture
def index(tmp_path: Path) -> CorpusIndex:
    rng = random.Random(2)
    folder = tmp_path / "in"
    write(folder / "a.txt", rng.randbytes(200_000))
    write(
        folder / "b.jsonl.gz", jsonl([{"text": "wörd " * n} for n in (0, 1, 40, 50_000)] + [{"no": 1}, {"text": "z"}])
    )
    write(folder / "c.txt", b"")
    write(folder / "d.txt.gz", rng.randbytes(400_000))
    data = (folder / "d.txt.gz").read_bytes()
    (folder / "d.txt.gz").write_bytes(data[:-1000])
    write(folder / "e.txt", b"gone soon")
    write(folder / "f.txt", "ünd so weiter. ".encode() * 20_000)
    index = build_index([str(folder)])
    (folder / "e.txt").unlink()
    return index


def wait_until(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def events_of(feeder: Feeder) -> Iterator[Event]:
    while feeder.outstanding:
        event = feeder.read()
        assert event is not None
        yield event


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_events_in_the_order_of_the_requests(index: CorpusIndex) -> None:
    tokenizer = load_tokenizer("world", 65536)
    order = list(index)[::-1]
    with Feeder("world", 65536) as feeder:
        for ref in order:
            feeder.request(ref)
        events = list(events_of(feeder))
        with pytest.raises(RuntimeError, match="asked for"):
            feeder.read()
        assert feeder.read(timeout=0.0) is None
        assert 0 < feeder.waited < 60
    ends = [event for event in events if isinstance(event, End | Failed)]
    assert [event.doc for event in ends] == [ref.index for ref in order]
    counts = {count.doc: count for count in count_tokens(index, tokenizer)}
    failures = {}
    for event in ends:
        if isinstance(event, End):
            assert counts[event.doc] == (event.doc, event.nbytes, event.ntokens, None)
        else:
            failures[index.id(event.doc)] = event.error
            assert counts[event.doc].error == event.error
    assert failures.keys() == {"b.jsonl.gz#5", "d.txt.gz", "e.txt"}
    for identifier, reason in {"b.jsonl.gz#5": "no key", "d.txt.gz": "cut off", "e.txt": "No such file"}.items():
        assert reason in failures[identifier]
    broken = next(ref.index for ref in order if ref.id == "d.txt.gz")
    assert sum(isinstance(event, Block) and event.doc == broken for event in events) >= 2  # what could be read
    gone = next(ref.index for ref in order if ref.id == "e.txt")
    assert not any(isinstance(event, Begin) and event.doc == gone for event in events)
    text = Path(index[0].source).read_bytes()
    tokens = [event.tokens for event in events if isinstance(event, Block) and event.doc == 0]
    assert tokenizer.decode(np.concatenate(tokens)) == text


def rows_of(chunks: list[Chunk], lengths: dict[int, int]) -> dict[int, np.ndarray]:
    """{doc: [positions, 2]}: input and target of every position, each laid once; -9 where none was."""
    found = {doc: np.full((length + 1, 2), -9) for doc, length in lengths.items()}
    for chunk in chunks:
        for segment in chunk.segments:
            rows = slice(segment[ROW], segment[ROW] + segment[COUNT])
            place = found[int(segment[DOC])][segment[POSITION] : segment[POSITION] + segment[COUNT]]
            assert (place == -9).all()
            place[:, 0], place[:, 1] = chunk.tokens[rows], chunk.targets[rows]
    return found


def read_chunks(feeder: Feeder, builder: ChunkBuilder, limit: int | None = None) -> list[Chunk]:
    chunks: list[Chunk] = []
    while feeder.outstanding and (limit is None or len(chunks) < limit):
        event = feeder.read()
        assert event is not None
        builder.push(event)
        while (chunk := builder.pop_chunk()) is not None and (limit is None or len(chunks) < limit):
            chunks.append(chunk)
    if limit is None and (chunk := builder.finish()) is not None:
        chunks.append(chunk)
    return chunks


@pytest.mark.parametrize(("spec", "vocab_size"), [("world", 65536), ("bytes", 256)])
def test_resumed_at_any_chunk_gives_the_same_rows(index: CorpusIndex, spec: str, vocab_size: int) -> None:
    """Cut a run of chunks anywhere, read the rest in a new process from the cursor on: every row is there once."""
    docs = [ref for ref in index if ref.id in ("a.txt", "b.jsonl.gz#4", "f.txt", "c.txt")]
    with Feeder(spec, vocab_size) as feeder:
        for ref in docs:
            feeder.request(ref)
        whole = read_chunks(feeder, ChunkBuilder(1024))
    lengths = {ended.doc: ended.ntokens for chunk in whole for ended in chunk.ended}
    assert lengths.keys() == {ref.index for ref in docs}
    expected = rows_of(whole, lengths)
    assert all((rows != -9).all() for rows in expected.values())
    rng = random.Random(3)
    with Feeder(spec, vocab_size) as feeder:
        for limit in rng.sample(range(1, len(whole)), 6):
            kept = whole[:limit]
            flight = kept[-1].in_flight
            done = {ended.doc for chunk in kept for ended in chunk.ended}
            if flight is not None:
                assert flight.position % ALIGNMENT == 0
                feeder.request(index[flight.doc], flight)
            for ref in docs:
                if ref.index not in done and (flight is None or ref.index != flight.doc):
                    feeder.request(ref)
            rest = read_chunks(feeder, ChunkBuilder(256))
            both = rows_of(kept + rest, lengths)
            assert all(np.array_equal(both[doc], rows) for doc, rows in expected.items())
            totals = {ended.doc: ended for chunk in kept + rest for ended in chunk.ended}
            assert totals == {ended.doc: ended for chunk in whole for ended in chunk.ended}


def test_wrong_resume_is_refused(index: CorpusIndex) -> None:
    with Feeder("bytes", 256) as feeder:
        for resume in (InFlight(1, 32, TokenCursor(0, 0)), InFlight(0, 32, TokenCursor(32, 32))):
            with pytest.raises(ValueError, match="cannot be resumed"):
                feeder.request(index[0], resume)
        assert feeder.outstanding == 0


def test_reading_ahead_is_bounded(tmp_path: Path) -> None:
    """Nobody reads: the child stops soon, whatever the document's length, and the rest comes when it is asked for."""
    write(tmp_path / "long.txt", b"x" * (20 << 20))
    (ref,) = build_index([str(tmp_path)])
    with Feeder("bytes", 256, read_ahead=1 << 20) as feeder:
        feeder.request(ref)
        wait_until(lambda: feeder._queued >= 1 << 20)
        time.sleep(0.3)
        assert feeder._queued < 2 << 20
        resident = int(Path(f"/proc/{feeder._child.pid}/statm").read_text().split()[1]) * 4096
        assert resident < 120 << 20
        total = sum(len(event.tokens) for event in events_of(feeder) if isinstance(event, Block))
    assert total == 20 << 20


def test_many_requests_at_once_do_not_block(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", jsonl([{"text": "x" * 50}] * 5000))
    index = build_index([str(tmp_path)])
    with Feeder("bytes", 256, read_ahead=1000) as feeder:
        for ref in index:  # far more than pipes and queue hold, before anything is read
            feeder.request(ref)
        assert sum(isinstance(event, End) for event in events_of(feeder)) == 5000


def test_signals_for_the_job_do_not_end_the_child(index: CorpusIndex) -> None:
    with Feeder("bytes", 256) as feeder:
        for _ in range(3):  # the first ones while it is still starting
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                os.kill(feeder._child.pid, number)
            time.sleep(0.1)
        feeder.request(index[0])
        assert [type(event) for event in events_of(feeder)][-1] is End
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()  # the parent's own mask is as before


def test_crash_of_the_child_is_told(index: CorpusIndex) -> None:
    with Feeder("bytes", 256) as feeder:
        feeder.request(index[0])
        feeder.read()
        os.kill(feeder._child.pid, signal.SIGKILL)
        feeder._child.wait()
        with pytest.raises(RuntimeError, match="SIGKILL"):
            feeder.request(index[1])
        with pytest.raises(RuntimeError, match="SIGKILL"):
            list(events_of(feeder))
    with Feeder("no/such/tokenizer.json", 256) as feeder:
        with pytest.raises(RuntimeError, match=r"exit code 1.*(?s:.*)no/such/tokenizer.json"):
            feeder.read(timeout=20)
        feeder.close()


def test_child_has_neither_torch_nor_mpi_and_does_not_outlive_its_parent(tmp_path: Path) -> None:
    write(tmp_path / "long.txt", b"x" * (30 << 20))
    (tmp_path / "json.py").write_text("raise SystemExit('a module of the current folder was imported')")
    program = """
import sys, time
from rwkvmpi.corpus.feeder import Feeder
from rwkvmpi.corpus.index import build_index
feeder = Feeder("bytes", 256)
feeder.request(build_index([sys.argv[1]])[0])
feeder.read()
print(feeder._child.pid, flush=True)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(rwkvmpi.__file__).parents[1])}
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "long.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path, env=environment, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        maps = Path(f"/proc/{child}/maps").read_text()
        assert "libtorch" not in maps
        assert "libmpi" not in maps
        parent.kill()
    wait_until(lambda: not is_running(child), 5.0)
