"""Writing shards: results as they come, and the states with which a later job goes on.

Results are gathered in memory and written when they reach a limit. What is below the limit at a commit is written too,
and kept: at the next commit a fuller version takes its place. So a job has about as many shards as its results fill,
however often it commits, and a commit's list stays short.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from rwkvmpi.store.files import write_durably
from rwkvmpi.store.shard_file import Kind, ShardRef, build_image, shard_name

DEFAULT_LIMIT_BYTES = 1 << 20
MAX_LIMIT_BYTES = 64 << 20
_ITEMS_PER_SHARD = 16  # at least so many of the largest items (states, vectors), as far as MAX_LIMIT_BYTES allows
_ROW_BYTES = 64  # what a row of a table is counted for
SHA256_BYTES = 32

Groups = dict[str, dict[str, np.ndarray]]


class _Table:
    """Columns of int64, appended to row by row."""

    def __init__(self, *names: str) -> None:
        self._columns = {name: array("q") for name in names}

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def add(self, *values: int) -> None:
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def column(self, name: str) -> array[int]:
        return self._columns[name]

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.array(column, dtype=np.int64) for name, column in self._columns.items()}


class _Results:
    """Results gathered so far for one shard."""

    def __init__(self) -> None:
        self.documents = _Table("document", "bytes", "tokens", "error_end")
        self.ok = bytearray()
        self.error_text = bytearray()
        self.pieces = _Table("document", "first_token", "count")
        self.ids = bytearray()
        self.logprobs = bytearray()
        self.windows = _Table("document", "window", "first_token", "tokens")
        self.vectors: list[np.ndarray] = []
        self.states = _Table("document", "layer")
        self.wkv: list[np.ndarray] = []
        self.shift: list[np.ndarray] = []
        self.outputs = _Table("document")
        self.lasts: list[np.ndarray] = []
        self.texts = _Table("document")
        self.digests = bytearray()
        self.item_bytes = 0

    @property
    def nbytes(self) -> int:
        tables = (self.documents, self.pieces, self.windows, self.states, self.outputs, self.texts)
        rows = sum(map(len, tables))
        flat = len(self.ids) + len(self.logprobs) + len(self.error_text)
        return rows * _ROW_BYTES + flat + self.item_bytes

    def groups(self) -> Groups:
        """Copies of everything as arrays: what is added later does not change them."""
        groups: Groups = {}
        if len(self.documents):
            groups["documents"] = {
                **self.documents.arrays(),
                "ok": np.frombuffer(bytes(self.ok), np.uint8),
                "error_text": np.frombuffer(bytes(self.error_text), np.uint8),
            }
        if len(self.pieces):
            groups["pieces"] = self.pieces.arrays()
            groups["tokens"] = {
                "id": np.frombuffer(bytes(self.ids), np.int32),
                "logprob": np.frombuffer(bytes(self.logprobs), np.float32),
            }
        if self.vectors:
            groups["embeddings"] = {**self.windows.arrays(), "vector": np.stack(self.vectors)}
        if self.wkv:
            groups["states"] = {**self.states.arrays(), "wkv": np.stack(self.wkv), "shift": np.stack(self.shift)}
        if self.lasts:
            groups["outputs"] = {**self.outputs.arrays(), "last": np.stack(self.lasts)}
        if len(self.texts):
            sha256 = np.frombuffer(bytes(self.digests), np.uint8).reshape(-1, SHA256_BYTES)
            groups["texts"] = {**self.texts.arrays(), "sha256": sha256}
        return groups


class _States:
    """States of documents in flight gathered for one shard."""

    def __init__(self) -> None:
        self.table = _Table("document", "position", "layer")
        self.wkv: list[np.ndarray] = []
        self.shift: list[np.ndarray] = []
        self.carries = _Table("document", "position", "end")
        self.data = bytearray()
        self.nbytes = 0

    def groups(self) -> Groups:
        groups: Groups = {}
        if self.wkv:
            groups["inflight"] = {**self.table.arrays(), "wkv": np.stack(self.wkv), "shift": np.stack(self.shift)}
        if len(self.carries):
            groups["carry"] = {**self.carries.arrays(), "data": np.frombuffer(bytes(self.data), np.uint8)}
        return groups


class ShardBuilder:
    """Gathers one rank's results and states and writes them as shards into `folder`, at once and in this thread.

    attempt, rank: part of every name, so that no two writers ever use the same. limit_bytes: a shard is written early
    when it holds more; it grows by itself up to 64 MiB where single states are large.
    """

    def __init__(self, folder: Path, attempt: int, rank: int, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self._folder, self._attempt, self._rank = folder, attempt, rank
        self._limit = limit_bytes
        self._largest_item = 0
        self._written: list[ShardRef] = []
        self._results = _Results()
        self._states = _States()
        self._serial = {"results": 0, "state": 0}
        self._version = 0
        self._dirty = False

    def add_tokens(self, doc: int, first_token: int, ids: np.ndarray, logprob: np.ndarray) -> None:
        """Tokens first_token.. of a document: ids int32 [n] and their log-probabilities float32 [n], n >= 1."""
        _expect("ids", ids, np.int32, 1)
        _expect("logprob", logprob, np.float32, 1)
        if len(ids) != len(logprob) or not len(ids):
            raise ValueError(f"document {doc}: {len(ids)} ids and {len(logprob)} log-probabilities")
        results = self._results
        documents, firsts, counts = (results.pieces.column(name) for name in ("document", "first_token", "count"))
        if documents and documents[-1] == doc and firsts[-1] + counts[-1] == first_token:
            counts[-1] += len(ids)
        else:
            results.pieces.add(doc, first_token, len(ids))
        results.ids += np.ascontiguousarray(ids).data.cast("B")
        results.logprobs += np.ascontiguousarray(logprob).data.cast("B")
        self._results_grew()

    def add_embedding(self, doc: int, window: int, first_token: int, ntokens: int, vector: np.ndarray) -> None:
        """The complete vector, float32 [C], of a document's window number `window` over ntokens tokens. Copied."""
        _expect("vector", vector, np.float32, 1)
        self._results.windows.add(doc, window, first_token, ntokens)
        self._results.vectors.append(self._keep(vector))
        self._results.item_bytes += vector.nbytes
        self._results_grew()

    def add_state(self, doc: int, layer: int, wkv: np.ndarray, shift: np.ndarray) -> None:
        """The final state of a document in one layer: wkv float32 [...], shift float32 [2, C]. Copied."""
        _expect("wkv", wkv, np.float32, None)
        _expect("shift", shift, np.float32, 2)
        results = self._results
        results.states.add(doc, layer)
        results.wkv.append(self._keep(wkv, wkv.nbytes + shift.nbytes))
        results.shift.append(shift.copy())
        results.item_bytes += wkv.nbytes + shift.nbytes
        self._results_grew()

    def add_output(self, doc: int, last: np.ndarray) -> None:
        """The output after ln_out of a document's last row, float32 [C]. Copied."""
        _expect("last", last, np.float32, 1)
        self._results.outputs.add(doc)
        self._results.lasts.append(self._keep(last))
        self._results.item_bytes += last.nbytes
        self._results_grew()

    def add_document(self, doc: int, nbytes: int, ntokens: int, ok: bool, error: str = "", sha256: bytes = b"") -> None:
        """A document is done: bytes of its text, number of its tokens; not ok: it failed, and `error` says why.
        sha256: of its whole text, where that is part of the results."""
        results = self._results
        if sha256:
            results.texts.add(doc)
            results.digests += sha256
        results.error_text += error.encode("utf-8", "backslashreplace")
        results.documents.add(doc, nbytes, ntokens, len(results.error_text))
        results.ok.append(bool(ok))
        self._results_grew()

    def add_inflight(self, doc: int, position: int, layer: int, wkv: np.ndarray, shift: np.ndarray) -> None:
        """The state with which `doc` enters `position` in a layer: wkv float32 [...], shift float32 [2, C]. Copied."""
        _expect("wkv", wkv, np.float32, None)
        _expect("shift", shift, np.float32, 2)
        states = self._states
        states.table.add(doc, position, layer)
        states.wkv.append(self._keep(wkv, wkv.nbytes + shift.nbytes))
        states.shift.append(shift.copy())
        self._states_grew(wkv.nbytes + shift.nbytes)

    def add_carry(self, doc: int, position: int, data: bytes | np.ndarray) -> None:
        """What the task carries into `position` of `doc`: bytes, or uint8 [n]. Copied."""
        states = self._states
        states.data += bytes(data)
        states.carries.add(doc, position, len(states.data))
        self._states_grew(len(data) + _ROW_BYTES)

    def flush(self) -> list[ShardRef]:
        """Write everything that was added; the shards written since the last flush (see Cut.refs)."""
        self.close_results()
        self.close_states()
        return self.take_written()

    def close_results(self) -> None:
        """Write the results added so far; they stay in memory for the shard's next, fuller version."""
        if self._dirty:
            self._write_results()

    def close_states(self) -> None:
        """Write the states added so far."""
        if self._states.wkv or len(self._states.carries):
            self._write("state", self._states.groups(), self._serial["state"], 0)
            self._serial["state"] += 1
            self._states = _States()

    def take_written(self) -> list[ShardRef]:
        """The shards written since the last call; of several versions of one only the newest."""
        written, self._written = self._written, []
        return newest(written)

    def _keep(self, values: np.ndarray, item_bytes: int = 0) -> np.ndarray:
        self._largest_item = max(self._largest_item, item_bytes or values.nbytes)
        return values.copy()

    def _over_limit(self, nbytes: int) -> bool:
        return nbytes >= max(self._limit, min(MAX_LIMIT_BYTES, _ITEMS_PER_SHARD * self._largest_item))

    def _results_grew(self) -> None:
        self._dirty = True
        if self._over_limit(self._results.nbytes):
            self._write_results()
            self._serial["results"] += 1
            self._version = 0
            self._results = _Results()

    def _states_grew(self, nbytes: int) -> None:
        self._states.nbytes += nbytes
        if self._over_limit(self._states.nbytes):
            self.close_states()

    def _write_results(self) -> None:
        results = self._results
        tokens = sum(count for count, ok in zip(results.documents.column("tokens"), results.ok, strict=True) if ok)
        counts = (len(results.documents), results.ok.count(0), tokens)
        self._write("results", results.groups(), self._serial["results"], self._version, counts)
        self._version += 1
        self._dirty = False

    def _write(
        self, kind: Kind, groups: Groups, serial: int, version: int, counts: tuple[int, int, int] = (0, 0, 0)
    ) -> None:
        name = shard_name(self._attempt, self._rank, kind, serial, version)
        self._submit(partial(write_shard, self._folder, name, kind, groups, counts), _nbytes(groups))

    def _submit(self, write: Callable[[], ShardRef], nbytes: int) -> None:
        """Have a shard of about `nbytes` bytes written."""
        self._written.append(write())


def newest(refs: Iterable[ShardRef]) -> list[ShardRef]:
    """Of several versions of one shard only the newest, given in the order of writing."""
    return list({ref.slot: ref for ref in refs}.values())


def write_shard(folder: Path, name: str, kind: Kind, groups: Groups, counts: tuple[int, int, int]) -> ShardRef:
    """Write one shard durably. counts: its finished documents, those that failed, and the tokens of the others."""
    image = build_image(kind, groups)
    write_durably(folder / name, image)
    return ShardRef(name, hashlib.sha256(image).hexdigest(), len(image), kind, *counts)


def _nbytes(groups: Groups) -> int:
    return sum(values.nbytes for columns in groups.values() for values in columns.values())


def _expect(name: str, values: np.ndarray, dtype: type, ndim: int | None) -> None:
    if values.dtype != dtype or (ndim is not None and values.ndim != ndim):
        wanted = f"{np.dtype(dtype)} of {ndim} dimensions" if ndim is not None else f"{np.dtype(dtype)}"
        raise ValueError(f"{name} is {values.dtype} of shape {values.shape}, not {wanted}")
