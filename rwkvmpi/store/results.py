"""results.h5: everything a run found out, in input order, from the shards of all its attempts."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rwkvmpi import __version__
from rwkvmpi.errors import UserError
from rwkvmpi.store.arrange import (
    Documents,
    DoesNotFit,
    Pieces,
    ShardSet,
    arrange_embeddings,
    arrange_rows,
    arrange_states,
    arrange_tokens,
    read_documents,
)
from rwkvmpi.store.commits import Commit, verify_shards
from rwkvmpi.store.digest import content_digest
from rwkvmpi.store.h5_output import H5Output
from rwkvmpi.store.results_file import BEFORE, FORMAT, FORMAT_VERSION, STATUS, Results, open_results, printable
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.shard_builder import SHA256_BYTES
from rwkvmpi.store.shard_file import CHUNK_BYTES

__all__ = ["Results", "content_digest", "open_results", "write_results"]

SUM_BLOCK = 65_536  # tokens whose log-probabilities are added up at once, counted from the document's start
_CHUNK_ROWS = CHUNK_BYTES // 4
_WINDOW_BYTES = 4 << 20
_STRINGS = 8192


@dataclass(frozen=True)
class _Shapes:
    """Of the model: layers, channels, and the WKV state of one layer."""

    layers: int
    width: int
    wkv: tuple[int, ...]


class Document(Protocol):
    """What is taken from the index of the input (corpus.index.DocumentRef)."""

    @property
    def id(self) -> str: ...

    @property
    def source(self) -> str: ...


def write_results(
    run: RunFolder,
    commit: Commit,
    documents: Iterable[Document],
    *,
    task: str,
    model_sha256: str,
    tokenizer: str | Sequence[str],
    job: Mapping[str, Any],
    provenance: Mapping[str, Any],
    layers: int,
    width: int | None = None,
    wkv_shape: tuple[int, ...] | None = None,
    before: tuple[np.ndarray, np.ndarray] | None = None,
    verify: bool = True,
) -> str:
    """Write results.h5 from the shards of the final commit, in memory that does not grow with documents' lengths.
    Returns its content digest (hex).

    documents: all, in input order. task: "score", "embed" or "read". tokenizer: its name, or words that tell it. job,
    provenance: JSON values. layers, width C, wkv_shape of one layer ((H, N, N); RWKV-4 (3, C)): of the model; the last
    two are taken from the shards when left out. before: of documents that were handed on from another run, the bytes
    and the tokens that it had read of each (int64 [documents] each, 0 elsewhere). verify: compare every shard's SHA-256
    first.

    UserError when a shard is damaged, when pieces are missing or overlap (naming document and token), or when the disk
    is full; the old results.h5, if there is one, stays then.
    """
    refs = [ref for ref in commit.shards if ref.kind == "results"]
    faults = verify_shards(run.shards, refs) if verify else []
    if faults:
        raise UserError(f"{run.shards}: {faults[0]}; restore it from a copy, or start again in a new run folder")
    if commit.in_flight:
        raise RuntimeError(f"document {commit.in_flight[0].doc} is still in flight: there are no results yet")
    identity = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "task": task,
        "model_sha256": model_sha256,
        "tokenizer": tokenizer if isinstance(tokenizer, str) else " ".join(map(str, tokenizer)),
    }
    with ShardSet(run.shards, refs) as shards, H5Output(run.results) as output:
        try:
            shapes = _shapes(shards, layers, width, wkv_shape)
            table = read_documents(shards, commit.documents_total)
            _check_room(run, task, shapes, table)
            _Writer(shapes, table, shards, output, commit.restarted).write(task, documents, before)
        except DoesNotFit as error:
            raise UserError(
                f"{run.path}: the parts of the run do not fit together: {error}; start again in a new run folder"
            ) from error
        digest = output.digest(identity)
        creator = f"rwkvmpi {__version__}"
        text = json.dumps(job, sort_keys=True, ensure_ascii=False)
        output.set_attributes("/", **identity, creator=creator, job=printable(text), content_sha256=digest)
        facts = {key: fact if isinstance(fact, str) else json.dumps(fact) for key, fact in provenance.items()}
        output.set_attributes("provenance", **{key: printable(fact) for key, fact in facts.items()})
        output.publish()
    return digest


class _Writer:
    """Fills the datasets one after the other."""

    def __init__(
        self, shapes: _Shapes, table: Documents, shards: ShardSet, output: H5Output, restarted: Mapping[int, int]
    ) -> None:
        self._shapes, self._table, self._shards, self._output = shapes, table, shards, output
        self._restarted = restarted

    def write(self, task: str, documents: Iterable[Document], before: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Write everything."""
        nll = np.full(len(self._table.ok), np.nan)
        if task == "score":
            nll = self._write_tokens()
        elif task == "embed":
            self._write_embeddings()
        else:
            self._write_states()
        self._write_documents(documents, nll)
        for name, values in zip(BEFORE, before or (), strict=False):
            self._column(f"documents/{name}", np.where(self._table.ok, values, 0))

    def _write_documents(self, documents: Iterable[Document], nll: np.ndarray) -> None:
        import h5py

        table, total = self._table, len(self._table.ok)
        status = np.where(table.ok, STATUS["ok"], STATUS["failed"]).astype(np.uint8)
        bits = np.divide(nll / math.log(2), table.nbytes, out=np.zeros(total), where=table.nbytes > 0)
        bits[~table.ok | np.isnan(nll)] = np.nan
        for name, values in (
            ("bytes", table.nbytes),
            ("tokens", table.tokens),
            ("first_token", table.first_token),
            ("nll", nll),
            ("bits_per_byte", bits),
        ):
            self._column(f"documents/{name}", values)
        self._output.create("documents/status", (total,), h5py.enum_dtype(STATUS, basetype=np.uint8))
        self._output.append("documents/status", 0, status)
        for name in ("id", "source", "error"):
            self._output.create(f"documents/{name}", (total,), str)
        written = 0
        for block in _blocks(documents, _STRINGS):
            errors = [printable(table.errors.get(doc, "")) for doc in range(written, written + len(block))]
            if written + len(block) <= total:
                self._output.append("documents/id", written, [printable(document.id) for document in block])
                self._output.append("documents/source", written, [printable(document.source) for document in block])
                self._output.append("documents/error", written, errors)
            written += len(block)
        if written != total:
            raise DoesNotFit(f"the input has {written} documents, the run {total}")

    def _write_tokens(self) -> np.ndarray:
        table, total = self._table, int(self._table.tokens.sum())
        pieces = arrange_tokens(self._shards, table, self._restarted)
        self._output.create("tokens/id", (total,), np.int32, pack=True)
        self._output.create("tokens/logprob", (total,), np.float32)
        sums = _Sums(table)
        window = _window_rows(len(table.ok))
        for low in range(0, total, window):
            rows = min(window, total - low)
            ids, logprobs = np.empty(rows, np.int32), np.empty(rows, np.float32)
            self._shards.read("tokens", pieces, low, {"id": ids, "logprob": logprobs})
            self._output.append("tokens/id", low, ids)
            self._output.append("tokens/logprob", low, logprobs)
            sums.add(low, logprobs)
        return sums.nll

    def _write_embeddings(self) -> None:
        pieces, columns = arrange_embeddings(self._shards, self._table, self._restarted)
        for name, values in columns.items():
            self._column(f"embeddings/{name}", values)
        rows = len(pieces.target)
        width = (self._shapes.width,)
        self._output.create("embeddings/vector", (rows, *width), np.float32)
        self._copy("embeddings", "vector", pieces, rows, width, 1)

    def _write_states(self) -> None:
        shapes, documents = self._shapes, len(self._table.ok)
        pieces = arrange_states(self._shards, self._table, self._restarted, shapes.layers)
        for name, shape in (("wkv", shapes.wkv), ("shift", (2, shapes.width))):
            chunk = (1, _layers_per_chunk(shapes.layers, shape), *(max(1, extent) for extent in shape))
            self._output.create(f"states/{name}", (documents, shapes.layers, *shape), np.float32, chunk)
            self._copy("states", name, pieces, documents, shape, shapes.layers)
        shards, table, restarted = self._shards, self._table, self._restarted
        pieces = arrange_rows(shards, "outputs", table, restarted, "the output after its last token")
        self._output.create("states/last", (documents, shapes.width), np.float32)
        self._copy("outputs", "last", pieces, documents, (shapes.width,), 1, "states/last")
        pieces = arrange_rows(shards, "texts", table, restarted, "the SHA-256 of its text")
        digests = np.zeros((documents, SHA256_BYTES), np.uint8)
        self._shards.read("texts", pieces, 0, {"sha256": digests})
        self._column("states/text_sha256", digests)

    def _copy(
        self,
        group: str,
        column: str,
        pieces: Pieces,
        rows: int,
        shape: tuple[int, ...],
        items: int,
        target: str = "",
    ) -> None:
        """Copy `rows` rows of `items` pieces each; those of failed documents are NaN. target: dataset, if it is not
        called as in the shards."""
        step = max(1, _WINDOW_BYTES // max(4 * items * math.prod(shape), 1))
        for low in range(0, rows, step):
            count = min(step, rows - low)
            values = np.full((count * items, *shape), np.nan, np.float32)
            self._shards.read(group, pieces, low * items, {column: values})
            rows_of_items = values.reshape(count, items, *shape) if group == "states" else values
            self._output.append(target or f"{group}/{column}", low, rows_of_items)

    def _column(self, path: str, values: np.ndarray) -> None:
        self._output.create(path, values.shape, values.dtype)
        self._output.append(path, 0, values)


class _Sums:
    """nll of every document: blocks of SUM_BLOCK tokens from its start, added in order, in float64.

    A block's sum depends on its values alone, wherever windows of the results begin.
    """

    def __init__(self, table: Documents) -> None:
        self.nll = np.where(table.ok, 0.0, np.nan)
        self._firsts, self._tokens = table.first_token, table.tokens
        self._filled = np.flatnonzero(table.tokens)  # the documents that have tokens, by first token
        self._starts = self._firsts[self._filled]
        self._pending = np.zeros(0, np.float32)

    def add(self, low: int, logprobs: np.ndarray) -> None:
        """The log-probabilities of rows low.. of /tokens; windows come in order."""
        high = low + len(logprobs)
        first = max(int(np.searchsorted(self._starts, low, side="right")) - 1, 0)
        last = int(np.searchsorted(self._starts, high, side="left"))
        for doc in self._filled[first:last].tolist():
            begin = int(self._firsts[doc])
            end = begin + int(self._tokens[doc])
            values = np.concatenate([self._pending, logprobs[max(begin, low) - low : min(end, high) - low]])
            whole = len(values) if end <= high else len(values) - len(values) % SUM_BLOCK
            for start in range(0, whole, SUM_BLOCK):
                self.nll[doc] -= float(values[start : min(start + SUM_BLOCK, whole)].astype(np.float64).sum())
            self._pending = values[whole:].copy()


def _window_rows(documents: int) -> int:
    """Rows of /tokens in memory at a time: whole HDF5 chunks, 1 MiB of each dataset when documents are few. Many small
    ones lie scattered over the shards, which are read once per window: so it grows with their number (to 64 MiB)."""
    return min(max(16 * documents // _CHUNK_ROWS, 16), 1024) * _CHUNK_ROWS


def _layers_per_chunk(layers: int, shape: tuple[int, ...]) -> int:
    """How many layers of this shape one HDF5 chunk holds: about 64 KiB, at least one."""
    return max(1, min(layers, CHUNK_BYTES // max(4 * math.prod(shape), 1)))


def _shapes(shards: ShardSet, layers: int, width: int | None, wkv: tuple[int, ...] | None) -> _Shapes:
    """What was not given is taken from the first shard that shows it; 0 when all documents failed."""
    for number in range(len(shards.names)):
        file = shards.file(number)
        if file.has("embeddings"):
            width = width or file.shape("embeddings", "vector")[1]
        if file.has("states"):
            width = width or file.shape("states", "shift")[2]
            wkv = wkv or file.shape("states", "wkv")[1:]
    return _Shapes(layers, width or 0, wkv or (0,))


def _check_room(run: RunFolder, task: str, shapes: _Shapes, table: Documents) -> None:
    """Say before the work that the disk is too small, as far as the system tells (quotas show up while writing)."""
    state = 4 * (shapes.layers * (math.prod(shapes.wkv) + 2 * shapes.width) + shapes.width) if task == "read" else 0
    needed = int(table.tokens.sum()) * (8 if task == "score" else 0) + len(table.ok) * (200 + state)
    free = shutil.disk_usage(run.path).free
    if needed > free:
        raise UserError(
            f"{run.path}: results.h5 needs about {needed:,} bytes, but {free:,} are free; "
            "free some space, then the same command writes it"
        )


def _blocks(items: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block
