"""The model that is measured: random weights of a released shape, of one given, or of a model file's."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from rwkvmpi.errors import UserError
from rwkvmpi.models import cost
from rwkvmpi.models.checkpoint import Checkpoint, open_checkpoint
from rwkvmpi.models.random_weights import lazy_weights, make_shape, official_shape, write_model
from rwkvmpi.models.schema import ModelShape

DEFAULT_SHAPE = "7:0.1B"
MOST_WEIGHTS = {False: 100_000_000, True: 25_000_000}  # in the layers' matrices, by whether it shall be quick
_CUSTOM = re.compile(r"(\d+)x(\d+)")


def parse_shape(text: str) -> ModelShape:
    """'0.1B' or '768x12' (channels x layers), of RWKV-7, or of another version: '6:1.6B', '4:169M'. UserError for
    anything else."""
    version, colon, size = text.rpartition(":")
    version = version if colon else "7"
    if custom := _CUSTOM.fullmatch(size):
        return make_shape(version, n_embd=int(custom[1]), n_layer=int(custom[2]), vocab_size=65536)
    return official_shape(version, size)


def shape_of(model: str | None, text: str | None) -> ModelShape:
    """The shape of a model file, or of --shape, or the default one."""
    if model is None:
        return parse_shape(text or DEFAULT_SHAPE)
    with open_checkpoint(model) as checkpoint:
        return checkpoint.shape


def slice_of(shape: ModelShape, quick: bool) -> ModelShape:
    """As many of its layers as are enough to measure: they are all alike but the first, which is counted as the others.

    UserError when not even they fit this machine's memory in float32.
    """
    each = cost.layer_weights(shape, shape.n_layer - 1)[0]
    layers = min(shape.n_layer, max(2, MOST_WEIGHTS[quick] // each))
    needed = layers * cost.layer_weight_bytes(shape, 4) + sum(cost.ends_weight_bytes(shape, 4))
    free = psutil.virtual_memory().available
    if needed > 0.8 * free:
        raise UserError(
            f"measuring RWKV-{shape.version} of {shape.n_embd} channels takes {needed / 1e9:,.1f} GB of memory, but "
            f"{free / 1e9:,.1f} GB are free here; choose a smaller one: --shape 0.1B"
        )
    return replace(shape, n_layer=layers)


@contextmanager
def random_checkpoint(shape: ModelShape) -> Iterator[Checkpoint]:
    """A checkpoint of random weights, in a temporary file that exists within the context."""
    with tempfile.TemporaryDirectory(prefix="rwkvmpi-bench-") as folder:
        path = Path(folder) / "model.safetensors"
        write_model(path, lazy_weights(shape, 0, torch.bfloat16))
        with open_checkpoint(path) as checkpoint:
            yield checkpoint
