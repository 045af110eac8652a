"""The .pth format of torch.save: a zip archive with a pickle (names, shapes, where the bytes lie) and raw bytes.

The pickle is never executed, not even by torch's restricted loader: `describe_pickle` walks over the few
instructions that a dictionary of tensors needs and notes what they describe. Everything else is refused by name.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rwkvmpi.errors import UserError
from rwkvmpi.models.entries import ITEMSIZE, TensorEntry, replacing, show
from rwkvmpi.models.pickle_reader import PickleRefused, TensorRef, describe_pickle
from rwkvmpi.models.zip_directory import Member, read_zip_directory

if TYPE_CHECKING:
    import torch

MAX_PICKLE_BYTES = 16 << 20  # a real one has about 150 bytes per tensor
RESCALED_KEYS = ("_strategy", "_rescale_layer", "_version")


def read_pth(path: Path) -> list[TensorEntry]:
    """The tensors of a .pth file, in its dictionary's order. Raises UserError for anything but a zip archive of
    torch.save holding one flat dictionary of dense, contiguous tensors that share no bytes."""
    try:
        with open(path, "rb") as file:
            members = read_zip_directory(path, file)
            folder, program = _pickle_member(path, members)
            file.seek(program.offset)
            code = file.read(program.size)
            order = members.get(folder + "byteorder")
            if order is not None:
                file.seek(order.offset)
                if order.size != 6 or file.read(6) != b"little":
                    raise UserError(f"{path}: its numbers are not little-endian; save it again on a usual machine.")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if zlib.crc32(code) != program.crc:
        raise UserError(f"{path}: the member {program.name!r} does not match its checksum; copy or download it again.")
    try:
        value = describe_pickle(code)
    except PickleRefused as error:
        raise UserError(f"{path}: {error}.") from error
    entries = [_entry(path, key, item, members, folder) for key, item in _flat(path, value)]
    _check_shared(path, entries)
    return entries


def _pickle_member(path: Path, members: Mapping[str, Member]) -> tuple[str, Member]:
    found = [member for name, member in members.items() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise UserError(f"{path}: a zip archive, but not one of torch.save (no data.pkl in it).")
    if found[0].size > MAX_PICKLE_BYTES:
        raise UserError(f"{path}: its data.pkl has {found[0].size} bytes, more than any model needs.")
    return found[0].name.removesuffix("data.pkl"), found[0]


def _flat(path: Path, value: object) -> list[tuple[str, TensorRef]]:
    """The (name, tensor) pairs of the top-level dictionary, or a refusal that says what is there instead."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds something of type {_kind(value)} instead of a dictionary of tensors.")
    for key in RESCALED_KEYS:
        if key in value:
            raise UserError(
                f"{path}: converted for the `rwkv` package (it has the key {key!r}), its weights are rescaled or "
                f"transposed; use the original .pth file."
            )
    pairs = []
    for key, item in value.items():
        if isinstance(item, dict) and any(isinstance(inner, TensorRef) for inner in item.values()):
            raise UserError(
                f"{path}: the tensors are nested under the key {key!r}; save that dictionary alone: "
                f"torch.save(torch.load(F, weights_only=True)[{key!r}], NEW)."
            )
        if not isinstance(item, TensorRef):
            raise UserError(
                f"{path}: the entry {key!r} is of type {_kind(item)}, not a tensor; save the model's tensors alone."
            )
        pairs.append((key, item))
    return pairs


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, TensorRef) else type(value).__name__


def _entry(path: Path, name: str, ref: TensorRef, members: Mapping[str, Member], folder: str) -> TensorEntry:
    member = members.get(f"{folder}data/{ref.key}")
    if member is None:
        raise UserError(f"{path}: the bytes of tensor {name!r} are missing; copy or download the file again.")
    itemsize = ITEMSIZE[ref.dtype]
    if ref.storage_items * itemsize != member.size:
        raise UserError(
            f"{path}: tensor {name!r} needs a storage of {ref.storage_items * itemsize} bytes, but the archive has "
            f"{member.size}; the file is damaged."
        )
    entry = TensorEntry(name, path, ref.dtype, ref.shape, member.offset + ref.first_item * itemsize)
    if entry.numel and not _contiguous(ref.shape, ref.stride):
        raise UserError(
            f"{path}: tensor {name!r} is a strided view (shape {show(ref.shape)}, strides {show(ref.stride)}); save "
            f"the model again with every tensor made contiguous."
        )
    if ref.first_item + entry.numel > ref.storage_items:
        raise UserError(f"{path}: tensor {name!r} of shape {show(ref.shape)} reaches beyond its {member.size} bytes.")
    return entry


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _check_shared(path: Path, entries: list[TensorEntry]) -> None:
    """Two names for the same bytes: no RWKV model ties weights, and a small file could claim to be a huge one."""
    end, before = 0, ""
    for entry in sorted((e for e in entries if e.numel), key=lambda e: e.offset):
        if entry.offset < end:
            raise UserError(
                f"{path}: the tensors {before!r} and {entry.name!r} share the same bytes; save the model again with "
                f"every tensor cloned."
            )
        end, before = entry.offset + entry.nbytes, entry.name


def write_pth(path: str | Path, weights: Mapping[str, torch.Tensor]) -> Path:
    """torch.save of the dictionary, under a temporary name first. All tensors must fit in memory."""
    import torch

    path = Path(path)
    with replacing(path) as temporary:
        try:
            torch.save(dict(weights), temporary)
        except RuntimeError as error:  # what its C++ writer makes of a full disk
            raise UserError(f"{path}: cannot be written ({str(error).splitlines()[0]}).") from error
    return path
