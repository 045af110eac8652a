"""What a config.json beside Hugging Face weights says that their shapes do not: whether ln0 is already applied,
and epsilons that differ from RWKV's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rwkvmpi.errors import UserError
from rwkvmpi.models.safetensors_file import MAX_JSON_BYTES, parse_json
from rwkvmpi.models.schema import ModelShape

LAYER_NORM_EPS = 1e-5
GROUP_NORM_EPS = 64e-5  # for every head size


def read_config(path: Path) -> dict[str, Any]:
    """The object in the file, or {} when there is no such file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: too large for a configuration ({path.stat().st_size} bytes).")
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return parse_json(text, f"{path}: the configuration")


def is_ln0_fused(path: Path, config: dict[str, Any], has_ln0: bool) -> bool:
    """Whether the embedding of an hf-b file already went through ln0. The config decides; without a word from it, a
    file without ln0 is fused, and a file with ln0 could be either: refused rather than guessed."""
    said = config.get("embedding_layer_norm_fused", config.get("deep_embedding"))
    if said is not None and not isinstance(said, bool):
        raise UserError(f"{path}: embedding_layer_norm_fused is {str(said)[:40]!r}, expected true or false.")
    if said is False and not has_ln0:
        raise UserError(f"{path}: embedding_layer_norm_fused is false, but the weights have no blocks.0.ln0.")
    if said is None and has_ln0:
        raise UserError(
            f"{path}: does not say whether ln0 is already applied to the embedding, and the weights have "
            f'blocks.0.ln0; add "embedding_layer_norm_fused": true or false to it.'
        )
    return said is not False


def check_epsilons(path: Path, config: dict[str, Any], naming: str, shape: ModelShape) -> None:
    """Raises UserError when the file was made with epsilons other than RWKV's: its logits would come out wrong by
    little, and nothing would tell."""
    stated: list[tuple[str, Any, float]] = []
    if naming == "hf-a" and "norm_eps" in config:
        eps = config["norm_eps"]
        stated.append(("norm_eps", eps, LAYER_NORM_EPS))
        if isinstance(eps, float) and shape.head_size:  # that library multiplies it by the head size for g_norm
            stated.append(("norm_eps times the head size", eps * shape.head_size, GROUP_NORM_EPS))
    if naming in ("hf-b", "hf-4") and "layer_norm_epsilon" in config:
        stated.append(("layer_norm_epsilon", config["layer_norm_epsilon"], LAYER_NORM_EPS))
    if naming == "hf-b" and "group_norm_epsilon" in config:
        stated.append(("group_norm_epsilon", config["group_norm_epsilon"], GROUP_NORM_EPS))
    for name, found, expected in stated:
        if not isinstance(found, int | float) or not math.isclose(found, expected, rel_tol=1e-3):
            raise UserError(
                f"{path}: {name} is {str(found)[:40]}, but RWKV uses {expected:g}; such a model is not supported."
            )
