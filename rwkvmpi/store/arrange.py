"""Which piece of which shard belongs where in the results: checked to be complete, then read in order.

A piece is `count` rows of a shard, from row `start`, that go to rows `target`.. of a dataset of the results. Pieces of
tokens are long, a vector or a state is a piece of one row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkvmpi.errors import UserError
from rwkvmpi.store.shard_file import ShardFile, ShardRef

_OPEN_SHARDS = 8  # each takes half a megabyte
_GAP_BYTES = 64 << 10  # reading so many bytes that are not wanted is cheaper than another call


class DoesNotFit(ValueError):
    """The parts of a run do not make up the whole; says which document, and where."""


@dataclass
class Documents:
    """The documents' rows, in input order: int64 [documents], ok bool. Failed ones have 0 tokens and 0 bytes."""

    nbytes: np.ndarray
    tokens: np.ndarray
    ok: np.ndarray
    errors: dict[int, str]

    @property
    def first_token(self) -> np.ndarray:
        """int64 [documents]: where each document's tokens begin when all are laid end to end."""
        return np.cumsum(self.tokens) - self.tokens


@dataclass
class Pieces:
    """Pieces sorted by target; each field int64 [pieces]; shard counts in the list of names."""

    target: np.ndarray
    count: np.ndarray
    shard: np.ndarray
    start: np.ndarray

    def between(self, low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
        """(target, count, shard, start) of the parts of pieces within rows low..high-1 of the results."""
        first = int(np.searchsorted(self.target, low, side="right")) - 1
        last = int(np.searchsorted(self.target, high, side="left"))
        part = slice(max(first, 0), last)
        columns = [column[part].tolist() for column in (self.target, self.count, self.shard, self.start)]
        for target, count, shard, start in zip(*columns, strict=True):
            skip = max(low - target, 0)
            take = min(count, high - target) - skip
            if take > 0:
                yield target + skip, take, shard, start + skip


class ShardSet:
    """The results shards of a run, of which a few are kept open at a time. A context manager."""

    def __init__(self, folder: Path, refs: Sequence[ShardRef]) -> None:
        self._folder = folder
        self.names = [ref.name for ref in refs]
        self.attempts = [ref.writer[0] for ref in refs]
        self._open: OrderedDict[int, ShardFile] = OrderedDict()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def file(self, shard: int) -> ShardFile:
        """The shard of this number, open."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= _OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        self._open[shard] = file = ShardFile(self._folder / self.names[shard])
        return file

    def read(self, group: str, pieces: Pieces, low: int, out: Mapping[str, np.ndarray]) -> None:
        """Fill the arrays of `out` (column -> rows, all equally many) with rows low.. of the results.

        Rows without a piece keep what they had.
        """
        wanted: dict[int, list[tuple[int, int, int]]] = {}
        rows = len(next(iter(out.values())))
        for target, count, shard, start in pieces.between(low, low + rows):
            wanted.setdefault(shard, []).append((start, count, target - low))
        for shard, parts in sorted(wanted.items()):
            parts.sort()
            for column, values in out.items():
                self._read_parts(shard, f"{group}/{column}", parts, values)

    def _read_parts(self, shard: int, path: str, parts: list[tuple[int, int, int]], out: np.ndarray) -> None:
        """Copy (start, count, target) of one dataset, in the order of start, with as few calls as is cheap."""
        file, (group, column) = self.file(shard), path.split("/")
        row_bytes = out.itemsize * int(np.prod(out.shape[1:], dtype=np.int64))
        for run in _runs(parts, _GAP_BYTES // max(row_bytes, 1)):
            start, stop = run[0][0], run[-1][0] + run[-1][1]
            values = file.rows(group, column, start, stop)
            if values.shape != (stop - start, *out.shape[1:]):
                raise UserError(
                    f"{file.path}: rows of /{path} have shape {list(values.shape[1:])}, expected "
                    f"{list(out.shape[1:])}; restore it from a copy"
                )
            for begin, count, target in run:
                out[target : target + count] = values[begin - start : begin - start + count]


def _runs(parts: list[tuple[int, int, int]], gap: int) -> Iterator[list[tuple[int, int, int]]]:
    """Neighbouring parts (start, count, target), in order, that one call reads together."""
    run = [parts[0]]
    for part in parts[1:]:
        if part[0] - (run[-1][0] + run[-1][1]) > gap:
            yield run
            run = []
        run.append(part)
    yield run


def read_documents(shards: ShardSet, total: int) -> Documents:
    """The rows of all documents. DoesNotFit when one is missing or there twice."""
    nbytes, tokens = np.zeros(total, np.int64), np.zeros(total, np.int64)
    seen, ok = np.zeros(total, np.int8), np.zeros(total, bool)
    errors: dict[int, str] = {}
    for number, name in enumerate(shards.names):
        file = shards.file(number)
        docs = file.column("documents", "document")
        if docs.size == 0:
            continue
        if docs.min() < 0 or docs.max() >= total:
            raise DoesNotFit(f"{name}: has a document number outside 0..{total - 1}; it belongs to another job")
        np.add.at(seen, docs, 1)
        nbytes[docs], tokens[docs] = file.column("documents", "bytes"), file.column("documents", "tokens")
        ok[docs] = file.column("documents", "ok") != 0
        errors.update({doc: error for doc, error in zip(docs.tolist(), file.errors(), strict=True) if not ok[doc]})
    if (wrong := np.flatnonzero(seen != 1)).size:
        doc = int(wrong[0])
        raise DoesNotFit(f"document {doc}: {'no result' if not seen[doc] else 'more than one result'} was recorded")
    nbytes[~ok] = 0
    tokens[~ok] = 0
    return Documents(nbytes, tokens, ok, errors)


def _table(
    shards: ShardSet, group: str, names: Sequence[str], documents: Documents, restarted: Mapping[int, int]
) -> dict[str, np.ndarray]:
    """The columns of a group over all shards, with `shard` and `row`; without failed documents and what an attempt
    wrote about a document that was then read from its start again."""
    tables: list[list[np.ndarray]] = []
    for number in range(len(shards.names)):
        file = shards.file(number)
        columns = [file.column(group, name) for name in names]
        docs = columns[0]
        keep = documents.ok[docs] if docs.size else np.zeros(0, bool)
        for doc, attempt in restarted.items():
            if shards.attempts[number] < attempt:
                keep = keep & (docs != doc)
        rows = np.arange(len(docs), dtype=np.int64)
        if group == "pieces":  # their rows are those of /tokens, laid end to end
            rows = np.cumsum(columns[2]) - columns[2]
        tables.append([column[keep] for column in (*columns, np.full(len(docs), number, np.int64), rows)])
    merged = [np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in zip(*tables, strict=True)]
    if not merged:
        merged = [np.zeros(0, np.int64)] * (len(names) + 2)
    order = np.lexsort((merged[1], merged[0]))
    return dict(zip((*names, "shard", "row"), (column[order] for column in merged), strict=True))


def arrange_tokens(shards: ShardSet, documents: Documents, restarted: Mapping[int, int]) -> Pieces:
    """The pieces of /tokens. DoesNotFit when they do not tile every document exactly, naming document and token."""
    table = _table(shards, "pieces", ("document", "first_token", "count"), documents, restarted)
    check_tiling(table["document"], table["first_token"], table["count"], documents)
    target = documents.first_token[table["document"]] + table["first_token"]
    return Pieces(target, table["count"], table["shard"], table["row"])


def arrange_embeddings(
    shards: ShardSet, documents: Documents, restarted: Mapping[int, int]
) -> tuple[Pieces, dict[str, np.ndarray]]:
    """The rows of /embeddings, and their columns document, first_token and tokens. Errors as for tokens."""
    names = ("document", "window", "first_token", "tokens")
    table = _table(shards, "embeddings", names, documents, restarted)
    docs, windows = table["document"], table["window"]
    check_tiling(docs, table["first_token"], table["tokens"], documents)
    begins = np.flatnonzero(np.diff(docs, prepend=-1))
    expected = np.arange(len(docs)) - np.repeat(begins, np.diff(begins, append=len(docs)))
    if (wrong := np.flatnonzero(windows != expected)).size:
        at = int(wrong[0])
        raise DoesNotFit(f"document {docs[at]}: window {expected[at]} was recorded as window {windows[at]}")
    rows = np.arange(len(docs), dtype=np.int64)
    pieces = Pieces(rows, np.ones_like(rows), table["shard"], table["row"])
    return pieces, {name: table[name] for name in ("document", "first_token", "tokens")}


def arrange_states(shards: ShardSet, documents: Documents, restarted: Mapping[int, int], layers: int) -> Pieces:
    """The rows of /states, as if [documents, layers] were one dimension. DoesNotFit when one is missing or twice."""
    table = _table(shards, "states", ("document", "layer"), documents, restarted)
    target = table["document"] * layers + table["layer"]
    wanted = np.repeat(documents.ok, layers)
    seen = np.zeros(len(wanted), np.int64)
    inside = (table["layer"] >= 0) & (table["layer"] < layers)
    np.add.at(seen, target[inside], 1)
    if not inside.all():
        doc = int(table["document"][~inside][0])
        raise DoesNotFit(f"document {doc}: a state of a layer outside 0..{layers - 1} was recorded")
    if (wrong := np.flatnonzero(seen != wanted)).size:
        doc, layer = divmod(int(wrong[0]), layers)
        what = "is missing" if not seen[wrong[0]] else "was recorded more than once"
        raise DoesNotFit(f"document {doc}: the state of layer {layer} {what}")
    return Pieces(target, np.ones_like(target), table["shard"], table["row"])


def arrange_rows(shards: ShardSet, group: str, documents: Documents, restarted: Mapping[int, int], what: str) -> Pieces:
    """The rows of a group that has one for every document. DoesNotFit when one is missing or twice: `what` is it."""
    table = _table(shards, group, ("document",), documents, restarted)
    seen = np.bincount(table["document"], minlength=len(documents.ok))
    if (wrong := np.flatnonzero(seen != documents.ok)).size:
        doc = int(wrong[0])
        raise DoesNotFit(f"document {doc}: {what} {'is missing' if not seen[doc] else 'was recorded more than once'}")
    return Pieces(table["document"], np.ones_like(table["document"]), table["shard"], table["row"])


def check_tiling(docs: np.ndarray, firsts: np.ndarray, counts: np.ndarray, documents: Documents) -> None:
    """The pieces (sorted by document and first token) must cover tokens 0..n-1 of every document once, and no more.

    DoesNotFit names the first document and token where they do not.
    """
    same = docs[1:] == docs[:-1]
    expected = np.zeros_like(firsts)
    expected[1:] = np.where(same, firsts[:-1] + counts[:-1], 0)
    _complain(docs, firsts, expected)
    ends = np.zeros(len(documents.tokens), np.int64)
    np.maximum.at(ends, docs, firsts + counts)
    if (wrong := np.flatnonzero(ends != documents.tokens)).size:
        doc = int(wrong[0])
        have, want = int(ends[doc]), int(documents.tokens[doc])
        what = f"token {have} is missing" if have < want else f"token {want} was recorded, which it does not have"
        raise DoesNotFit(f"document {doc}: {what} (it has {want} tokens)")


def _complain(docs: np.ndarray, firsts: np.ndarray, expected: np.ndarray) -> None:
    if (wrong := np.flatnonzero(firsts != expected)).size:
        at = int(wrong[0])
        if firsts[at] > expected[at]:
            raise DoesNotFit(f"document {docs[at]}: token {expected[at]} is missing (the next has number {firsts[at]})")
        raise DoesNotFit(f"document {docs[at]}: token {firsts[at]} was recorded more than once")
