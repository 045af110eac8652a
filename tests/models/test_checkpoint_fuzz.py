"""Damaged and hostile model files end in a UserError, or in a checkpoint whose SHA-256 differs: never in another
exception, a crash, a hang or a memory bomb."""

from __future__ import annotations

import json
import random
import resource
import signal
import struct
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import Raw, rewrite_pickle, small_weights, write, write_zip
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvmpi.errors import UserError
from rwkvmpi.models.checkpoint import check_finite, open_checkpoint
from rwkvmpi.models.pickle_reader import PickleRefused, describe_pickle
from rwkvmpi.models.safetensors_file import read_safetensors


@contextmanager
def limited(seconds: float = 5.0, megabytes: int = 300) -> Iterator[None]:
    """Fails when the block takes longer, or makes the process's peak memory grow by more."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes << 10


def survives(path: Path, sha256: str) -> bool:
    """Whether the file opened. Reads every tensor if it did."""
    with limited():
        try:
            with open_checkpoint(path) as checkpoint:
                assert checkpoint.sha256() != sha256
                check_finite(checkpoint)
                for name in checkpoint.names():
                    assert tuple(checkpoint.tensor(name).shape) == checkpoint.tensor_shape(name)
        except UserError:
            return False
    return True


def damaged(data: bytes, chance: random.Random) -> bytes:
    """One of: cut off, bits flipped, a run overwritten, a piece removed or repeated. Headers are hit more often."""
    at = chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(min(len(data), 4000))
    if chance.random() < 0.3:
        at = len(data) - 1 - at
    match chance.randrange(5):
        case 0:
            return data[:at]
        case 1:
            changed = bytearray(data)
            for _ in range(chance.choice((1, 1, 2, 8))):
                changed[at] ^= 1 << chance.randrange(8)
                at = min(len(data) - 1, at + chance.randrange(64))
            return bytes(changed)
        case 2:
            run = chance.choice((b"\0", b"\xff", b"9")) * chance.choice((1, 2, 4, 8, 512))
            return data[:at] + run + data[at + len(run) :]
        case 3:
            return data[:at] + data[at + chance.choice((1, 8, 64, 4096)) :]
        case _:
            return data[:at] + data[at : at + chance.choice((1, 8, 64, 4096))] + data[at:]


def put(path: Path, content: bytes) -> None:
    path.unlink()  # writing over an old file waits for the disk
    path.write_bytes(content)


@pytest.mark.parametrize(("form", "naming"), [("pth", "pth"), ("safetensors", "hf-a"), ("sharded", "pth")])
def test_damaged_files(tmp_path: Path, form: str, naming: str) -> None:
    opened = write(tmp_path, small_weights("7"), form, naming)
    with open_checkpoint(opened) as checkpoint:
        sha256, victims = checkpoint.sha256(), [file for file in checkpoint.files if file.name != "config.json"]
    chance = random.Random(f"{form} 20")
    good = {victim: victim.read_bytes() for victim in victims}
    start, refused, count = time.monotonic(), 0, 0
    while count < 600 and time.monotonic() - start < 10:
        victim = opened if chance.random() < 0.5 else chance.choice(victims)
        changed = damaged(good[victim], chance)
        if changed == good[victim]:
            continue
        put(victim, changed)
        refused += not survives(opened, sha256)
        put(victim, good[victim])
        count += 1
    assert count >= 100
    assert refused > count // 4, "the damage never reaches the headers"
    with open_checkpoint(opened) as checkpoint:
        assert checkpoint.sha256() == sha256


def test_damaged_pickles_with_a_checksum_that_fits(tmp_path: Path) -> None:
    source = write(tmp_path, small_weights("7"))
    with open_checkpoint(source) as checkpoint:
        sha256 = checkpoint.sha256()
    with zipfile.ZipFile(source) as archive:
        code = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    chance = random.Random(21)
    for _ in range(400):
        changed = rewrite_pickle(source, tmp_path / "changed.pth", damaged(code, chance))
        survives(changed, sha256)
        changed.unlink()


PIECES = [
    b"\x80\x02", b"}", b"]", b")", b"(", b"N", b"\x88", b"K\x07", b"M\xff\xff", b"J\xff\xff\xff\xff", b"G" + bytes(8),
    b"\x8a\x08" + b"\x7f" * 8, b"X\x01\0\0\0a", b"X\xff\xff\xff\xff", b"q\0", b"q\1", b"r\xff\xff\xff\xff", b"h\0",
    b"h\1", b"j\0\0\0\0", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n", b"Q", b"R", b"b", b".",
    b"X\x07\0\0\0storage", b"X\x010\0\0\0", b"\x93", b"c" + b"x" * 300,
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=40).map(b"".join))
def test_any_pickle_is_described_or_refused(code: bytes) -> None:
    for program in (code, b"\x80\x02" + code + b"."):
        with suppress(PickleRefused):
            describe_pickle(program)


NASTY = st.recursive(
    st.sampled_from([None, True, 0, -1, 2**63, "F32"]) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_safetensors_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("header") / "m.safetensors"
    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]},
    }
    target = data.draw(st.sampled_from([header, header["a"], header["b"]]))
    target[data.draw(st.sampled_from([*target, "__metadata__", "c"]))] = data.draw(NASTY)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(10))
    try:
        entries = read_safetensors(path)
    except UserError:
        return
    size = path.stat().st_size
    assert all(entry.offset + entry.nbytes <= size for entry in entries)


def refused(path: Path, sentence: str) -> None:
    with limited(), pytest.raises(UserError, match=sentence):
        open_checkpoint(path)


def test_bombs(tmp_path: Path) -> None:
    """Files that are small, or hold little, and would cost a careless reader gigabytes or hours."""
    path = tmp_path / "bomb.pth"
    head = b"\x80\x02"
    refused(write_zip(path, Raw(head + b"]" * (17 << 20) + b"."), {}), r"has 178\d+ bytes, more than any model needs")
    refused(write_zip(path, Raw(head + b"]" * 600_000 + b"."), {}), r"more than 500000 instructions")
    deep = b"}" + b"X\x01\0\0\0a" + b")" + b"\x85" * 400_000 + b"s."  # a tuple in a tuple in a tuple ...
    refused(write_zip(path, Raw(head + deep), {}), r"the entry 'a' is of type tuple")
    refused(write_zip(path, Raw(head + b"}" + deep[7:-2] + b"Ns."), {}), r"a key of its dictionary is of type tuple")
    laughs = b"}(X\x01\0\0\0a" + b")q\0" + b"0".join(b"h\0h\0\x86q\0" for _ in range(2)) + b"u."
    refused(write_zip(path, Raw(head + laughs), {}), r"pickle instruction b'0'")
    refused(write_zip(path, Raw(head + b"}(X\xff\xff\xff\xffa"), {}), r"breaks off")

    data = bytearray(write(tmp_path, small_weights("4")).read_bytes())
    end = data.index(b"PK\x06\x06")
    data[end + 32 : end + 40] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(data)
    refused(path, r"has 1099511627776 members, more than the 100000 allowed")

    tensor = struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,9]}}'[:60]
    (tmp_path / "m.safetensors").write_bytes(tensor)
    refused(tmp_path / "m.safetensors", r"is not valid JSON")
    huge = b'{"a":' + b"9" * 10_000 + b"}"
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(huge)) + huge)
    refused(tmp_path / "m.safetensors", r"is not valid JSON")
