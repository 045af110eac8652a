"""The command `rwkvmpi random-model`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from rwkvmpi.cli.random_model import command
from rwkvmpi.errors import UserError
from rwkvmpi.models.checkpoint import open_checkpoint

SMALL = ("--layers", "2", "--width", "32", "--head-size", "8", "--vocab", "20")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    if result.exit_code:
        raise RuntimeError(result.output)
    return result.output


@pytest.mark.parametrize("version", ["4", "5.0", "5.2", "6", "7"])
def test_own_shape(tmp_path: Path, version: str) -> None:
    text = run(version, "-o", tmp_path / "m.pth", *SMALL, "--ffn", 112, "--dtype", "float16")
    checkpoint = open_checkpoint(tmp_path / "m.pth")
    shape = checkpoint.shape
    assert (shape.version, shape.n_layer, shape.n_embd, shape.vocab_size, shape.ffn_width) == (version, 2, 32, 20, 112)
    assert checkpoint.dtype == torch.float16
    assert f"RWKV-{version}, 2 layers, 32 channels, 20 words, {checkpoint.parameters():,} parameters" in text


def test_released_shape_with_changes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.safetensors"
    run("7", "-o", path, "--size", "0.1B", "--layers", 1, "--vocab", 256, "--rank", "w=8", "--naming", "hf-b",
        "--shard-mib", 4)  # fmt: skip
    checkpoint = open_checkpoint(path.parent)
    assert checkpoint.ln0_fused
    assert len(checkpoint.files) > 4
    assert (checkpoint.shape.n_embd, checkpoint.shape.head_size, checkpoint.shape.ffn_width) == (768, 64, 3072)
    assert checkpoint.shape.ranks == {"w": 8, "a": 64, "g": 128}
    with pytest.raises(UserError, match="exists already"):
        run("7", "-o", path, "--size", "0.1B", "--shard-mib", 4)


def test_seeds_and_overwriting(tmp_path: Path) -> None:
    digests = []
    for seed in (0, 0, 1):
        run("6", "-o", tmp_path / "m.safetensors", *SMALL, "--seed", seed, "--force")
        digests.append(open_checkpoint(tmp_path / "m.safetensors").sha256())
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(UserError, match=r"m\.safetensors: exists already; choose another"):
        run("6", "-o", tmp_path / "m.safetensors", *SMALL)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("7", "--size", "9B"), r"no released RWKV-7 of size '9B'; choose one of 0\.1B"),
        (("4", *SMALL, "--rank", "w=3"), r"the rank w=3 does not exist in RWKV-4"),
        (("7", *SMALL, "--head-size", "7"), r"32 channels cannot be divided into heads of size 7"),
        (("6", *SMALL, "--naming", "hf-a"), r"the naming hf-a exists for RWKV-7 only"),
        (("7", *SMALL, "--naming", "hf-4"), r"hf-4 exists for RWKV-4, 5 and 6 only"),
        (("7", *SMALL, "--shard-mib", "1"), r"must end in \.safetensors, or in \.pth if it is not sharded"),
    ],
)
def test_refusals(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run(*arguments, "-o", tmp_path / "m.pth")
    assert not list(tmp_path.iterdir())


def test_usage(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="give --size, or both --layers and --width"):
        run("7", "-o", tmp_path / "m.pth", "--layers", 2)
    with pytest.raises(RuntimeError, match="'w' is not NAME=NUMBER"):
        run("7", "-o", tmp_path / "m.pth", *SMALL, "--rank", "w")


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be made a folder \(File exists\)"):
        run("7", *SMALL, "-o", tmp_path / "file" / "m.pth")
