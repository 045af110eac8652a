"""Random weights of any version and shape, and the writing of model files, for benchmarks and tests.

The distributions imitate trained models where it matters for a program's behaviour: decays spread from a few
tokens to thousands, gates away from saturation, residual branches small enough that logits stay of order one.
Every tensor has its own random stream, seeded by the model's seed and the tensor's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rwkvmpi.errors import UserError
from rwkvmpi.models.entries import replacing
from rwkvmpi.models.naming import NAMINGS, rename_weights
from rwkvmpi.models.pth import write_pth
from rwkvmpi.models.safetensors_file import write_safetensors
from rwkvmpi.models.schema import VERSIONS, ModelShape, all_tensors

__all__ = [
    "LazyTensor",
    "lazy_weights",
    "make_shape",
    "official_shape",
    "random_weights",
    "write_model",
    "write_pth",
    "write_safetensors",
]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written, so that a model larger than the memory can be."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def t(self) -> LazyTensor:
        return replace(self, shape=self.shape[::-1], make=lambda: self.make().t())

    def reshape(self, *shape: int) -> LazyTensor:
        return replace(self, shape=shape, make=lambda: self.make().reshape(shape))


# (layers, channels) by version and name; feed-forward width and ranks follow below
_SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "4": {"169M": (12, 768), "430M": (24, 1024), "1.5B": (24, 2048), "3B": (32, 2560), "7B": (32, 4096),
          "14B": (40, 5120)},
    "5.0": {"0.1B": (12, 768), "0.4B": (24, 1024)},
    "5.2": {"0.1B": (12, 768), "0.4B": (24, 1024), "1.5B": (24, 2048), "3B": (32, 2560), "7B": (32, 4096)},
    "6": {"1.6B": (24, 2048), "3B": (32, 2560), "7B": (32, 4096), "14B": (61, 4096)},
    "7": {"0.1B": (12, 768), "0.4B": (24, 1024), "1.5B": (24, 2048), "2.9B": (32, 2560), "7.2B": (32, 4096),
          "13.3B": (61, 4096)},
}  # fmt: skip
_RANKS_7 = {  # w and a, v, g
    "0.1B": (64, 32, 128), "0.4B": (64, 32, 128), "1.5B": (96, 64, 256), "2.9B": (96, 64, 320),
    "7.2B": (128, 96, 480), "13.3B": (192, 128, 384),
}  # fmt: skip


def official_shape(version: str, size: str) -> ModelShape:
    """The shape of a released model by its name, such as ("7", "0.1B") or ("4", "169M")."""
    sizes = _SIZES.get(version)
    if sizes is None:
        raise UserError(f"RWKV version {version!r} is not known; choose one of {', '.join(VERSIONS)}.")
    if size not in sizes:
        raise UserError(f"there is no released RWKV-{version} of size {size!r}; choose one of {', '.join(sizes)}.")
    layers, channels = sizes[size]
    ranks: dict[str, int] = {}
    if version == "7":
        decay, value, gate = _RANKS_7[size]
        ranks = {"w": decay, "a": decay, "v": value, "g": gate}
    elif version == "6":
        ranks = {"maa": 64, "decay": 128} if channels == 4096 else {"maa": 32, "decay": 64}
    width = 4 * channels if version in ("4", "5.0", "7") else channels * 7 // 2 // 32 * 32
    words = 50277 if version == "4" else 65536
    return make_shape(version, n_layer=layers, n_embd=channels, vocab_size=words, ffn_width=width, ranks=ranks)


def make_shape(
    version: str,
    *,
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    head_size: int = 64,
    ffn_width: int | None = None,
    ranks: Mapping[str, int] | None = None,
) -> ModelShape:
    """A model's shape with defaults for what is not said: F = 4C, RWKV-7's ranks as its 0.1B has them, 6's 32 and 64.
    Raises UserError for an impossible one."""
    if version not in VERSIONS:
        raise UserError(f"RWKV version {version!r} is not known; choose one of {', '.join(VERSIONS)}.")
    if min(n_layer, n_embd, vocab_size, head_size) < 1 or (ffn_width is not None and ffn_width < 1):
        raise UserError("the numbers of layers, channels, words and the other sizes of a model must be at least 1.")
    if version != "4" and n_embd % head_size:
        raise UserError(f"{n_embd} channels cannot be divided into heads of size {head_size}.")
    defaults = {"7": {"w": 64, "a": 64, "v": 32, "g": 128}, "6": {"maa": 32, "decay": 64}}.get(version, {})
    for name, rank in (ranks or {}).items():
        if name not in defaults or rank < 1:
            known = ", ".join(defaults) or "none"
            raise UserError(f"the rank {name}={rank} does not exist in RWKV-{version} (known: {known}) or is below 1.")
    chosen = {**defaults, **(ranks or {})}
    if version == "7" and n_layer == 1:
        del chosen["v"]
    return ModelShape(
        version=version,
        n_layer=n_layer,
        n_embd=n_embd,
        vocab_size=vocab_size,
        head_size=0 if version == "4" else head_size,
        n_head=0 if version == "4" else n_embd // head_size,
        ffn_width=ffn_width or 4 * n_embd,
        ranks=chosen,
    )


def random_weights(
    version: str,
    *,
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    head_size: int = 64,
    ffn_width: int | None = None,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    time_state: bool = False,
) -> dict[str, torch.Tensor]:
    """A dictionary with the names and shapes of an original .pth file (vectors [1, 1, C] where those have them, one
    decay per head in RWKV-5.0). `time_state`: RWKV-6 with the tuned initial state. Same arguments, same weights."""
    shape = make_shape(
        version,
        n_layer=n_layer,
        n_embd=n_embd,
        vocab_size=vocab_size,
        head_size=head_size,
        ffn_width=ffn_width,
        ranks=ranks,
    )
    if time_state:
        if version != "6":
            raise UserError(f"only RWKV-6 files have a time_state, not RWKV-{version}.")
        shape = replace(shape, has_time_state=True)
    return {name: tensor.make() for name, tensor in lazy_weights(shape, seed, dtype).items()}


def draw_tensor(shape: ModelShape, name: str, seed: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """The tensor of this canonical name in its canonical shape, drawn on `device`; other devices draw other numbers."""
    return _maker(shape, name, all_tensors(shape)[name], seed, dtype, device)()


def lazy_weights(shape: ModelShape, seed: int, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """As `random_weights`, but nothing is made yet."""
    result = {}
    for name, size in all_tensors(shape).items():
        file_name, size = _as_in_file(shape, name, size)
        result[file_name] = LazyTensor(size, dtype, _maker(shape, name, size, seed, dtype))
    return result


def _as_in_file(shape: ModelShape, name: str, size: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Canonical name and shape -> those of an original .pth file."""
    last = name.rsplit(".", 1)[-1]
    if shape.version == "5.0" and last in ("time_decay", "time_faaaa"):
        return name.replace("time_faaaa", "time_first"), size[:1]
    mixed = last.startswith(("x_", "time_mix_", "time_maa_")) or last in ("w0", "a0", "v0", "k_k", "k_a")
    if len(size) == 1 and (mixed or (shape.version == "6" and last == "time_decay")):
        return name, (1, 1, *size)
    return name, size


def _maker(
    shape: ModelShape, name: str, size: tuple[int, ...], seed: int, dtype: torch.dtype, device: str = "cpu"
) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))

        def normal(deviation: float, mean: float = 0.0) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device).mul_(deviation).add_(mean)

        def uniform(low: float, high: float) -> torch.Tensor:
            return torch.rand(size, generator=generator, device=device).mul_(high - low).add_(low)

        return _draw(shape, name, normal, uniform).to(dtype)

    return make


def _draw(
    shape: ModelShape, name: str, normal: Callable[..., torch.Tensor], uniform: Callable[..., torch.Tensor]
) -> torch.Tensor:
    c, depth = shape.n_embd, max(1, 2 * shape.n_layer) ** -0.5
    part, _, last = name.rpartition(".")
    if last in ("weight", "bias") and part.rsplit(".", 1)[-1].startswith("ln"):
        return normal(0.1, 1.0) if last == "weight" else normal(0.05)
    if name == "emb.weight":
        return normal(0.5)
    if name == "head.weight":
        return normal(1.0 * c**-0.5)
    if part.endswith(("att.output", "ffn.value")):  # the branches' ends: together they add about one to the stream
        width = shape.ffn_width if part.endswith("ffn.value") else c
        return normal(depth * width**-0.5)
    if last == "weight":
        return normal(c**-0.5)
    if last.startswith(("x_", "time_mix_")) or (last.startswith("time_maa_") and not last.endswith(("w1", "w2"))):
        return uniform(0.0, 1.0)
    match last:
        case "time_decay":  # exp(-exp(x)): memories from one token to hundreds
            return uniform(-6.0, 0.5)
        case "time_first" | "time_faaaa":
            return normal(0.3)
        case "time_state":
            return normal(0.3)
        case "w0":  # exp(-0.6065 sigmoid(x)): from 0.7 to 0.9985
            return uniform(-6.0, 0.5)
        case "a0" | "v0":
            return normal(0.5)
        case "k_k":
            return normal(0.1, 0.85)
        case "k_a":
            return normal(0.1, 1.0)
        case "r_k":
            return normal(0.1)
    rank = {"time_maa_w2": shape.ranks.get("maa", 1), "time_decay_w2": shape.ranks.get("decay", 1)}
    if last in rank or last in ("w2", "a2", "v2", "g2"):
        return normal(0.5 * rank.get(last, shape.ranks.get(last[0], 1)) ** -0.5)
    return normal(c**-0.5)  # the first of two low-rank matrices


def write_model(
    path: str | Path,
    weights: Mapping[str, Any],
    *,
    naming: str = "pth",
    shard_bytes: int | None = None,
    fused: bool = True,
) -> Path:
    """Writes .pth-named tensors (or `LazyTensor`s) as a .pth or .safetensors file, by the end of its name, in any
    naming, sharded if `shard_bytes` is given; Hugging Face namings get a config.json beside it. `fused`: hf-b with ln0
    applied to the embedding, as its converter does. Returns the path to open."""
    path = Path(path)
    if naming not in NAMINGS:
        raise UserError(f"the naming {naming!r} is not known; choose one of {', '.join(NAMINGS)}.")
    version_7 = "blocks.0.att.k_k" in weights
    if naming in ("hf-a", "hf-b") and not version_7:
        raise UserError(f"the naming {naming} exists for RWKV-7 only.")
    if naming == "hf-4" and version_7:
        raise UserError("the naming hf-4 exists for RWKV-4, 5 and 6 only.")
    if path.suffix != ".safetensors" and (path.suffix != ".pth" or shard_bytes is not None):
        raise UserError(f"{path}: the name must end in .safetensors, or in .pth if it is not sharded.")
    chosen = dict(weights)
    if naming == "hf-b" and fused:
        _fuse_ln0(chosen)
    renamed = rename_weights(chosen, naming)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made a folder ({error.strerror or error}).") from error
    if naming != "pth":
        config: dict[str, Any] = {"model_type": "rwkv" if naming == "hf-4" else "rwkv7"}
        if naming == "hf-b":
            config["embedding_layer_norm_fused"] = fused
        with replacing(path.parent / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")
    if path.suffix == ".safetensors":
        return write_safetensors(path, renamed, shard_bytes)
    made = {name: t.make() if isinstance(t, LazyTensor) else t for name, t in renamed.items()}
    return write_pth(path, {name: tensor.contiguous() for name, tensor in made.items()})


def _fuse_ln0(weights: dict[str, Any]) -> None:
    embedding, weight, bias = (weights.pop(name) for name in ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias"))

    def make() -> torch.Tensor:
        table, scale, shift = (t.make() if isinstance(t, LazyTensor) else t for t in (embedding, weight, bias))
        normed = torch.nn.functional.layer_norm(table.float(), table.shape[1:], scale.float(), shift.float())
        return normed.to(embedding.dtype)

    weights["emb.weight"] = LazyTensor(tuple(embedding.shape), embedding.dtype, make)
