"""Tensor names: every naming of RWKV weights in the wild to the names of the original .pth files, and back.

    pth    emb.weight, blocks.0.att.key.weight, ...                       any version
    hf-a   model.layers.0.attn.k_proj.weight, ... (flash-linear-attention)   RWKV-7
    hf-b   rwkv7.blocks.0.att.key.weight, ... (transformers; also with model. in front)   RWKV-7
    hf-4   rwkv.blocks.0.attention.key.weight, ... (transformers)          RWKV-4, 5 and 6

Only names and layouts are translated here; shapes are the business of schema.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

NAMINGS = ("pth", "hf-a", "hf-b", "hf-4")

_LORA = re.compile(r"([wavg])_lora\.lora\.(0\.weight|2\.weight|2\.bias)")
_MIXED = re.compile(r"(time_(?:mix|maa))_(key|value|receptance|gate)")
_FLA_ATT = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output", "g_norm": "ln_x"}
_FLA_BLOCK = {"pre_norm": "ln0", "attn_norm": "ln1", "ffn_norm": "ln2"}
_FLA_TOP = {"model.embeddings.weight": "emb.weight", "model.norm.weight": "ln_out.weight",
            "model.norm.bias": "ln_out.bias", "lm_head.weight": "head.weight"}  # fmt: skip
_PACKED_ORDER = "rwkvag"  # the rows of the packed attn.x_x of early flash-linear-attention files


@dataclass(frozen=True)
class Source:
    """Where a canonical tensor comes from: a tensor of the file, transposed, or one row of it."""

    name: str
    transposed: bool = False
    row: int | None = None


def detect_naming(names: Iterable[str]) -> str | None:
    """The naming of a file by its tensor names, or None when it is no RWKV naming."""
    names = set(names)
    if "emb.weight" in names or any(name.startswith("blocks.") for name in names):
        return "pth"
    if any(name.startswith(("rwkv7.blocks.", "model.blocks.")) for name in names):
        return "hf-b"
    if any(re.match(r"model\.layers\.\d+\.attn\.(k_k|w_lora\.)", name) for name in names):
        return "hf-a"
    if any(name.startswith("rwkv.blocks.") for name in names):
        return "hf-4"
    return None


def canonical_sources(names: Iterable[str], naming: str) -> dict[str, list[Source]]:
    """Canonical name -> the tensors of the file that claim it (one, in a sound file). Names that the naming does not
    know keep their own, so that the check of the schema finds them."""
    sources: dict[str, list[Source]] = {}
    for name in names:
        if naming == "hf-a" and (packed := re.fullmatch(r"model\.layers\.(\d+)\.attn\.x_x", name)):
            for row, letter in enumerate(_PACKED_ORDER):
                sources.setdefault(f"blocks.{packed[1]}.att.x_{letter}", []).append(Source(name, row=row))
            continue
        canonical = _TRANSLATORS[naming](name)
        transposed = naming == "hf-a" and "_lora.lora." in name and name.endswith(".weight")
        sources.setdefault(canonical, []).append(Source(name, transposed))
    return sources


def _from_fla(name: str) -> str:
    if name in _FLA_TOP:
        return _FLA_TOP[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(attn|ffn|pre_norm|attn_norm|ffn_norm)\.(.+)", name)
    if not match:
        return name
    layer, part, rest = match.groups()
    if part in _FLA_BLOCK:
        return f"blocks.{layer}.{_FLA_BLOCK[part]}.{rest}"
    if part == "ffn":
        return f"blocks.{layer}.ffn.{rest}"
    if lora := _LORA.fullmatch(rest):
        return f"blocks.{layer}.att.{lora[1]}{ {'0.weight': 1, '2.weight': 2, '2.bias': 0}[lora[2]] }"
    head, dot, tail = rest.partition(".")
    return f"blocks.{layer}.att.{_FLA_ATT.get(head, head)}{dot}{tail}"


def _from_rwkv7(name: str) -> str:
    if name == "head.weight":
        return name
    rest = name.removeprefix("rwkv7.").removeprefix("model.")
    if rest == name:
        return "unprefixed " + name  # `blocks.0...` itself has no place in this naming
    return "emb.weight" if rest == "embeddings.weight" else rest


def _from_rwkv4(name: str) -> str:
    if name == "head.weight":
        return name
    rest = name.removeprefix("rwkv.")
    if rest == name:
        return "unprefixed " + name
    if rest == "embeddings.weight":
        return "emb.weight"
    rest = rest.replace(".pre_ln.", ".ln0.").replace(".attention.", ".att.").replace(".feed_forward.", ".ffn.")
    return _MIXED.sub(lambda match: f"{match[1]}_{match[2][0]}", rest)


_TRANSLATORS: dict[str, Callable[[str], str]] = {
    "pth": lambda name: name,
    "hf-a": _from_fla,
    "hf-b": _from_rwkv7,
    "hf-4": _from_rwkv4,
}


def file_name(canonical: str, naming: str) -> str:
    """The name of a canonical tensor in a file of the naming."""
    if naming == "hf-b":
        if canonical == "head.weight":
            return canonical
        return "rwkv7." + canonical.replace("emb.weight", "embeddings.weight")
    if naming == "hf-4":
        if canonical == "head.weight":
            return canonical
        name = canonical.replace("emb.weight", "embeddings.weight").replace(".ln0.", ".pre_ln.")
        name = name.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
        words = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}
        return "rwkv." + re.sub(r"time_mix_([kvrg])$", lambda match: f"time_mix_{words[match[1]]}", name)
    if naming == "hf-a":
        for theirs, ours in _FLA_TOP.items():
            if canonical == ours:
                return theirs
        match = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(.+)", canonical)
        assert match is not None, canonical
        layer, part, rest = match.groups()
        for theirs, ours in _FLA_BLOCK.items():
            if part == ours:
                return f"model.layers.{layer}.{theirs}.{rest}"
        if part == "ffn":
            return f"model.layers.{layer}.ffn.{rest}"
        if lora := re.fullmatch(r"([wavg])([012])", rest):
            return f"model.layers.{layer}.attn.{lora[1]}_lora.lora.{('2.bias', '0.weight', '2.weight')[int(lora[2])]}"
        head, dot, tail = rest.partition(".")
        theirs = {ours: theirs for theirs, ours in _FLA_ATT.items()}.get(head, head)
        return f"model.layers.{layer}.attn.{theirs}{dot}{tail}"
    return canonical


def rename_weights(weights: dict[str, Any], naming: str) -> dict[str, Any]:
    """A dictionary with .pth names (tensors, or anything with .shape, .t() and .reshape()) as a file of the naming
    holds it: renamed, the LoRA matrices of hf-a transposed, its per-channel vectors flat."""
    if naming == "pth":
        return dict(weights)
    result = {}
    for name, tensor in weights.items():
        if naming == "hf-a" and re.search(r"\.att\.[wavg][12]$", name):
            tensor = tensor.t()
        elif naming == "hf-a" and len(tensor.shape) == 3 and tensor.shape[:2] == (1, 1) and ".att.x_" not in name:
            tensor = tensor.reshape(tensor.shape[2])
        result[file_name(name, naming)] = tensor
    return result
