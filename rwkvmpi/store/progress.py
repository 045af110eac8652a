"""What a commit says about every document: done, in flight with its saved states, or not begun."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from rwkvmpi.errors import UserError
from rwkvmpi.store.commits import Commit, InFlight
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.shard_file import ShardFile, ShardRef


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens first_token .. first_token + count - 1 of a document, in rows start.. of a shard's /tokens."""

    doc: int
    first_token: int
    count: int
    shard: str
    start: int


@dataclass
class SavedStates:
    """Where the saved states of documents in flight lie; small, and can be sent to every rank with `to_json`.

    layers: document -> layer -> (shard, row); carries: document -> (shard, first byte, end).
    """

    folder: Path
    layers: dict[int, dict[int, tuple[str, int]]] = field(default_factory=dict)
    carries: dict[int, tuple[str, int, int]] = field(default_factory=dict)

    def load_state(self, doc: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(wkv float32 [...], shift float32 [2, C]) of one layer at the document's position in flight.

        UserError when it was not saved, or is damaged.
        """
        if layer not in self.layers.get(doc, {}):
            raise self._missing(doc, f"state of layer {layer}")
        shard, row = self.layers[doc][layer]
        with ShardFile(self.folder / shard) as file:
            return file.rows("inflight", "wkv", row, row + 1)[0], file.rows("inflight", "shift", row, row + 1)[0]

    def load_carry(self, doc: int) -> np.ndarray:
        """What the task carries into the document's position: uint8 [n]. UserError when it was not saved."""
        if doc not in self.carries:
            raise self._missing(doc, "carry of the task")
        shard, start, end = self.carries[doc]
        with ShardFile(self.folder / shard) as file:
            return file.rows("carry", "data", start, end)

    def shards_of(self, docs: Iterable[int]) -> set[str]:
        """The names of all state shards that hold something of these documents."""
        names = set()
        for doc in docs:
            names |= {shard for shard, _ in self.layers.get(doc, {}).values()}
            if doc in self.carries:
                names.add(self.carries[doc][0])
        return names

    def to_json(self) -> dict[str, Any]:
        """Plain values for a message."""
        layers = [[doc, layer, *place] for doc, places in self.layers.items() for layer, place in places.items()]
        return {"folder": str(self.folder), "layers": layers, "carries": [[d, *p] for d, p in self.carries.items()]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        saved = cls(Path(value["folder"]))
        for doc, layer, shard, row in value["layers"]:
            saved.layers.setdefault(doc, {})[layer] = (shard, row)
        saved.carries = {doc: (shard, start, end) for doc, shard, start, end in value["carries"]}
        return saved

    def _missing(self, doc: int, what: str) -> UserError:
        return UserError(f"{self.folder}: the {what} of document {doc} was not saved; start again in a new run folder")


class Progress:
    """A commit, looked up: which documents are done, which go on from where, which pieces of them exist.

    done: int64 [n] sorted, finished and failed documents. in_flight: those that go on, by document. saved: their
    states. Reading it costs one look into each shard's tables, not into its results.
    """

    def __init__(self, run: RunFolder, commit: Commit) -> None:
        self.commit = commit
        self.in_flight: list[InFlight] = commit.in_flight
        self.saved = SavedStates(run.shards)
        positions = {entry.doc: entry.position for entry in self.in_flight}
        self._pieces: dict[int, list[Piece]] = {doc: [] for doc in positions}
        finished = []
        for ref in commit.shards:
            with ShardFile(run.shards / ref.name) as file:
                if ref.kind == "state":
                    self._find_states(ref, file, positions)
                else:
                    finished.append(file.column("documents", "document"))
                    self._find_pieces(ref, file)
        self.done: np.ndarray = np.sort(np.concatenate([np.zeros(0, np.int64), *finished]))
        self._check(run)

    @property
    def documents_done(self) -> int:
        """Finished documents, those that failed included."""
        return len(self.done)

    @property
    def documents_failed(self) -> int:
        return self.commit.documents_failed

    @property
    def tokens_done(self) -> int:
        """Tokens of finished documents, and those of documents in flight that were read already."""
        return self.commit.tokens_done

    def is_done(self, doc: int) -> bool:
        """Whether a document is finished (or failed)."""
        place = int(np.searchsorted(self.done, doc))
        return place < len(self.done) and int(self.done[place]) == doc

    def pieces(self, doc: int) -> list[Piece]:
        """The pieces that exist of a document in flight, by first token. Reading it from its start again would
        overlap them, unless the next commit says so (Ledger.restart)."""
        return sorted(self._pieces.get(doc, []), key=lambda piece: piece.first_token)

    def load_state(self, doc: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """See SavedStates.load_state."""
        return self.saved.load_state(doc, layer)

    def load_carry(self, doc: int) -> np.ndarray:
        """See SavedStates.load_carry."""
        return self.saved.load_carry(doc)

    def _find_states(self, ref: ShardRef, file: ShardFile, positions: Mapping[int, int]) -> None:
        """States of other positions are left over from another cut; they do not count."""
        docs, at, layers = (file.column("inflight", name).tolist() for name in ("document", "position", "layer"))
        for row, (doc, position, layer) in enumerate(zip(docs, at, layers, strict=True)):
            if positions.get(doc) == position:
                self.saved.layers.setdefault(doc, {})[layer] = (ref.name, row)
        docs, at, ends = (file.column("carry", name).tolist() for name in ("document", "position", "end"))
        for doc, position, start, end in zip(docs, at, [0, *ends], ends, strict=False):
            if positions.get(doc) == position:
                self.saved.carries[doc] = (ref.name, start, end)

    def _find_pieces(self, ref: ShardRef, file: ShardFile) -> None:
        if not self._pieces:
            return
        docs, firsts, counts = (file.column("pieces", name) for name in ("document", "first_token", "count"))
        starts = np.cumsum(counts) - counts
        for row in np.flatnonzero(np.isin(docs, list(self._pieces))).tolist():
            doc = int(docs[row])
            if ref.writer[0] >= self.commit.restarted.get(doc, 0):
                piece = Piece(doc, int(firsts[row]), int(counts[row]), ref.name, int(starts[row]))
                self._pieces[doc].append(piece)

    def _check(self, run: RunFolder) -> None:
        where = f"{run.path}: commit {self.commit.number}"
        way_out = "restore the folder from a copy, or start again in a new one"
        if len(self.done) > 1 and (doubles := self.done[1:][self.done[1:] == self.done[:-1]]).size:
            raise UserError(f"{where} has document {doubles[0]} twice; {way_out}")
        for entry in self.in_flight:
            if self.is_done(entry.doc):
                raise UserError(f"{where} has document {entry.doc} both as done and in flight; {way_out}")
