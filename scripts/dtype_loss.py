"""What --dtype bfloat16 and int8 cost in exactness, against float32.

    python scripts/dtype_loss.py --json scripts/figures/dtype-loss.json

Two figures for each: bits per byte of the bundled model on the files held out from its training, through
`rwkvmpi score`; and the Kullback-Leibler divergence of the next-token distributions, KL(float32 || dtype), of a model
with random weights (RWKV-7, 12 layers x 768 channels), on random tokens, in nats per token.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bundled_model_figures import copy_held_out, score

from rwkvmpi.models.cost import KINDS as KINDS_BY_DEVICE
from rwkvmpi.models.model import load_model
from rwkvmpi.models.random_weights import random_weights, write_model
from rwkvmpi.ops import library

KINDS = KINDS_BY_DEVICE["cpu"]
REFERENCE = KINDS[0]


def bits_per_byte(folder: Path) -> dict[str, dict[str, float]]:
    """By dtype: the mean over the held-out files, and the largest loss of a file against float32."""
    texts = copy_held_out(Path(sysconfig.get_paths()["stdlib"]), folder / "held-out", False, False)
    found = {kind: score("bundled", folder / "held-out", folder / f"run-{kind}", "--dtype", kind) for kind in KINDS}
    return {
        kind: {
            "bits_per_byte": float(np.mean([found[kind][name] for name in texts])),
            "largest_loss": max(found[kind][name] - found[REFERENCE][name] for name in texts),
        }
        for kind in KINDS
    }


def divergence(folder: Path, tokens: int, seed: int) -> dict[str, dict[str, float]]:
    """By dtype: the mean and the largest KL(float32 || dtype) of a position, and the share of equal best tokens."""
    weights = random_weights("7", n_layer=12, n_embd=768, vocab_size=65536, seed=seed, dtype=torch.bfloat16)
    path = write_model(folder / "random.safetensors", weights)
    ids = np.random.default_rng(seed).integers(1, 65536, tokens)
    truth = load_model(path, dtype=REFERENCE).forward(ids)[0].log_softmax(-1)
    figures = {}
    for kind in KINDS[1:]:
        found = load_model(path, dtype=kind).forward(ids)[0].log_softmax(-1)
        each = (truth.exp() * (truth - found)).double().sum(-1)
        same = (truth.argmax(-1) == found.argmax(-1)).double().mean()
        figures[kind] = {"mean": float(each.mean()), "largest": float(each.max()), "same_best_token": float(same)}
    return figures


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.option("--tokens", type=click.IntRange(1, 8192), default=1024, show_default=True, help="Of the random model.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here too.")
def main(tokens: int, seed: int, target: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scores = bits_per_byte(folder)
        distances = divergence(folder, tokens, seed)
    print(f"{'dtype':10} {'bits per byte':>14} {'loss':>10} {'largest':>10} {'KL, nats':>10} {'largest':>10} same best")
    for kind, figures in scores.items():
        loss = figures["bits_per_byte"] - scores[REFERENCE]["bits_per_byte"]
        row = f"{kind:10} {figures['bits_per_byte']:14.5f} {loss:+10.5f} {figures['largest_loss']:+10.5f}"
        if kind in distances:
            far = distances[kind]
            row += f" {far['mean']:10.2e} {far['largest']:10.2e} {far['same_best_token']:9.1%}"
        print(row)
    if target is not None:
        facts: dict[str, Any] = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": platform.machine(),
            "operators": library.current(),
            "bits_per_byte": scores,
            "divergence": distances,
            "tokens": tokens,
            "seed": seed,
        }
        target.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
