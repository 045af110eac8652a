"""Opens a file of RWKV weights of any supported format and naming, checks it, and hands out its tensors.

Everything that can be known from headers is checked when the file is opened, before a weight or a token is
read; the values are checked by `check_finite` as each rank loads its own tensors.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rwkvmpi.errors import UserError
from rwkvmpi.models import hf_config, schema
from rwkvmpi.models.entries import FLOATING, ModelFile, TensorEntry, show
from rwkvmpi.models.naming import Source, canonical_sources, detect_naming
from rwkvmpi.models.pth import read_pth
from rwkvmpi.models.safetensors_file import INDEX_SUFFIX, read_safetensors, read_sharded
from rwkvmpi.models.schema import ModelShape, Shape

if TYPE_CHECKING:
    import torch

_HASH_BLOCK = 4 << 20
_FINITE_BLOCK = 1 << 18  # values checked at a time
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_STRANGERS = (  # first bytes of files that people take for weights
    (b"GGUF", "a GGUF file, which is not supported; use the .pth or .safetensors file it was made from"),
    (b"fmgg", "an rwkv.cpp file, which is not supported; use the .pth file it was made from"),
    (b"lmgg", "an rwkv.cpp file, which is not supported; use the .pth file it was made from"),
    (b"version https://git-lfs", "a pointer of git-lfs instead of the weights; run `git lfs pull` there"),
    (b"<", "a web page instead of the weights; download the file itself"),
    (_LEGACY_MAGIC, "in the format of torch before 1.6, which cannot be mapped; save it again: "
                    "torch.save(torch.load(F, weights_only=True, map_location='cpu'), NEW)"),
    (b"\x80", "a bare pickle, which is never loaded; save the weights with torch.save or safetensors"),
)  # fmt: skip


def bundled_path() -> Path:
    """The model that comes with the program (what the word `bundled` means as MODEL)."""
    folder = Path(__file__).resolve().parent.parent / "data"
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(
            f"{folder}: expected the bundled model, one .safetensors file, but found {len(found)}; reinstall."
        )
    return found[0]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens and checks a model: a .pth file, a .safetensors file, a *.safetensors.index.json, or a folder that holds
    one of them; or the word "bundled". Raises UserError with one sentence (file, tensor, found and expected) for
    everything that is not a complete RWKV-4, 5.0, 5.2, 6 or 7 model of dense float32, bfloat16 or float16 tensors."""
    path = _find(bundled_path() if str(path) == "bundled" else Path(path))
    if path.name.endswith(".json"):
        entries, files = read_sharded(path)
    else:
        entries, files = (read_pth(path) if _sniff(path) == "zip" else read_safetensors(path)), [path]
    return Checkpoint(path, files, entries)


def _find(path: Path) -> Path:
    if not os.path.exists(path):  # False also for a name that no file can have
        raise UserError(f"{path}: there is no such model file or folder.")
    if not path.is_dir():
        if path.name.endswith(".json") and not path.name.endswith(INDEX_SUFFIX):
            raise UserError(f"{path}: a JSON file that is not an index of shards (*{INDEX_SUFFIX}); name the weights.")
        return path
    for pattern in ("*" + INDEX_SUFFIX, "*.safetensors", "*.pth"):
        found = sorted(file for file in path.glob(pattern) if file.is_file())
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:5])
            raise UserError(f"{path}: holds {len(found)} model files ({names}); name the one to use.")
        if found:
            return found[0]
    raise UserError(f"{path}: no .safetensors or .pth file lies in this folder.")


def _sniff(path: Path) -> str:
    """'zip' or 'safetensors' by the first bytes; the file's name says nothing reliable."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if not head:
        raise UserError(f"{path}: the file is empty; copy or download it again.")
    if head.startswith(b"PK"):
        return "zip"
    if len(head) > 8 and head[8:9] == b"{":
        return "safetensors"
    for magic, what in _STRANGERS:
        if head.startswith(magic):
            raise UserError(f"{path}: {what}.")
    if path.name.endswith(".safetensors"):
        return "safetensors"  # its reader says what is wrong with the header
    raise UserError(f"{path}: neither a .pth (zip) nor a safetensors file, or damaged at its beginning.")


class Checkpoint:
    """An opened, checked model file. Tensors have canonical (.pth) names and canonical shapes: per-channel vectors are
    [C]; r_k, time_faaaa and RWKV-5's time_decay [H, N]; RWKV-7's low-rank matrices w1 [C, r], w2 [r, C]; RWKV-6's
    time_state [H, N(value), N(key)], as the state is kept everywhere.

    RWKV-5.0 files hold one decay and one time_first per head; they are handed out as time_decay and time_faaaa
    [H, N], values as in the file (so 5.0's bonus is exp(time_faaaa), that of 5.2 is time_faaaa itself)."""

    def __init__(self, path: Path, files: list[Path], entries: list[TensorEntry]) -> None:
        self.path = path
        self.files = files
        by_name = {entry.name: entry for entry in entries}
        naming = detect_naming(by_name)
        if naming is None:
            like = f"its tensors are called like {next(iter(by_name))!r}" if by_name else "there is no tensor in it"
            raise UserError(f"{path}: not an RWKV model: {like}.")
        self.naming = naming
        self._files = {file: ModelFile(file) for file in {entry.file for entry in entries}}
        self._sources = self._choose_sources(canonical_sources(by_name, naming), by_name)
        shapes = {name: self._shape_of(name) for name in self._sources}
        self.shape: ModelShape = schema.model_shape(path, shapes)
        self._expected = schema.all_tensors(self.shape)
        self.ln0_fused = self._read_config(shapes)
        if self.version == "5.0":
            self._spread_heads(shapes)
        schema.check_tensors(path, shapes, self._expected, self.version)
        self._sources = {name: self._sources[name] for name in self._expected}
        self._check_dtypes()

    @property
    def version(self) -> str:
        """ "4", "5.0", "5.2", "6" or "7"."""
        return self.shape.version

    @property
    def dtype_name(self) -> str:
        """The dtype of the matrices, without torch: "float32", "bfloat16" or "float16"."""
        return self._sources["blocks.0.att.key.weight"][0].dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    def names(self) -> list[str]:
        """The canonical names of all tensors, in the order of the layers."""
        return list(self._expected)

    def tensor_shape(self, name: str) -> Shape:
        """The canonical shape of a tensor, without reading it."""
        return self._expected[name]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in its file's dtype: pages of the file, loaded as they are looked at, or a copy where it is small
        or its layout differs from the canonical one. Raises KeyError for a name not in names()."""
        entry, source = self._sources[name]
        tensor = self._files[entry.file].read(entry)
        if source.row is not None:
            tensor = tensor[source.row].clone()
        if source.transposed:
            tensor = tensor.t().contiguous()
        shape = self._expected[name]
        if self.version == "5.0" and name.endswith(("att.time_decay", "att.time_faaaa")):
            tensor = tensor.reshape(shape[0], 1).expand(shape).contiguous()
        return tensor.reshape(shape)

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """All tensors of layer `index`, without the prefix `blocks.i.` (layer 0 has ln0 too, unless it is fused)."""
        prefix = f"blocks.{index}."
        return {name.removeprefix(prefix): self.tensor(name) for name in self._expected if name.startswith(prefix)}

    def let_go(self, names: Iterable[str]) -> None:
        """Takes the pages of these tensors' part of the file, read by now, out of this process's memory.

        For whoever has made something else of them, layer by layer and before `close`:
        `checkpoint.let_go(f"blocks.{i}.{name}" for name in tensors)` after layer i is packed, and
        `checkpoint.let_go(["head.weight"])`. Without it a process holds its weights twice until the system wants the
        memory back. A tensor that is still in use stays valid, and its pages come back as they are looked at: after
        `check_finite` an embedding table can be let go of too."""
        for name in names:
            entry, _ = self._sources[name]
            self._files[entry.file].let_go(entry)

    def parameters(self) -> int:
        """The number of weights that the model uses, as its file holds them."""
        return sum(entry.numel if source.row is None else entry.numel // 6 for entry, source in self._sources.values())

    def sha256(self) -> str:
        """Hex digest over the bytes of `files`, one after the other in the order of their names."""
        digest = hashlib.sha256()
        try:
            for path in sorted(self.files):
                with open(path, "rb") as file:
                    while block := file.read(_HASH_BLOCK):
                        digest.update(block)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
        return digest.hexdigest()

    def close(self) -> None:
        """Closes the files; tensors that were handed out stay valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- checks when opening --

    def _choose_sources(
        self, sources: dict[str, list[Source]], by_name: dict[str, TensorEntry]
    ) -> dict[str, tuple[TensorEntry, Source]]:
        chosen = {}
        for name, claims in sources.items():
            if len(claims) > 1:
                first, second = claims[0].name, claims[1].name
                raise UserError(f"{self.path}: the tensors {first!r} and {second!r} stand for the same one; keep one.")
            entry, source = by_name[claims[0].name], claims[0]
            if source.transposed and len(entry.shape) != 2:
                raise self._misshapen(entry.name, entry.shape, "a matrix")
            if source.row is not None and (not entry.shape or entry.shape[0] != 6):
                raise self._misshapen(entry.name, entry.shape, "6 rows")
            chosen[name] = (entry, source)
        return chosen

    def _misshapen(self, name: str, found: Shape, expected: str) -> UserError:
        return UserError(f"{self.path}: the tensor {name!r} has the shape {show(found)}, expected {expected}.")

    def _shape_of(self, name: str) -> Shape:
        entry, source = self._sources[name]
        if source.row is not None:
            return entry.shape[1:]
        return entry.shape[::-1] if source.transposed else entry.shape

    def _read_config(self, shapes: dict[str, Shape]) -> bool:
        """Looks at config.json, where the naming has one; returns whether ln0 is fused and then expects no ln0."""
        if self.naming == "pth":
            return False
        path = self.path.parent / "config.json"
        config = hf_config.read_config(path)
        hf_config.check_epsilons(path, config, self.naming, self.shape)
        if self.naming != "hf-b":
            return False
        fused = hf_config.is_ln0_fused(path, config, "blocks.0.ln0.weight" in shapes)
        if config:
            self.files = sorted([*self.files, path])  # it changes the results, so it belongs to the model's identity
        if fused:
            for name in ("blocks.0.ln0.weight", "blocks.0.ln0.bias"):
                del self._expected[name]
                shapes.pop(name, None)  # some converters leave a neutral one behind
        return fused

    def _spread_heads(self, shapes: dict[str, Shape]) -> None:
        """RWKV-5.0: one value per head in the file, names and shapes of 5.2 outside."""
        heads, size = self.shape.n_head, self.shape.head_size
        for layer in range(self.shape.n_layer):
            for name, canonical in (("time_decay", "time_decay"), ("time_first", "time_faaaa")):
                name, canonical = f"blocks.{layer}.att.{name}", f"blocks.{layer}.att.{canonical}"
                if name != canonical and canonical in shapes:
                    raise UserError(
                        f"{self.path}: the tensor {canonical!r} does not belong to an RWKV-5.0 model (no gate), whose "
                        f"bonus is time_first; the file is of another architecture."
                    )
                if name not in shapes:
                    raise UserError(f"{self.path}: the tensor {name!r} of an RWKV-5.0 model is missing.")
                found = shapes.pop(name)
                if found not in ((heads,), (heads, 1), (heads, 1, 1)):
                    raise self._misshapen(name, found, show((heads,)))
                shapes[canonical] = (heads, size)
                self._sources[canonical] = self._sources.pop(name)

    def _check_dtypes(self) -> None:
        for entry, _ in self._sources.values():
            if entry.dtype not in FLOATING:
                raise UserError(
                    f"{entry.file}: the tensor {entry.name!r} has the dtype {entry.dtype}, expected one of "
                    f"{', '.join(FLOATING)} (quantised and double weights are not supported); convert the original."
                )


def check_finite(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> None:
    """Raises UserError that names the first of the tensors (default: all) with a NaN or an infinity in it. Reads every
    one of them; memory is constant."""
    for name in checkpoint.names() if names is None else names:
        flat = checkpoint.tensor(name).reshape(-1)
        for start in range(0, flat.numel(), _FINITE_BLOCK):
            block = flat[start : start + _FINITE_BLOCK]
            # The extremes of a block show a NaN or an infinity in it, ten times faster than asking every value.
            low, high = block.aminmax()
            if not (math.isfinite(low) and math.isfinite(high)):
                position = start + int((~block.isfinite()).nonzero()[0])
                raise UserError(
                    f"{checkpoint.path}: the tensor {name!r} has the value {float(flat[position])} at position "
                    f"{position} of {flat.numel()}; the file is damaged or the training diverged."
                )
