"""What other programs reach on the same GPU in the same run: rwkvmpi, the `rwkv` package, transformers, fla.

    python scripts/_gpu_peers.py [--size 1.5B] [--json FILE]

Each reads one document of 8,192 and of 32,768 tokens, random weights in bfloat16, and gives the logits of the last
token only. transformers' model is a Llama of the same layers and channels with grouped keys, read through its
scaled-dot-product attention. What is not installed is a row that says so. fla's kernel is timed alone, against ours.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from _gpu_speed import seconds_of, show

from rwkvmpi.models.chunk_reader import make_reader
from rwkvmpi.models.model import Model
from rwkvmpi.models.random_checkpoint import random_checkpoint
from rwkvmpi.models.random_weights import lazy_weights, official_shape, write_pth
from rwkvmpi.ops.cuda import library

LENGTHS = (8_192, 32_768)
CHUNK = 2048

Row = dict[str, Any]


def ours(size: str) -> Callable[[int], Callable[[], object]]:
    """Chunk by chunk, as a job reads."""
    import numpy as np

    model = Model(random_checkpoint(official_shape("7", size), torch.bfloat16, "cuda"), "bfloat16", "cuda")
    stage, reader = model.stage, make_reader(model.stage, CHUNK)
    state = [layer.wkv.view(-1).view(torch.uint8).clone() for layer in model.state().layers]
    rows, tokens = np.array([[0, CHUNK]], dtype=np.int32), np.ones(CHUNK, dtype=np.int32)

    def read(length: int) -> Callable[[], object]:
        def body() -> None:
            for _ in range(length // CHUNK):
                reader.begin_tokens(tokens, rows)
                for item in range(len(stage.layers)):
                    own = reader.state(item, 1)
                    own.wkv.view(-1).view(torch.uint8).copy_(state[item])
                    reader.read(item, own)
                    state[item].copy_(own.wkv.view(-1).view(torch.uint8))
            stage.logits(stage.finish(reader.x[-1:], stage.dtype))

        return body

    return read


def rwkv_package(size: str) -> Callable[[int], Callable[[], object]]:
    """The `rwkv` package with its CUDA kernel."""
    os.environ["RWKV_V7_ON"], os.environ["RWKV_CUDA_ON"] = "1", "1"
    from rwkv.model import RWKV

    shape = official_shape("7", size)
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: tensor.make() for name, tensor in lazy_weights(shape, 0, torch.bfloat16).items()}
        path = write_pth(Path(folder) / "model.pth", weights)
        model = RWKV(model=str(path).removesuffix(".pth"), strategy="cuda fp16")

    def read(length: int) -> Callable[[], object]:
        ids = [1] * length

        def body() -> None:
            state = None
            for first in range(0, length, CHUNK):
                _, state = model.forward(ids[first : first + CHUNK], state)

        return body

    return read


def transformer(size: str) -> Callable[[int], Callable[[], object]]:
    """A Llama of as many layers and channels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = official_shape("7", size)
    heads = shape.n_embd // 64
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.n_embd,
        intermediate_size=shape.n_embd * 7 // 2,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=max(LENGTHS),
        attn_implementation="sdpa",
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()

    def read(length: int) -> Callable[[], object]:
        ids = torch.ones(1, length, dtype=torch.int64, device="cuda")
        return lambda: model(ids, use_cache=True, logits_to_keep=1)

    return read


def fla_kernel() -> Row:
    """fla's RWKV-7 kernel and ours, forward, B8 T4096 H64."""
    from fla.ops.rwkv7 import chunk_rwkv7

    from rwkvmpi.ops.cuda.time_mix import TILES
    from rwkvmpi.ops.cuda.wkv import wkv7 as plain

    wkv7: Any = plain
    shape = (8, 4096, 64, 64)
    r, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.5 for _ in range(3))
    kk = torch.nn.functional.normalize(torch.randn(shape, device="cuda"), dim=-1)
    log_w = -0.6065306597 * torch.rand(shape, device="cuda")
    a, b = (-kk).bfloat16(), (kk * torch.rand_like(kk)).bfloat16()
    theirs = seconds_of(lambda: chunk_rwkv7(r=r, w=log_w.bfloat16(), k=k, v=v, a=a, b=b, scale=1.0))
    flat = [x.flatten(0, 1) for x in (r, log_w.exp().bfloat16(), k, v, a, b)]
    rows = torch.tensor([[i * 4096, 4096] for i in range(8)], dtype=torch.int32, device="cuda")
    state = torch.zeros(8, 64, 64, 64, device="cuda")
    out = torch.empty_like(flat[0]), torch.empty_like(state)
    mine = seconds_of(lambda: wkv7(out, *flat, state, rows, body=TILES))
    return {
        "program": "fla, WKV-7 forward",
        "ms": theirs * 1000,
        "ours_ms": mine * 1000,
        "ours_over_theirs": theirs / mine,
    }


@click.command(help=__doc__)
@click.option("--size", default="1.5B")
@click.option("--json", "path", type=click.Path(path_type=Path))
def main(size: str, path: Path | None) -> None:
    if why := library.reason():
        raise click.ClickException(why)
    rows: list[Row] = []
    for name, make in (("rwkvmpi", ours), ("rwkv package", rwkv_package), ("transformers, Llama", transformer)):
        row: Row = {"program": name, "size": size}
        try:
            read = make(size)
            with torch.inference_mode():
                for length in LENGTHS:
                    row[f"tokens_per_second_{length}"] = length / seconds_of(read(length), 1.0, 3)
        except Exception as error:  # whatever is wrong with another program is a row of the table, not our end
            row["note"] = f"{type(error).__name__}: {error}"[:100]
        rows.append(row)
        torch.cuda.empty_cache()
    try:
        rows.append(fla_kernel())
    except Exception as error:
        rows.append({"program": "fla, WKV-7 forward", "note": f"{type(error).__name__}: {error}"[:100]})
    show([{"note": "", **row} for row in rows if "size" in row])
    show([row for row in rows if "size" not in row])
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
