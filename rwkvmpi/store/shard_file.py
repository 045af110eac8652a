"""One shard: an immutable HDF5 file with pieces of results, or with the states of documents in flight.

kind "results"  /documents/  document bytes tokens (int64) ok (uint8) error_end (int64) error_text (uint8, UTF-8)
                /pieces/     document first_token count (int64): the runs of tokens that lie in /tokens, in this order
                /tokens/     id (int32) logprob (float32)
                /embeddings/ document window first_token tokens (int64) vector [n, C] (float32)
                /states/     document layer (int64) wkv [n, ...] shift [n, 2, C] (float32)
                /outputs/    document (int64) last [n, C] (float32): the output after ln_out of its last row
                /texts/      document (int64) sha256 [n, 32] (uint8)
kind "state"    /inflight/   document position layer (int64) wkv [n, ...] shift [n, 2, C] (float32)
                /carry/      document position end (int64) data (uint8)

Only groups with rows are there. Everything carries Fletcher-32 checksums, and commits carry the file's SHA-256.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from rwkvmpi.errors import UserError
from rwkvmpi.store.run_folder import SHARD_NAME

FORMAT = "rwkvmpi-shard"
FORMAT_VERSION = 1
Kind = Literal["results", "state"]
CHUNK_BYTES = 64 << 10
_INT64 = np.dtype(np.int64)
_FLOAT32 = np.dtype(np.float32)
_UINT8 = np.dtype(np.uint8)

# What each dataset must be: dtype and number of dimensions (0: any). All of a group have the same first length,
# but for the flat ones, which other columns point into.
COLUMNS: dict[str, dict[str, tuple[np.dtype, int]]] = {
    "documents": {
        **dict.fromkeys(("document", "bytes", "tokens", "error_end"), (_INT64, 1)),
        "ok": (_UINT8, 1),
        "error_text": (_UINT8, 1),
    },
    "pieces": dict.fromkeys(("document", "first_token", "count"), (_INT64, 1)),
    "tokens": {"id": (np.dtype(np.int32), 1), "logprob": (_FLOAT32, 1)},
    "embeddings": {
        **dict.fromkeys(("document", "window", "first_token", "tokens"), (_INT64, 1)),
        "vector": (_FLOAT32, 2),
    },
    "states": {**dict.fromkeys(("document", "layer"), (_INT64, 1)), "wkv": (_FLOAT32, 0), "shift": (_FLOAT32, 3)},
    "outputs": {"document": (_INT64, 1), "last": (_FLOAT32, 2)},
    "texts": {"document": (_INT64, 1), "sha256": (_UINT8, 2)},
    "inflight": {
        **dict.fromkeys(("document", "position", "layer"), (_INT64, 1)),
        "wkv": (_FLOAT32, 0),
        "shift": (_FLOAT32, 3),
    },
    "carry": {**dict.fromkeys(("document", "position", "end"), (_INT64, 1)), "data": (_UINT8, 1)},
}
FLAT = {("documents", "error_text"), ("carry", "data")}


@dataclass(frozen=True, slots=True)
class ShardRef:
    """A shard as commits list it. documents, failed, tokens: what its rows of finished documents add up to."""

    name: str
    sha256: str
    nbytes: int
    kind: Kind
    documents: int = 0
    failed: int = 0
    tokens: int = 0

    @property
    def writer(self) -> tuple[int, int]:
        """(attempt, rank) that wrote it."""
        match = _matched(self.name)
        return int(match[1]), int(match[2])

    @property
    def slot(self) -> tuple[int, int, str]:
        """(attempt, rank, serial): of several versions of one results shard only the newest counts."""
        match = _matched(self.name)
        return int(match[1]), int(match[2]), match[3] + match[4]


@dataclass(frozen=True)
class Cut:
    """What one rank reports when it has cut its results for a commit.

    refs: results shards written since its last cut (a newer version of one replaces the older) and ALL its state
    shards of this cut; documents: the documents that it finished since its last cut.
    """

    attempt: int
    rank: int
    commit: int
    refs: tuple[ShardRef, ...]
    documents: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a message."""
        return {**asdict(self), "refs": [asdict(ref) for ref in self.refs], "documents": list(self.documents)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        refs = tuple(ShardRef(**ref) for ref in value["refs"])
        return cls(value["attempt"], value["rank"], value["commit"], refs, tuple(value["documents"]))


def merge_cuts(current: Iterable[ShardRef], cuts: Iterable[Cut]) -> list[ShardRef]:
    """The shards that count after `cuts` (one per rank, all of the same commit), given those that counted before.

    New versions replace old ones, and a rank's new state shards replace all its older ones of this attempt.
    """
    merged = {ref.slot: ref for ref in current}
    for cut in cuts:
        writer = (cut.attempt, cut.rank)
        merged = {slot: ref for slot, ref in merged.items() if ref.kind == "results" or ref.writer != writer}
        merged.update({ref.slot: ref for ref in cut.refs})
    return list(merged.values())


def shard_name(attempt: int, rank: int, kind: Kind, serial: int, version: int) -> str:
    """The file name: attempt, rank, serial ("s" before it: states) and version."""
    prefix = "s" if kind == "state" else ""
    return f"{attempt:04d}-{rank:05d}-{prefix}{serial:05d}-{version:03d}.h5"


def _matched(name: str) -> Any:
    match = SHARD_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a shard")
    return match


def build_image(kind: Kind, groups: Mapping[str, Mapping[str, np.ndarray]]) -> memoryview:
    """The bytes of the HDF5 file with these groups of arrays (see the module's docstring)."""
    import h5py

    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["kind"] = kind
        for group, columns in groups.items():
            for column, values in columns.items():
                dtype, _ = COLUMNS[group][column]
                array = np.ascontiguousarray(values, dtype=dtype)
                if array.size:
                    shape = chunk_shape(array.shape, dtype)
                    file.create_dataset(f"{group}/{column}", data=array, chunks=shape, **CHECKED)
                else:  # HDF5 has no chunks, and so no checksums, for nothing
                    file.create_dataset(f"{group}/{column}", data=array)
    return image.getbuffer()


CHECKED = {"fletcher32": True, "track_times": False}


def chunk_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """HDF5 chunks of about 64 KiB along the first dimension; at least one row, at most what there is."""
    row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
    rows = max(1, min(CHUNK_BYTES // max(row_bytes, 1), max(shape[0], 1)))
    return (rows, *(max(1, extent) for extent in shape[1:]))


class ShardFile:
    """A shard opened for reading, as a context manager. Format, version, dtypes and lengths are checked first.

    UserError when it is not a shard of ours or its parts do not fit together; damaged data raises UserError on reading.
    """

    def __init__(self, path: Path) -> None:
        import h5py

        self.path = path
        try:
            self._file = h5py.File(path, "r", locking=False)  # it never changes, and some file systems have no locks
        except OSError as error:
            raise UserError(f"{path}: cannot be opened as HDF5 ({error}); restore it from a copy") from error
        try:
            self._check()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def has(self, group: str) -> bool:
        """Whether there are rows of this group."""
        return group in self._file

    def column(self, group: str, column: str) -> np.ndarray:
        """A whole column; empty when the group is not there."""
        if not self.has(group):
            dtype, _ = COLUMNS[group][column]
            return np.zeros(0, dtype=dtype)
        return self.rows(group, column, 0, self.shape(group, column)[0])

    def rows(self, group: str, column: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1 of a column. UserError when they are damaged."""
        try:
            return self._file[f"{group}/{column}"][start:stop]
        except (OSError, KeyError) as error:
            raise UserError(f"{self.path}: /{group}/{column} is damaged ({error}); restore it from a copy") from error

    def shape(self, group: str, column: str) -> tuple[int, ...]:
        """The shape of a column that is there."""
        shape: tuple[int, ...] = self._file[f"{group}/{column}"].shape
        return shape

    def errors(self) -> list[str]:
        """The error of every row of /documents ("" where it is ok)."""
        text = self.column("documents", "error_text").tobytes()
        ends = self.column("documents", "error_end").tolist()
        return [text[start:end].decode("utf-8", "replace") for start, end in zip([0, *ends], ends, strict=False)]

    def _check(self) -> None:
        import h5py

        attrs = self._file.attrs
        if attrs.get("format") != FORMAT:
            raise UserError(f"{self.path}: is not a shard of rwkvmpi (format {attrs.get('format')!r})")
        if attrs.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{self.path}: has shard format {attrs.get('format_version')!r}, this rwkvmpi reads {FORMAT_VERSION}; "
                "use the version that wrote it"
            )
        self.kind: Kind = attrs.get("kind")
        for group in self._file:
            if group not in COLUMNS:
                raise self._damaged(f"/{group} is unknown")
            lengths = set()
            for column, (dtype, ndim) in COLUMNS[group].items():
                dataset = self._file.get(f"{group}/{column}")
                if not isinstance(dataset, h5py.Dataset) or dataset.dtype != dtype:
                    raise self._damaged(f"/{group}/{column} is missing or not of type {dtype}")
                if ndim and dataset.ndim != ndim:
                    raise self._damaged(f"/{group}/{column} has {dataset.ndim} dimensions, not {ndim}")
                if (group, column) not in FLAT:
                    lengths.add(dataset.shape[0])
            if len(lengths) != 1:
                raise self._damaged(f"the columns of /{group} have different lengths {sorted(lengths)}")

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}: the file is damaged or not ours; restore it from a copy")
