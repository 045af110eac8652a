"""Tokenizers: the known vectors, nothing lost, and the same tokens however a text is cut into blocks."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvmpi.corpus.tokenizers import Tokenizer, load_tokenizer
from rwkvmpi.corpus.tokenizers.base import WINDOW, incomplete_tail
from rwkvmpi.corpus.tokenizers.world import WorldTokenizer
from rwkvmpi.errors import DocumentError, UserError

RANGES = [(32, 127), (9, 14), (0xA0, 0x250), (0x370, 0x500), (0x4E00, 0x5200), (0x1F300, 0x1F650), (0xAC00, 0xAC60)]
CHARACTERS = [chr(code) for low, high in RANGES for code in range(low, high)]


class Drip:
    """A stream that gives few bytes at a time, as pipes and decompressors do."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data, self._size, self._at = data, size, 0

    def read(self, count: int) -> bytes:
        data = self._data[self._at : self._at + min(count, self._size)]
        self._at += len(data)
        return data


def samples() -> Iterator[bytes]:
    """Texts of some windows: code, many scripts, a few broken bytes, noise, one long word."""
    rng = random.Random(7)
    code = Path(json.__file__).read_bytes() + Path(random.__file__).read_bytes() * 4
    scripts = "".join(rng.choices(CHARACTERS, k=70_000)).encode()
    yield code
    yield scripts
    for count in (1, 20, 3000):
        broken = bytearray(code + scripts)
        for _ in range(count):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        yield bytes(broken)
    yield rng.randbytes(150_000)
    yield "好".encode() * 60_000
    yield b"a" * 150_000
    yield b""
    yield b"\x00"


@pytest.fixture(scope="session")
def world() -> WorldTokenizer:
    tokenizer = load_tokenizer("auto", 65536)
    assert isinstance(tokenizer, WorldTokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def bpe_settings(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A small tokenizer JSON of the same make as the 20B one."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    missing = chr(0xFF)  # as in 20B: no token for some bytes that UTF-8 never has
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(set(alphabet) - {missing})
    )
    text = Path(random.__file__).read_text() + "über das 好好 学习 " * 50
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_tokens([" " * count for count in range(8, 1, -1)])
    tokenizer.enable_truncation(100)  # must be undone
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="session")
def bpe(bpe_settings: dict, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bpe") / "small.json"
    path.write_text(json.dumps(bpe_settings))
    return load_tokenizer(str(path), 720)


def test_world_vectors(world: WorldTokenizer) -> None:
    assert world.encode(b"Hello world").tolist() == [33155, 40213]
    assert world.encode("你好".encode()).tolist() == [10464, 11685]
    assert world.encode(b" 42").tolist() == [3515]
    assert len(world.entries) == 65529
    assert max(map(len, world.entries)) == 128
    for identifier in (65530, 70000):
        with pytest.raises(ValueError, match=str(identifier)):
            world.decode(np.array([identifier]))


def test_world_is_greedy_longest_match_over_bytes(world: WorldTokenizer) -> None:
    # Long entries everywhere, and many places where a match must not be decided by what lies before them only.
    rng = random.Random(11)
    long = [entry for entry in world.entries if len(entry) >= 16]
    long += [entry for entry in long if len(entry) > 120] * 100
    entries = rng.choices(long, k=30_000)
    edges = [entry[: rng.randrange(1, len(entry))] + b"\xff" for entry in rng.choices(long, k=3000)]
    tricky = [b"".join(entries), b"".join(one for pair in zip(entries, edges, strict=False) for one in pair)]
    for text in [*samples(), *tricky]:
        tokens = world.encode(text)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == world.plain.encode(text)[0]
        assert world.decode(tokens) == text


def test_plain_search_against_the_definition(world: WorldTokenizer) -> None:
    text = next(samples())[:3000] + "".join(CHARACTERS[::20]).encode() + bytes(range(256))
    position, expected = 0, []
    while position < len(text):
        length = max(n for n in range(1, 129) if text[position : position + n] in world.entries)
        expected.append(world.entries[text[position : position + length]])
        position += min(length, len(text) - position)
    assert world.plain.encode(text)[0] == expected


def test_world_rarely_needs_the_plain_search(world: WorldTokenizer) -> None:
    """Blocks of valid text begin with whole characters: else the next window would count as invalid."""
    text = "".join(random.Random(3).choices(CHARACTERS, k=150_000)).encode()
    for block in world.blocks(Drip(text, 1 << 20)):
        text[block.byte_start :].decode("utf-8")


@pytest.mark.parametrize("name", ["world", "bytes", "bpe"])
def test_blocks_and_resuming(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer("auto", 256) if name == "bytes" else request.getfixturevalue(name)
    for text in samples():
        try:
            blocks = list(tokenizer.blocks(Drip(text, 1 << 30)))
        except DocumentError:
            assert name == "bpe"
            continue
        assert sum(block.nbytes for block in blocks) == len(text)
        starts = [block.byte_start for block in blocks]
        assert starts == [sum(block.nbytes for block in blocks[:place]) for place in range(len(blocks))]
        assert all(0 < block.nbytes <= WINDOW for block in blocks)
        dripped = list(tokenizer.blocks(Drip(text, 777)))
        assert [block.byte_start for block in dripped] == starts
        for one, other in zip(blocks, dripped, strict=True):
            assert np.array_equal(one.tokens, other.tokens)
        for place in range(0, len(blocks), 2):
            rest = list(tokenizer.blocks(Drip(text[starts[place] :], 1 << 20), starts[place]))
            assert [block.byte_start for block in rest] == starts[place:]
            for one, other in zip(blocks[place:], rest, strict=True):
                assert np.array_equal(one.tokens, other.tokens)
        if name != "bpe":
            assert tokenizer.decode(np.concatenate([b.tokens for b in blocks] or [np.zeros(0, np.int32)])) == text


def test_bpe_equals_the_library_on_the_whole_text(bpe: Tokenizer, bpe_settings: dict) -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_str(json.dumps(bpe_settings))
    library.no_truncation()
    rng = random.Random(5)
    words = [
        "word",
        "x",
        "über",
        "好",
        "'s",
        "12",
        "...",
        " ",
        "  ",
        "\n",
        "\t \n",
        "\u00a0",
        "\u3000",
        "<|endoftext|>",
    ]
    mixed = "".join(rng.choices(words, k=60_000))
    spread = " \u3000".join(rng.choices(["好", "a"], k=40_000))  # white space before white space: no place to cut
    for text in (next(samples()).decode(), mixed, spread):
        assert len(text.encode()) > WINDOW
        assert bpe.encode(text.encode()).tolist() == library.encode(text, add_special_tokens=False).ids
        assert bpe.decode(bpe.encode(text.encode())) == text.encode()


def test_bpe_of_bytes_that_are_no_text(bpe: Tokenizer) -> None:
    text = "Wörter".encode("latin-1") + b" \xc3 \xf0\x9f " + "und é".encode()
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode(bpe.encode("e\u0301".encode())) == "é".encode()  # NFC, as the file asks
    with pytest.raises(DocumentError, match="0xff"):
        bpe.encode(b"fine \xff")


def test_bytes_are_tokens() -> None:
    tokenizer = load_tokenizer("auto", 256)
    assert tokenizer.encode(b"\x00A\xff").tolist() == [0, 65, 255]
    assert tokenizer.decode(np.array([0, 65, 255])) == b"\x00A\xff"
    with pytest.raises(ValueError, match="256"):
        tokenizer.decode(np.array([256]))


@pytest.mark.parametrize(
    ("spec", "vocab_size", "reason"),
    [
        ("auto", 50277, "--tokenizer FILE.json"),
        ("world", 50277, "fits models of 65536"),
        ("world", 65535, "fits models of 65536"),
        ("bytes", 65536, "fits models of 256"),
        ("nowhere.json", 256, "No such file"),
        ("small.json", 65536, "does not fit"),
        ("small.json", 600, "does not fit"),
        ("list.json", 600, "no object"),
        ("text.json", 600, "not JSON"),
        ("wordlevel.json", 720, "byte-level BPE"),
        ("prefix.json", 720, "pre-tokenizer"),
        ("lower.json", 720, "normaliser"),
        ("dropout.json", 720, "dropout"),
        ("strip.json", 720, "reaches over"),
        ("merges.json", 720, "is not a tokenizer file that can be read"),
    ],
)
def test_tokenizers_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe_settings: dict, spec: str, vocab_size: int, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    token = {"id": 700, "content": "<x>", "special": True, "lstrip": False, "rstrip": True, "normalized": False}
    files = {
        "small": bpe_settings,
        "list": [],
        "wordlevel": bpe_settings | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
        "prefix": bpe_settings | {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        "lower": bpe_settings | {"normalizer": {"type": "Lowercase"}},
        "dropout": bpe_settings | {"model": bpe_settings["model"] | {"dropout": 0.1}},
        "strip": bpe_settings | {"added_tokens": [token]},
        "merges": bpe_settings | {"model": bpe_settings["model"] | {"merges": [["x", "no such token"]]}},
    }
    for name, settings_ in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(settings_))
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(UserError, match=reason):
        load_tokenizer(spec, vocab_size)


@given(st.text(max_size=20), st.integers(0, 80))
@settings(deadline=None)
def test_incomplete_tail(text: str, cut: int) -> None:
    data = text.encode()[:cut]
    whole = data[: len(data) - incomplete_tail(data)]
    whole.decode("utf-8")
    assert len(data) - len(whole) <= 3
    assert whole.decode("utf-8") == data.decode("utf-8", "ignore")


def test_one_long_document_in_constant_memory(tmp_path: Path) -> None:
    """64 MB in one line, tokenised in a process of its own: its memory does not grow with the text."""
    import subprocess

    program = """
import resource, sys
from rwkvmpi.corpus.tokenizers import load_tokenizer
class Endless:
    left = int(sys.argv[2]) << 20
    def read(self, count):
        count = min(count, self.left, 60000)
        self.left -= count
        return (b"All work and no play makes Jack a dull boy. " * 1500)[:count]
total = 0
for block in load_tokenizer("auto", int(sys.argv[1])).blocks(Endless()):
    total += block.nbytes
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    for vocab_size in (256, 65536):
        peaks = []
        for megabytes in (1, 64):
            command = [sys.executable, "-c", program, str(vocab_size), str(megabytes)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            nbytes, peak = map(int, result.stdout.split())
            assert nbytes == megabytes << 20
            peaks.append(peak)
        assert peaks[1] - peaks[0] < 10_000  # KiB
