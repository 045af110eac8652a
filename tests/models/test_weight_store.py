"""Memory for weights: laid out alike everywhere, shared between real processes, gone with the last of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rwkvmpi
from rwkvmpi.models import weight_store
from rwkvmpi.models.checkpoint import check_finite, open_checkpoint
from rwkvmpi.models.random_weights import random_weights
from rwkvmpi.models.safetensors_file import write_safetensors
from rwkvmpi.models.weight_store import MappedMemory, OwnMemory, Published, SharedMemory

SIZES = (5, 64, 0, 1 << 20, 2 << 20, 1, 5 << 20, 100)  # over several extents of 2 MiB, one of them larger
LEADER = """
import json, sys, time
from rwkvmpi.models import weight_store
weight_store.EXTENT = 2 << 20
memory = weight_store.SharedMemory()
for i, size in enumerate(json.loads(sys.argv[1])):
    memory.place(size, lambda piece, i=i: piece.fill_(i + 1))
news = memory.publish()
print(json.dumps([news.pid, news.fd, news.identity, news.sizes]), flush=True)
time.sleep(60)
"""
WRITER = """
import json, sys
from rwkvmpi.models import weight_store
pid, fd, identity, sizes = json.loads(sys.argv[1])
piece = weight_store.MappedMemory(weight_store.Published(pid, fd, tuple(identity), tuple(sizes))).place(sizes[0], None)
print(piece.tolist(), flush=True)
piece.fill_(0)
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(rwkvmpi.__file__).parents[1])}


@pytest.fixture(autouse=True)
def _small_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_store, "EXTENT", 2 << 20)


@pytest.fixture(scope="module")
def leader() -> Iterator[tuple[subprocess.Popen[str], Published]]:
    """Another process that has filled the n-th of SIZES with n, and what it published. The last test kills it."""
    command = [sys.executable, "-c", LEADER, json.dumps(SIZES)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stdout is not None
        pid, fd, identity, sizes = json.loads(process.stdout.readline())
        yield process, Published(pid, fd, tuple(identity), tuple(sizes))
    finally:
        process.kill()
        process.wait()


def never(piece: torch.Tensor) -> None:
    raise AssertionError("a follower must not fill")


def filling(value: int) -> Callable[[torch.Tensor], None]:
    def fill(piece: torch.Tensor) -> None:
        assert not piece.any()
        piece.fill_(value)

    return fill


@pytest.mark.parametrize("kind", [OwnMemory, SharedMemory])
def test_pieces_are_aligned_zeroed_and_apart(kind: type[OwnMemory] | type[SharedMemory]) -> None:
    store = kind()
    pieces = [store.place(size, filling(i + 1)) for i, size in enumerate(SIZES)]
    del store  # pieces keep their memory
    for i, (piece, size) in enumerate(zip(pieces, SIZES, strict=True)):
        assert (piece.shape, piece.dtype) == ((size,), torch.uint8)
        assert size == 0 or piece.data_ptr() % 64 == 0
        assert (piece == i + 1).all()


def test_huge_blocks_begin_where_huge_pages_do() -> None:
    assert OwnMemory().place(3 << 20, filling(1)).data_ptr() % weight_store.HUGE_PAGE == 0


def test_what_is_not_written_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_store, "EXTENT", 1 << 30)
    store = OwnMemory()
    before = resident()
    piece = store.place(1 << 20, filling(1))
    assert piece.all()
    assert resident() - before < 16 << 20


def test_followers_see_what_the_leader_filled(leader: tuple[subprocess.Popen[str], Published]) -> None:
    _, published = leader
    store = MappedMemory(published)
    for i, size in enumerate(SIZES):
        piece = store.place(size, never)
        assert (piece.shape, piece.dtype) == ((size,), torch.uint8)
        assert size == 0 or piece.data_ptr() % 64 == 0
        assert (piece == i + 1).all()
    with pytest.raises(RuntimeError, match="1 bytes is wanted where None"):
        store.place(1, never)


def test_other_sizes_are_refused(leader: tuple[subprocess.Popen[str], Published]) -> None:
    store = MappedMemory(leader[1])
    store.place(SIZES[0], never)
    with pytest.raises(RuntimeError, match="65 bytes is wanted where 64"):
        store.place(SIZES[1] + 1, never)


def test_somebody_else_with_the_same_process_id_is_noticed(leader: tuple[subprocess.Popen[str], Published]) -> None:
    _, published = leader
    device, inode, size = published.identity
    with pytest.raises(OSError, match="is another one here"):
        MappedMemory(replace(published, identity=(device, inode + 1, size)))
    with open(os.devnull) as file, pytest.raises(OSError, match="is another one here"):
        MappedMemory(replace(published, pid=os.getpid(), fd=file.fileno()))


def test_followers_cannot_write(leader: tuple[subprocess.Popen[str], Published]) -> None:
    news = json.dumps([leader[1].pid, leader[1].fd, leader[1].identity, leader[1].sizes])
    done = subprocess.run([sys.executable, "-c", WRITER, news], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.strip() == str([1] * SIZES[0])
    assert done.returncode < 0  # by a signal


def test_the_memory_outlives_a_killed_leader_and_has_no_name(leader: tuple[subprocess.Popen[str], Published]) -> None:
    process, published = leader
    store = MappedMemory(published)
    process.kill()
    process.wait()
    pieces = [store.place(size, never) for size in SIZES]
    assert all((piece == i + 1).all() for i, piece in enumerate(pieces))
    maps = Path("/proc/self/maps").read_text()
    assert re.search(r"r--s .* /memfd:rwkvmpi-weights \(deleted\)", maps)
    assert not [name for name in os.listdir("/dev/shm") if "rwkvmpi" in name]
    with pytest.raises(OSError, match="No such file"):
        MappedMemory(published)
    del store, pieces
    assert "memfd:rwkvmpi-weights" not in Path("/proc/self/maps").read_text()


def test_a_published_file_keeps_its_size() -> None:
    memory = SharedMemory()
    memory.place(1 << 20, filling(1))
    published = memory.publish()
    with pytest.raises(PermissionError):
        os.truncate(f"/proc/self/fd/{published.fd}", 0)
    memory.close()
    with pytest.raises(OSError, match=r"No such file|another one"):
        MappedMemory(published)


def test_nothing_placed_can_be_published() -> None:
    memory = SharedMemory()
    store = MappedMemory(memory.publish())
    assert (memory.fills, store.fills) == (True, False)
    with pytest.raises(RuntimeError):
        store.place(0, never)


def test_pages_that_were_let_go_leave_the_process(tmp_path: Path) -> None:
    weights = random_weights("7", n_layer=1, n_embd=256, vocab_size=16384, head_size=64, seed=1, dtype=torch.float32)
    path = write_safetensors(tmp_path / "model.safetensors", weights)
    with open_checkpoint(path) as checkpoint:
        table = checkpoint.tensor("emb.weight")
        check_finite(checkpoint)
        total = table.numel() * 4
        first = resident_of(path)
        assert first > total
        checkpoint.let_go(["emb.weight"])
        assert resident_of(path) < first - total * 0.9
        assert torch.equal(table, weights["emb.weight"])
        checkpoint.let_go(checkpoint.names())
        assert resident_of(path) < 1 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def resident_of(path: Path) -> int:
    """Bytes of a mapped file in this process's memory."""
    total, counting = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counting = line.endswith(str(path))
        elif counting and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total
