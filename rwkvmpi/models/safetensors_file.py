"""The safetensors format: headers read and checked, single files and shards written.

A file is: header length (8 bytes, little endian), a JSON object {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkvmpi.errors import UserError
from rwkvmpi.models.entries import ITEMSIZE, TensorEntry, replacing, show

if TYPE_CHECKING:
    import torch

    from rwkvmpi.models.random_weights import LazyTensor

MAX_JSON_BYTES = 16 << 20  # a real header has about 120 bytes per tensor and at most a few thousand tensors
INDEX_SUFFIX = ".safetensors.index.json"
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_NAMES = {ours: theirs for theirs, ours in _DTYPES.items()}


def read_safetensors(path: Path) -> list[TensorEntry]:
    """The tensors of one file, in its header's order. Raises UserError for anything but a sound file: a header that
    is too long or not JSON, unknown dtypes, ranges that overlap, leave holes or do not end where the file ends."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
                raise UserError(
                    f"{path}: not a safetensors file or cut off: its header claims {length} bytes and the file has "
                    f"{size}; copy or download it again."
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    header = parse_json(text, f"{path}: the safetensors header")
    header.pop("__metadata__", None)
    data_start = 8 + length
    entries = [_entry(path, name, fields, data_start) for name, fields in header.items()]
    _check_ranges(path, entries, data_start, size)
    return entries


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys; `what` begins the UserError's sentence."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{what} is not valid JSON ({reason}); the file is damaged, download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{what} is not a JSON object; the file is damaged, download it again.")
    return value


def _entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{path}: tensor {name!r} lacks dtype, shape or data_offsets; the header is damaged.")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UserError(f"{path}: tensor {name!r} has the dtype {str(dtype)[:20]!r}, which is not known here.")
    if not _naturals(shape) or len(shape) > 8:
        raise UserError(f"{path}: tensor {name!r} has a shape that is no list of sizes; the header is damaged.")
    if not _naturals(offsets) or len(offsets) != 2:
        raise UserError(f"{path}: tensor {name!r} has data_offsets that are not two positions; the header is damaged.")
    entry = TensorEntry(name, path, _DTYPES[dtype], tuple(shape), data_start + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise UserError(
            f"{path}: tensor {name!r} of shape {show(entry.shape)} and dtype {dtype} needs {entry.nbytes} bytes, but "
            f"the header gives it {offsets[1] - offsets[0]}; the header is damaged."
        )
    return entry


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _check_ranges(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    position, before = data_start, "the header"
    for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != position:
            how = "overlaps" if entry.offset < position else "leaves a hole after"
            raise UserError(f"{path}: tensor {entry.name!r} {how} {before}; the header is damaged.")
        position, before = entry.offset + entry.nbytes, repr(entry.name)
    if position != size:
        raise UserError(
            f"{path}: the header describes {position} bytes but the file has {size}: "
            f"{'it was cut off' if position > size else 'something was appended'}; copy or download it again."
        )


def read_sharded(index: Path) -> tuple[list[TensorEntry], list[Path]]:
    """The tensors of all shards that a `*.safetensors.index.json` lists, and the files (index and shards). Every
    tensor must be in exactly the shard that the index names, and the shards lie beside the index."""
    try:
        if index.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{index}: too large for an index ({index.stat().st_size} bytes).")
        text = index.read_bytes()
    except OSError as error:
        raise UserError(f"{index}: cannot be read ({error.strerror or error}).") from error
    weight_map = parse_json(text, f"{index}: the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: there is no weight_map in it, so it is not an index of safetensors shards.")
    shards: dict[str, Path] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise UserError(
                f"{index}: tensor {name!r} lies in {str(shard)[:100]!r}, but a shard must be a .safetensors file in "
                f"the index's own folder."
            )
        shards[shard] = index.parent / shard
    for shard, path in sorted(shards.items()):
        if not os.path.isfile(path):  # False also for a name that no file can have
            raise UserError(f"{index}: the shard {shard!r} is missing from {index.parent}; download it too.")
    entries: list[TensorEntry] = []
    for shard, path in sorted(shards.items()):
        for entry in read_safetensors(path):
            if weight_map.pop(entry.name, None) != shard:
                raise UserError(
                    f"{path}: holds the tensor {entry.name!r}, which the index {index.name} does not place there; "
                    f"download index and shards of one model."
                )
            entries.append(entry)
    if weight_map:
        name, shard = next(iter(weight_map.items()))
        raise UserError(f"{index}: the tensor {name!r} should be in the shard {shard!r} but is not there.")
    return entries, sorted([index, *shards.values()])


def write_safetensors(
    path: str | Path, weights: Mapping[str, torch.Tensor | LazyTensor], shard_bytes: int | None = None
) -> Path:
    """Writes tensors one at a time (a `LazyTensor` is made when its turn comes). With `shard_bytes`, writes shards of
    at most so many bytes (a larger tensor has one for itself) and an index beside `path`. Returns what to open."""
    path = Path(path)
    if shard_bytes is None:
        _write_one(path, weights)
        return path
    groups: list[dict[str, Any]] = [{}]
    room = shard_bytes
    for name, tensor in weights.items():
        if _nbytes(tensor) > room and groups[-1]:
            groups.append({})
            room = shard_bytes
        groups[-1][name] = tensor
        room -= _nbytes(tensor)
    stem = path.name.removesuffix(".safetensors")
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        shard = path.with_name(f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors")
        _write_one(shard, group)
        weight_map |= dict.fromkeys(group, shard.name)
    index = path.with_name(stem + INDEX_SUFFIX)
    total = sum(_nbytes(tensor) for tensor in weights.values())
    with replacing(index) as temporary:
        temporary.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
    return index


def _nbytes(tensor: Any) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _write_one(path: Path, weights: Mapping[str, torch.Tensor | LazyTensor]) -> None:
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in weights.items():
        end = position + _nbytes(tensor)
        dtype = _NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that every tensor of even size starts well aligned
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in weights.values():
            made = tensor if isinstance(tensor, torch.Tensor) else tensor.make()
            file.write(made.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


assert set(_NAMES) == set(ITEMSIZE)
