"""Small model files of every version, naming and format for the tests of opening them."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from rwkvmpi.models.checkpoint import Checkpoint
from rwkvmpi.models.random_weights import random_weights, write_model

VERSIONS = ("4", "5.0", "5.2", "6", "7")
NAMINGS = {"4": ("pth", "hf-4"), "5.0": ("pth", "hf-4"), "5.2": ("pth", "hf-4"), "6": ("pth", "hf-4"),
           "7": ("pth", "hf-a", "hf-b")}  # fmt: skip
RANKS = {"7": {"w": 3, "a": 5, "v": 2, "g": 7}, "6": {"maa": 3, "decay": 5}}


def small_weights(version: str, **changes: Any) -> dict[str, torch.Tensor]:
    """.pth-named weights: 2 layers, 16 channels, heads of 8, feed-forward 3.5C, ranks that all differ."""
    sizes: dict[str, Any] = {"n_layer": 2, "n_embd": 16, "vocab_size": 11, "head_size": 8, "ffn_width": 56, "seed": 7}
    return random_weights(version, **{**sizes, "ranks": RANKS.get(version), **changes})


def write(folder: Path, weights: dict[str, Any], form: str = "pth", naming: str = "pth", **options: Any) -> Path:
    """Writes in one of the forms pth, safetensors, sharded; returns the path to open."""
    name = "model.pth" if form == "pth" else "model.safetensors"
    return write_model(
        folder / name, weights, naming=naming, shard_bytes=4000 if form == "sharded" else None, **options
    )


def expected_tensor(weights: dict[str, torch.Tensor], checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """What the checkpoint must hand out for a canonical name, straight from the .pth-named weights."""
    shape = checkpoint.tensor_shape(name)
    if checkpoint.version == "5.0" and name.endswith(("time_decay", "time_faaaa")):
        return weights[name.replace("time_faaaa", "time_first")].reshape(-1, 1).repeat(1, shape[1])
    return weights[name].reshape(shape)


class Raw:
    """A pickle program given as bytes: what a hostile file would carry."""

    def __init__(self, code: bytes) -> None:
        self.code = code


def write_zip(path: Path, value: Any, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A .pth by hand: `value` pickled as it is (or Raw), `storages` as members."""
    code = value.code if isinstance(value, Raw) else pickle.dumps(value, protocol=2)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", code)
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def rewrite_pickle(source: Path, target: Path, code: bytes) -> Path:
    """A copy of a .pth with another data.pkl and a checksum that fits it."""
    buffer = io.BytesIO(source.read_bytes())
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            new.writestr(info.filename, code if info.filename.endswith("data.pkl") else old.read(info))
    return target
