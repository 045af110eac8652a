"""Which tensors a model of each RWKV version has, of which shapes; the version and the sizes read off a file.

No torch here: everything is decided on names and shapes, before a byte of a weight is read.

Canonical names and shapes are those of the original .pth files, with every per-channel vector flat ([C], not
[1, 1, C]). Letters: L layers, C channels, H heads, N head size, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rwkvmpi.errors import UserError
from rwkvmpi.models.entries import show

VERSIONS = ("4", "5.0", "5.2", "6", "7")
Shape = tuple[int, ...]

_BLOCK = re.compile(r"blocks\.(0|[1-9]\d{0,4})\.(.+)")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model. RWKV-4 has no heads: n_head and head_size are 0. `ranks`: of RWKV-7's low-rank matrices
    (w, a, v, g; v is missing in a model of one layer), of RWKV-6's (maa, decay), else empty."""

    version: str
    n_layer: int
    n_embd: int
    vocab_size: int
    head_size: int
    n_head: int
    ffn_width: int
    ranks: dict[str, int] = field(default_factory=dict, hash=False)
    has_time_state: bool = False


def layer_tensors(shape: ModelShape, layer: int) -> dict[str, Shape]:
    """The canonical tensors of one layer without their `blocks.i.` prefix, with their canonical shapes."""
    c, h, n, f, ranks = shape.n_embd, shape.n_head, shape.head_size, shape.ffn_width, shape.ranks
    result: dict[str, Shape] = {}
    for norm in ("ln0", "ln1", "ln2") if layer == 0 else ("ln1", "ln2"):
        result |= {f"{norm}.weight": (c,), f"{norm}.bias": (c,)}
    matrices = ["receptance", "key", "value", "output"]
    vectors: list[str] = []
    heads: list[str] = []
    if shape.version == "7":
        vectors = [*(f"x_{letter}" for letter in "rwkvag"), "w0", "a0", "k_k", "k_a"]
        heads = ["r_k"]
        for letter in "wavg":
            if letter == "v" and layer == 0:
                continue  # v_first is made by layer 0, so it has nothing to mix with
            result |= {f"att.{letter}1": (c, ranks[letter]), f"att.{letter}2": (ranks[letter], c)}
        if layer > 0:
            vectors.append("v0")
    elif shape.version == "6":
        vectors = [*(f"time_maa_{letter}" for letter in "xwkvrg"), "time_decay"]
        heads = ["time_faaaa"]
        matrices.append("gate")
        result |= {"att.time_maa_w1": (c, 5 * ranks["maa"]), "att.time_maa_w2": (5, ranks["maa"], c)}
        result |= {"att.time_decay_w1": (c, ranks["decay"]), "att.time_decay_w2": (ranks["decay"], c)}
        if shape.has_time_state:
            result["att.time_state"] = (h, n, n)
    elif shape.version == "5.2":
        vectors = [f"time_mix_{letter}" for letter in "kvrg"]
        heads = ["time_decay", "time_faaaa"]
        matrices.append("gate")
    elif shape.version == "5.0":
        vectors = [f"time_mix_{letter}" for letter in "kvr"]
        heads = ["time_decay", "time_faaaa"]
    else:
        vectors = [*(f"time_mix_{letter}" for letter in "kvr"), "time_decay", "time_first"]
    result |= {f"att.{name}": (c,) for name in vectors}
    result |= {f"att.{name}": (h, n) for name in heads}
    result |= {f"att.{name}.weight": (c, c) for name in matrices}
    if shape.version != "4":
        result |= {"att.ln_x.weight": (c,), "att.ln_x.bias": (c,)}
    mixes = {"7": ["x_k"], "6": ["time_maa_k", "time_maa_r"]}.get(shape.version, ["time_mix_k", "time_mix_r"])
    result |= {f"ffn.{name}": (c,) for name in mixes}
    result |= {"ffn.key.weight": (f, c), "ffn.value.weight": (c, f)}
    if shape.version != "7":
        result["ffn.receptance.weight"] = (c, c)
    return result


def all_tensors(shape: ModelShape) -> dict[str, Shape]:
    """Every canonical tensor of the model with its canonical shape, in the order of the layers."""
    c, v = shape.n_embd, shape.vocab_size
    result: dict[str, Shape] = {"emb.weight": (v, c)}
    for layer in range(shape.n_layer):
        result |= {f"blocks.{layer}.{name}": size for name, size in layer_tensors(shape, layer).items()}
    return result | {"ln_out.weight": (c,), "ln_out.bias": (c,), "head.weight": (v, c)}


def refuse_other_architectures(path: object, names: Iterable[str]) -> None:
    """Raises UserError, by name, for relatives of RWKV that this program would compute wrongly."""
    for name in names:
        rest = match[2] if (match := _BLOCK.fullmatch(name)) else name
        if "rosa" in name.lower():
            raise UserError(f"{path}: an RWKV-8 (ROSA) model (it has the tensor {name!r}), which is not supported.")
        if rest.startswith("qkv."):
            raise UserError(
                f"{path}: an RWKV-7b model (it has the tensor {name!r}), which is not supported; use RWKV-7."
            )
        if rest.startswith(("ffn.s_emb", "ffn.s0", "ffn.s1", "ffn.s2")):
            raise UserError(
                f"{path}: an RWKV-7a model with DeepEmbed (it has the tensor {name!r}), which is not supported; use "
                f"RWKV-7."
            )
        if re.search(r"_(mx|my|rx|ry)$|\.(qweight|qzeros|scales|g_idx|SCB|absmax|weight_scale)$|quant_", name):
            raise UserError(
                f"{path}: quantised by another program (it has the tensor {name!r}); use the original weights."
            )


def detect_version(path: object, shapes: Mapping[str, Shape]) -> str:
    """The RWKV version by the canonical names of a file. Raises UserError when it is none that is supported."""
    if "blocks.0.att.k_k" in shapes:
        return "7"
    if "blocks.0.att.time_maa_x" in shapes:
        return "6"
    decay = shapes.get("blocks.0.att.time_decay", ())
    if "blocks.0.att.gate.weight" in shapes:
        if len(decay) == 2 and decay[1] > 1:
            return "5.2"
        raise UserError(
            f"{path}: an RWKV-5.1 model (a gate, but one decay per head: time_decay has the shape {show(decay)}), "
            f"which is not supported; use RWKV-5.2 or later."
        )
    if "blocks.0.att.ln_x.weight" in shapes:
        return "5.0"
    if "blocks.0.att.time_decay" in shapes:
        return "4"
    raise UserError(
        f"{path}: not an RWKV-4, 5, 6 or 7 model: layer 0 has no time mix that is known (no 'time_decay', no 'k_k')."
    )


def _sized(path: object, shapes: Mapping[str, Shape], name: str, dimensions: int) -> Shape:
    if name not in shapes:
        raise UserError(f"{path}: the tensor {name!r} is missing.")
    shape = shapes[name]
    if len(shape) != dimensions or 0 in shape:
        raise UserError(f"{path}: the tensor {name!r} has the shape {show(shape)}, expected {dimensions} dimensions.")
    return shape


def model_shape(path: object, shapes: Mapping[str, Shape]) -> ModelShape:
    """Reads version and sizes off the shapes of a file's tensors (canonical names)."""
    refuse_other_architectures(path, shapes)
    layers = {int(match[1]) for name in shapes if (match := _BLOCK.fullmatch(name))}
    if not layers:
        raise UserError(f"{path}: no layers in it (no tensor 'blocks.0...'), so it is not an RWKV model.")
    if len(layers) != max(layers) + 1:
        gap = min(set(range(len(layers) + 1)) - layers)
        raise UserError(f"{path}: the tensors of layer {gap} are missing although there is a layer {max(layers)}.")
    version = detect_version(path, shapes)
    vocab, channels = _sized(path, shapes, "emb.weight", 2)
    att = "blocks.0.att."
    heads = size = 0
    ranks: dict[str, int] = {}
    if version == "7":
        heads, size = _sized(path, shapes, att + "r_k", 2)
        for letter in "wag" if len(layers) == 1 else "wavg":
            block = "blocks.1.att." if letter == "v" else att
            ranks[letter] = _sized(path, shapes, f"{block}{letter}1", 2)[1]
    elif version in ("5.2", "6"):
        heads, size = _sized(path, shapes, att + "time_faaaa", 2)
        if version == "6":
            ranks["maa"] = _sized(path, shapes, att + "time_maa_w2", 3)[1]
            ranks["decay"] = _sized(path, shapes, att + "time_decay_w1", 2)[1]
    elif version == "5.0":
        heads = [*shapes.get(att + "time_decay", ()), 0][0]
        size = channels // heads if heads and channels % heads == 0 else 0
    if heads * size != channels and version != "4":
        raise UserError(
            f"{path}: {heads} heads of size {size} (layer 0) do not make the {channels} channels of 'emb.weight'."
        )
    return ModelShape(
        version=version,
        n_layer=len(layers),
        n_embd=channels,
        vocab_size=vocab,
        head_size=size,
        n_head=heads,
        ffn_width=_sized(path, shapes, "blocks.0.ffn.key.weight", 2)[0],
        ranks=ranks,
        has_time_state=version == "6" and att + "time_state" in shapes,
    )


def is_ignored(version: str, name: str) -> bool:
    """Tensors that the public files carry without using them: the value mix of RWKV-7's layer 0."""
    return version == "7" and name in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")


def fits(found: Shape, expected: Shape) -> bool:
    """Whether a tensor of a file has the expected canonical shape, sizes of one around a vector not counted."""
    if found == expected:
        return True
    return len(expected) == 1 and tuple(size for size in found if size != 1) == expected


def check_tensors(path: object, found: Mapping[str, Shape], expected: Mapping[str, Shape], version: str) -> None:
    """Raises UserError for the first missing, unknown or wrongly shaped tensor (canonical names)."""
    missing = [name for name in expected if name not in found]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{path}: the tensor {missing[0]!r} of an RWKV-{version} model is missing{others}; use a complete model."
        )
    extra = [name for name in found if name not in expected and not is_ignored(version, name)]
    if extra:
        others = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise UserError(
            f"{path}: the tensor {extra[0]!r} does not belong to an RWKV-{version} model{others}; the file is of "
            f"another architecture or has additions that would be ignored."
        )
    for name, shape in expected.items():
        if not fits(found[name], shape):
            raise UserError(f"{path}: the tensor {name!r} has the shape {show(found[name])}, expected {show(shape)}.")
