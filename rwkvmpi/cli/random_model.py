"""rwkvmpi random-model VERSION -o FILE"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rwkvmpi.errors import UserError


def _ranks(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    result = {}
    for value in values:
        name, equals, number = value.partition("=")
        if not equals or not number.isdecimal():
            raise click.BadParameter(f"{value!r} is not NAME=NUMBER, such as w=64", context, parameter)
        result[name] = int(number)
    return result


@click.command("random-model")
@click.argument("version", metavar="VERSION", type=click.Choice(["4", "5.0", "5.2", "6", "7"]))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="FILE.pth or FILE.safetensors")
@click.option("--size", help="A released model's shape, such as 0.1B; the options below change it.")
@click.option("--layers", "n_layer", type=click.IntRange(1), help="Layers.")
@click.option("--width", "n_embd", type=click.IntRange(1), help="Channels.")
@click.option("--vocab", "vocab_size", type=click.IntRange(1), help="Vocabulary: 65536 World, 50277 20B, 256 bytes.")
@click.option("--head-size", type=click.IntRange(1), help="Channels per head.  [default: 64]")
@click.option("--ffn", "ffn_width", type=click.IntRange(1), help="Feed-forward width.  [default: as released]")
@click.option(
    "--rank",
    "ranks",
    multiple=True,
    callback=_ranks,
    metavar="NAME=R",
    help="A low-rank width: w, a, v, g of RWKV-7; maa, decay of RWKV-6. Repeatable.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed and shape, same weights.")
@click.option(
    "--naming",
    type=click.Choice(["pth", "hf-a", "hf-b", "hf-4"]),
    default="pth",
    show_default=True,
    help="Tensor names: original; flash-linear-attention; transformers' RWKV-7; transformers' RWKV-4.",
)
@click.option("--shard-mib", type=click.IntRange(1), metavar="N", help="Safetensors in shards of at most N MiB.")
@click.option("--force", is_flag=True, help="Overwrite FILE and config.json.")
def command(
    version: str,
    output: Path,
    size: str | None,
    ranks: dict[str, int],
    dtype: str,
    seed: int,
    naming: str,
    shard_mib: int | None,
    force: bool,
    **sizes: Any,
) -> None:
    """A model of random weights, of a released shape (--size) or of your own (--layers, --width).

    For benchmarks and tests: its decays and gates behave like a trained model's, its predictions mean nothing.
    A .safetensors file is written tensor by tensor, so the model may be larger than the memory.
    """
    given = {name: value for name, value in sizes.items() if value is not None}
    if size is None and not {"n_layer", "n_embd"} <= set(given):
        raise click.UsageError("give --size, or both --layers and --width")

    import torch

    from rwkvmpi.models.checkpoint import open_checkpoint
    from rwkvmpi.models.random_weights import lazy_weights, make_shape, official_shape, write_model
    from rwkvmpi.models.safetensors_file import INDEX_SUFFIX

    # Sizes that are not given come from the released model, or else are the defaults of make_shape.
    base: dict[str, Any] = {"vocab_size": 50277 if version == "4" else 65536}
    if size is not None:
        released = official_shape(version, size)
        base = {name: getattr(released, name) for name in ("n_layer", "n_embd", "vocab_size", "ranks")}
        if "n_embd" not in given:
            base["ffn_width"] = released.ffn_width
    base["ranks"] = {**base.get("ranks", {}), **ranks}
    shape = make_shape(version, **{**base, **given})
    first = output if shard_mib is None else output.with_name(output.stem + INDEX_SUFFIX)
    for path in (first, *([output.parent / "config.json"] if naming != "pth" else [])):
        if path.exists() and not force:
            raise UserError(f"{path}: exists already; choose another folder or name, or add --force.")
    weights = lazy_weights(shape, seed, getattr(torch, dtype))
    written = write_model(output, weights, naming=naming, shard_bytes=shard_mib and shard_mib << 20)
    with open_checkpoint(written) as checkpoint:
        click.echo(
            f"{written}: RWKV-{version}, {shape.n_layer} layers, {shape.n_embd} channels, {shape.vocab_size} words, "
            f"{checkpoint.parameters():,} parameters, {dtype}"
        )
