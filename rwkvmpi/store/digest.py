"""A SHA-256 over what a results file says, whatever the file's layout: it tells whether two results are the same.

It covers format, task, model and tokenizer, and of every dataset its name, dtype, shape and values. Not the job's
settings, the creator or the provenance, which differ between runs that must give the same results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkvmpi.errors import UserError
from rwkvmpi.store.files import dump_json

ATTRIBUTES = ("format", "format_version", "task", "model_sha256", "tokenizer")
STRING = "utf-8"
_BLOCK_BYTES = 4 << 20
_STRINGS_PER_BLOCK = 16384


class DatasetDigest:
    """The running hash of one dataset, whose values are given in order."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self._dtype, self._shape = dtype, shape
        self._hash = hashlib.sha256()

    def update(self, values: np.ndarray) -> None:
        """The next rows: numbers in little-endian order."""
        data = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        if data.size:
            self._hash.update(data.reshape(-1).view(np.uint8).data)

    def update_strings(self, values: Iterable[str]) -> None:
        """The next rows: text, each with its length before it."""
        for value in values:
            data = value.encode("utf-8", "surrogatepass")
            self._hash.update(len(data).to_bytes(8, "little") + data)

    def summary(self) -> list[Any]:
        """[dtype, shape, hex SHA-256 of the values]."""
        return [self._dtype, list(self._shape), self._hash.hexdigest()]


def dtype_word(dtype: np.dtype) -> str:
    """The dtype as the digest names it: "utf-8", or numpy's little-endian word ("<f4"); an enum is its integers."""
    return STRING if dtype.kind == "O" else dtype.newbyteorder("<").str


def combine(attributes: Mapping[str, Any], datasets: Mapping[str, DatasetDigest]) -> str:
    """The digest of a file with these attributes and datasets (path -> running hash)."""
    value = {
        "attributes": {name: attributes[name] for name in ATTRIBUTES},
        "datasets": {path: dataset.summary() for path, dataset in datasets.items()},
    }
    return hashlib.sha256(dump_json(value)).hexdigest()


def plain_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of ATTRIBUTES as plain Python values; KeyError when one is missing."""
    return {name: value.item() if isinstance(value := attributes[name], np.generic) else value for name in ATTRIBUTES}


def content_digest(path: str | Path) -> str:
    """The digest of a results file (hex), in constant memory. UserError when it cannot be read."""
    import h5py

    digests: dict[str, DatasetDigest] = {}
    try:
        with h5py.File(path, "r") as file:
            attributes = plain_attributes(file.attrs)
            for dataset in _datasets(file):
                digests[dataset.name] = _digest_of(dataset)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a results file ({error}); restore it from a copy") from error
    return combine(attributes, digests)


def _datasets(file: Any) -> list[Any]:
    import h5py

    found: list[Any] = []
    for name, group in file.items():
        if name != "provenance":
            group.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
    return found


def _digest_of(dataset: Any) -> DatasetDigest:
    digest = DatasetDigest(dtype_word(dataset.dtype), dataset.shape)
    rows = dataset.shape[0]
    if dataset.dtype.kind == "O":
        for start in range(0, rows, _STRINGS_PER_BLOCK):
            digest.update_strings(dataset.asstr()[start : start + _STRINGS_PER_BLOCK])
        return digest
    row_bytes = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:], dtype=np.int64))
    step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, rows, step):
        digest.update(dataset[start : start + step])
    return digest
