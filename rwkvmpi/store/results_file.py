"""Reading results.h5."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, overload

import numpy as np

from rwkvmpi.errors import UserError

FORMAT = "rwkvmpi-results"
FORMAT_VERSION = 1
STATUS = {"ok": 0, "failed": 1}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_ROWS = 4096

# path -> (dtype kind and size, dimensions); every dataset of a group has the same number of rows
_DOCUMENTS = {
    "id": ("O", 1),
    "source": ("O", 1),
    "bytes": ("i8", 1),
    "tokens": ("i8", 1),
    "first_token": ("i8", 1),
    "nll": ("f8", 1),
    "bits_per_byte": ("f8", 1),
    "status": ("u1", 1),
    "error": ("O", 1),
}
_GROUPS: dict[str, dict[str, dict[str, tuple[str, int]]]] = {
    "score": {"tokens": {"id": ("i4", 1), "logprob": ("f4", 1)}},
    "embed": {
        "embeddings": {"vector": ("f4", 2), "document": ("i8", 1), "first_token": ("i8", 1), "tokens": ("i8", 1)}
    },
    "read": {"states": {"wkv": ("f4", 0), "shift": ("f4", 4)}},
}
# Only in runs that were handed documents on: what the run before had read of each, which this one did not read again.
BEFORE = ("bytes_before", "tokens_before")
# What a file need not have: the columns of BEFORE, and what the first version did not keep with states.
_OPTIONAL: dict[str, dict[str, tuple[str, int]]] = {
    "documents": dict.fromkeys(BEFORE, ("i8", 1)),
    "states": {"last": ("f4", 2), "text_sha256": ("u1", 2)},
}


def printable(text: str) -> str:
    """Text that every HDF5 library takes: what UTF-8 or C strings cannot hold is written as an escape."""
    safe = text.encode("utf-8", "backslashreplace").decode()
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", safe)


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """One row of /documents. nll (nats) and bits_per_byte are NaN for failed documents, and for embed and read. Of a
    document that was handed on, bytes and tokens are the new ones, and bytes_before and tokens_before those before."""

    index: int
    id: str
    source: str
    bytes: int
    tokens: int
    first_token: int
    nll: float
    bits_per_byte: float
    status: str
    error: str
    bytes_before: int = 0
    tokens_before: int = 0

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class DocumentRows:
    """/documents: a sequence of rows, and whole columns by name."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def __len__(self) -> int:
        return len(self._results)

    @overload
    def __getitem__(self, key: int) -> DocumentRow: ...

    @overload
    def __getitem__(self, key: str) -> np.ndarray: ...

    def __getitem__(self, key: int | str) -> DocumentRow | np.ndarray:
        """The row of a document (IndexError outside), or a whole column by its name (text as an array of str)."""
        if isinstance(key, str):
            column: np.ndarray = self._results.read(f"documents/{key}", 0, len(self))
            return column
        index = range(len(self))[key]
        return next(self.rows(index, index + 1))

    def __iter__(self) -> Iterator[DocumentRow]:
        return self.rows(0, len(self))

    def rows(self, start: int, stop: int) -> Iterator[DocumentRow]:
        """Rows start..stop-1, read a few thousand at a time."""
        names = {number: word for word, number in STATUS.items()}
        wanted = [*_DOCUMENTS, *(name for name in BEFORE if self._results.has(f"documents/{name}"))]
        for low in range(start, stop, _ROWS):
            high = min(low + _ROWS, stop)
            columns = {name: self._results.read(f"documents/{name}", low, high).tolist() for name in wanted}
            for offset in range(min(_ROWS, stop - low)):
                values = {name: column[offset] for name, column in columns.items()}
                yield DocumentRow(index=low + offset, **{**values, "status": names.get(values["status"], "failed")})


class Results:
    """A results file opened for reading; use it as a context manager. Made by `open_results`.

    task: "score", "embed" or "read"; job: the resolved job; model_sha256, tokenizer, creator, content_sha256: str.
    """

    def __init__(self, path: Path) -> None:
        import h5py

        self.path = path
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            reason = "there is no such file" if not path.exists() else f"it cannot be opened as HDF5 ({error})"
            raise UserError(f"{path}: {reason}; give a results.h5 or a finished run") from error
        try:
            self._check()
        except BaseException:
            self._file.close()
            raise
        self.documents = DocumentRows(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of documents."""
        return self._documents

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def provenance(self) -> dict[str, str]:
        """argv, versions and so on, as they were recorded; JSON where the values were not text."""
        group = self._file.get("provenance")
        return {} if group is None else {key: str(value) for key, value in group.attrs.items()}

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], log-probabilities float32 [n]) of a document, or of its tokens start..stop-1."""
        self._need("score", "tokens")
        index = range(len(self))[index]
        first = int(self.read("documents/first_token", index, index + 1)[0])
        count = int(self.read("documents/tokens", index, index + 1)[0])
        low, high, _ = slice(start, stop).indices(count)
        return tuple(self.read(f"tokens/{name}", first + low, first + max(low, high)) for name in ("id", "logprob"))  # type: ignore[return-value]

    def embeddings(self, index: int | None = None) -> dict[str, np.ndarray]:
        """vector float32 [rows, C], document, first_token, tokens int64 [rows]: of one document, or of all."""
        self._need("embed", "embeddings")
        rows = self._file["embeddings/document"].shape[0]
        low, high = 0, rows
        if index is not None:
            document = self.read("embeddings/document", 0, rows)
            index = range(len(self))[index]
            low, high = (int(np.searchsorted(document, index, side=side)) for side in ("left", "right"))
        return {name: self.read(f"embeddings/{name}", low, high) for name in _GROUPS["embed"]["embeddings"]}

    def state(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(wkv float32 [L, ...], shift float32 [L, 2, C]) of one document; NaN when it failed."""
        self._need("read", "states")
        index = range(len(self))[index]
        return tuple(self.read(f"states/{name}", index, index + 1)[0] for name in ("wkv", "shift"))  # type: ignore[return-value]

    def layer_state(self, index: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(wkv float32 [...], shift float32 [2, C]) of one layer of a document, of the task read."""
        self._need("read", "states")
        try:
            return self._file["states/wkv"][index, layer], self._file["states/shift"][index, layer]
        except OSError as error:
            raise UserError(f"{self.path}: /states is damaged ({error}); restore it from a copy") from error

    def last_output(self, index: int) -> np.ndarray:
        """float32 [C]: the output after ln_out of a document's last token, of the task read; NaN when it failed.
        UserError when the file has none."""
        self._need("read", "states")
        index = range(len(self))[index]
        if not self.has("states/last"):
            raise UserError(f"{self.path}: was written by a version that kept no states/last; read the documents again")
        row: np.ndarray = self.read("states/last", index, index + 1)[0]
        return row

    def has(self, path: str) -> bool:
        """Whether the file has this dataset."""
        return path in self._file

    def layout(self, path: str) -> tuple[np.dtype, tuple[int, ...] | None]:
        """The dtype of a dataset, and the shape of its chunks (None: it has none)."""
        dataset = self._file[path]
        return dataset.dtype, dataset.chunks

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every dataset."""
        names = {"documents": _DOCUMENTS, **_GROUPS[self.task]}
        paths = [f"{group}/{name}" for group in names for name in (*names[group], *_OPTIONAL.get(group, ()))]
        return {path: self._file[path].shape for path in paths if self.has(path)}

    def read(self, path: str, start: int, stop: int) -> Any:
        """Rows of a dataset; UserError when they are damaged."""
        dataset = self._file[path]
        try:
            return (dataset.asstr() if dataset.dtype.kind == "O" else dataset)[start:stop]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: /{path} is damaged ({error}); restore it from a copy") from error

    def _need(self, task: str, group: str) -> None:
        if self.task != task:
            raise UserError(f"{self.path}: holds the results of the task {self.task}, which has no {group}")

    def _check(self) -> None:
        attrs = dict(self._file.attrs)
        if attrs.get("format") != FORMAT:
            raise UserError(f"{self.path}: is not a results file of rwkvmpi (format {attrs.get('format')!r})")
        if attrs.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{self.path}: has results format {attrs.get('format_version')!r}, but this rwkvmpi reads "
                f"{FORMAT_VERSION}; use the version that wrote it"
            )
        self.task = str(attrs.get("task"))
        if self.task not in _GROUPS:
            raise self._damaged(f"its task {self.task!r} is unknown")
        names = ("creator", "model_sha256", "tokenizer", "content_sha256")
        self.creator, self.model_sha256, self.tokenizer, self.content_sha256 = (
            str(attrs.get(key, "")) for key in names
        )
        try:
            self.job: dict[str, Any] = json.loads(attrs.get("job", "{}"))
        except (TypeError, ValueError) as error:
            raise self._damaged(f"its attribute job is not JSON ({error})") from error
        self._documents = self._check_group("documents", _DOCUMENTS)
        for group, columns in _GROUPS[self.task].items():
            rows = self._check_group(group, columns)
            if group == "states" and rows != self._documents:
                raise self._damaged(f"/states has {rows} rows for {self._documents} documents")

    def _check_group(self, group: str, columns: dict[str, tuple[str, int]]) -> int:
        import h5py

        lengths = set()
        extra = {name: what for name, what in _OPTIONAL.get(group, {}).items() if self.has(f"{group}/{name}")}
        for name, (kind, ndim) in {**columns, **extra}.items():
            dataset = self._file.get(f"{group}/{name}")
            if not isinstance(dataset, h5py.Dataset):
                raise self._damaged(f"/{group}/{name} is missing")
            found = "O" if dataset.dtype.kind == "O" else dataset.dtype.str[1:]
            if found != kind or dataset.ndim == 0 or (ndim and dataset.ndim != ndim):
                raise self._damaged(f"/{group}/{name} is {dataset.dtype} of {dataset.ndim} dimensions")
            lengths.add(dataset.shape[0])
        if len(lengths) != 1:
            raise self._damaged(f"the columns of /{group} have different lengths {sorted(lengths)}")
        return int(lengths.pop())

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}: the file is damaged or not ours; restore it from a copy")


def open_results(path: str | Path) -> Results:
    """Open a results.h5, or the one of a run folder; format, version, types and lengths are checked.

    UserError when there is none, or it is not what it should be.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.h5"
        if not path.exists():
            raise UserError(f"{path.parent}: has no results.h5 yet; `rwkvmpi status {path.parent}` says how far it is")
    return Results(path)
