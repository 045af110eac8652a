"""The small models on which the forward pass is tested: odd shapes of every version, on real files."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from rwkvmpi.models.model import Model, load_model
from rwkvmpi.models.random_weights import random_weights, write_pth

TOLERANCE = 1e-5  # of the largest absolute logit; float32 against the truth
VERSIONS = ("4", "5.0", "5.2", "6", "7")


@dataclass(frozen=True)
class Case:
    """A model shape; `ranks` must have every low-rank width different."""

    version: str
    name: str
    n_layer: int
    n_embd: int
    vocab_size: int
    head_size: int
    ffn_width: int
    ranks: dict[str, int] = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        return f"{self.version}-{self.name}"


def _cases() -> list[Case]:
    ranks = {"7": {"w": 12, "a": 7, "v": 5, "g": 20}, "6": {"maa": 5, "decay": 9}}
    wide = {"7": {"w": 24, "a": 8, "v": 16, "g": 40}, "6": {"maa": 8, "decay": 16}}
    cases = []
    for version in VERSIONS:
        cases.append(Case(version, "head8-ffn2C", 4, 40, 61, 8, 80, ranks.get(version, {})))
        cases.append(Case(version, "head64-ffn3.5C", 3, 128, 97, 64, 448, wide.get(version, {})))
    return cases


CASES = _cases()
SMALL = {case.version: case for case in CASES if case.name == "head8-ffn2C"}
_folder = TemporaryDirectory(prefix="rwkvmpi-models-")


@cache
def weights(case: Case) -> dict[str, Any]:
    """Random weights under their .pth names; RWKV-6 with start states, so that a transposed one shows."""
    return random_weights(
        case.version,
        n_layer=case.n_layer,
        n_embd=case.n_embd,
        vocab_size=case.vocab_size,
        head_size=case.head_size,
        ffn_width=case.ffn_width,
        ranks=case.ranks or None,
        seed=7,
        dtype=torch.float32,
        time_state=case.version == "6",
    )


@cache
def model_file(case: Case) -> Path:
    """The case as a .pth file."""
    path = Path(_folder.name) / f"{case.id}.pth"
    return write_pth(path, weights(case))


@cache
def model(case: Case, dtype: str = "float32") -> Model:
    return load_model(model_file(case), dtype=dtype)


def tokens(case: Case, count: int, seed: int = 0) -> np.ndarray:
    """A document as models are fed it: token 0, then random ones."""
    ids = np.random.default_rng(seed).integers(0, case.vocab_size, count)
    ids[:1] = 0
    return ids


def difference(found: torch.Tensor | np.ndarray, truth: np.ndarray) -> float:
    """The largest absolute difference, relative to the largest absolute value of the truth."""
    return float(np.abs(np.asarray(found, dtype=np.float64) - truth).max() / np.abs(truth).max())
