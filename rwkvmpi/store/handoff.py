"""Going on from the final states of a finished `read` run: `--from RUN`.

The earlier run's results.h5 has everything: each document's state, the output after its last token, how many bytes and
tokens were read and the SHA-256 of those bytes. Rank 0 checks the file once and finds the documents that both runs
have, by id; every rank then loads the states that its layers need, from the rows of the file. That a document's text
still begins with what was read is for the feeder to check, which reads it anyway.

What comes after the join is tokenised on its own: where a token of one reading would span the join (any tokenizer but
bytes), the tokens differ from those of one reading, and so do the results. With the same tokens they have the same bits
on CPUs. On GPUs kernels work on tiles of rows that begin at the join, and the last bits may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np

from rwkvmpi.corpus.index import DocumentRef
from rwkvmpi.errors import UserError
from rwkvmpi.store.inspect import check_results
from rwkvmpi.store.results_file import BEFORE, STATUS, Results, open_results, printable
from rwkvmpi.store.run_folder import RunFolder

_ROWS = 8192
_FROM_START = -1


@dataclass
class Handoff:
    """What rank 0 knows about the documents that go on; each array int64 [documents of the new run].

    rows: their rows in the earlier results, -1 for those that are read from their start; bytes_before, tokens_before:
    what was read of them, 0 for the others. failed: documents that failed in the earlier run.
    """

    results: Results
    rows: np.ndarray
    bytes_before: np.ndarray
    tokens_before: np.ndarray
    failed: int

    @property
    def content_sha256(self) -> str:
        """What the earlier results are; part of the new run's identity."""
        return self.results.content_sha256

    def reference(self, ref: DocumentRef) -> DocumentRef:
        """The document with what its text must begin with."""
        row = int(self.rows[ref.index])
        if row == _FROM_START:
            return ref
        sha256 = self.results.read("states/text_sha256", row, row + 1)[0].tobytes().hex()
        return replace(ref, handed_bytes=int(self.bytes_before[ref.index]), handed_sha256=sha256)

    def bytes_left(self, nbytes: np.ndarray) -> np.ndarray:
        """Of documents of `nbytes`, what is to be read: int64 [documents]."""
        return np.maximum(nbytes - self.bytes_before, 0)

    def summary(self, everything: bool = True) -> str:
        """One sentence on what goes on and what does not. everything: the run reads its whole input, not a part."""
        known = int(np.count_nonzero(self.rows != _FROM_START))
        absent = len(self.results) - known - self.failed
        said = f"{known:,} of {len(self.rows):,} documents go on from {self.results.path.parent}"
        said += f", where {int(self.tokens_before.sum()):,} tokens of them were read"
        if known < len(self.rows):
            said += f"; read from their start: {len(self.rows) - known:,}"
        if self.failed:
            said += f", {self.failed:,} of which failed there"
        if absent and everything:
            said += f"; not in this input: {absent:,} that it has read"
        return said

    def share(self) -> dict[str, Any]:
        """What HandedStates needs, for a message."""
        return {"path": str(self.results.path), "content_sha256": self.content_sha256, "rows": self.rows}


@dataclass
class HandedStates:
    """The states and last outputs of documents that go on, read from the earlier results as they are asked for."""

    path: Path
    content_sha256: str
    rows: np.ndarray
    _results: Results | None = field(default=None, repr=False)

    @classmethod
    def from_share(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of Handoff.share."""
        return cls(Path(value["path"]), value["content_sha256"], value["rows"])

    def load_state(self, doc: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(wkv float32 [...], shift float32 [2, C]) of one layer where the document was left. UserError when the file
        is damaged, or not the one that rank 0 has checked."""
        return self._open().layer_state(int(self.rows[doc]), layer)

    def load_last(self, doc: int) -> np.ndarray:
        """float32 [C]: the output after ln_out where the document was left. Errors as above."""
        return self._open().last_output(int(self.rows[doc]))

    def _open(self) -> Results:
        if self._results is None:
            results = open_results(self.path)
            if results.content_sha256 != self.content_sha256:
                results.close()
                raise UserError(
                    f"{self.path}: is another file than rank 0 has checked; leave it alone while a job reads it"
                )
            self._results = results
        return self._results


def take_over(
    earlier: str,
    folder: Path,
    *,
    model_sha256: str,
    tokenizer: str,
    settings: Mapping[str, str],
    state_shape: tuple[int, ...],
    shift_shape: tuple[int, ...],
    count: int,
    id_of: Callable[[int], str],
) -> Handoff:
    """Check the run folder `earlier`, and find its documents among the `count` of the new run in `folder`.

    tokenizer: as results.h5 has it; settings: device and dtype, which decide what the bits are; state_shape,
    shift_shape: of all layers of one document. UserError, which says what to do, unless it is a finished `read` run
    with the same model, tokenizer and settings, and every value in it is the one that was written.
    """
    where = f"--from {earlier}"
    results = _open_finished(earlier, folder, where)
    try:
        _check_same(results, where, model_sha256, tokenizer, settings)
        if faults := check_results(results.path):
            raise UserError(f"{where}: {faults[0]}")
        shapes = results.shapes()
        for name, wanted in (("wkv", state_shape), ("shift", shift_shape), ("last", shift_shape[-1:])):
            if shapes[f"states/{name}"][1:] != wanted:
                raise UserError(f"{where}: states/{name} has shape {list(shapes[f'states/{name}'])}, the model another")
        return _matched(results, count, id_of)
    except BaseException:
        results.close()
        raise


def _open_finished(earlier: str, folder: Path, where: str) -> Results:
    run = RunFolder(Path(earlier).resolve())
    if run.path == folder.resolve():
        raise UserError(f"{where}: is the run folder of -o too; results go into a folder of their own")
    if not run.exists:
        raise UserError(f"{where}: holds no run of rwkvmpi; give the folder that `rwkvmpi read` was given with -o")
    if not run.finished:
        raise UserError(
            f"{where}: this run is not finished, and only a finished one can be gone on from; start its own command "
            f"again to finish it (`rwkvmpi status {earlier}` says how far it is)"
        )
    results = open_results(run.path)
    if results.task != "read":
        what = f"{where}: holds results of the task {results.task}, which keeps no states; give a run of `rwkvmpi read`"
    elif not all(results.has(f"states/{name}") for name in ("last", "text_sha256")):
        what = f"{where}: was written by a version that kept too little to go on from; read the documents anew"
    else:
        return results
    results.close()
    raise UserError(what)


def _check_same(results: Results, where: str, model_sha256: str, tokenizer: str, settings: Mapping[str, str]) -> None:
    if results.model_sha256 != model_sha256:
        raise UserError(
            f"{where}: was read with the model whose SHA-256 is {results.model_sha256}, and this one has "
            f"{model_sha256}; a state is of use to the very same model file only: give that one"
        )
    if results.tokenizer != tokenizer:
        raise UserError(
            f"{where}: was read with the tokenizer {results.tokenizer}, and this job has {tokenizer}; give the same "
            "one with --tokenizer"
        )
    section = results.job.get("model")
    for name, value in settings.items():
        before = section.get(name) if isinstance(section, dict) else None
        if before != value:
            raise UserError(
                f"{where}: was read with {name} = {before}, and this job has {value}: the results would not be the "
                f"bits of one reading; give --{name} {before}, or read the documents anew without --from"
            )


def _matched(results: Results, count: int, id_of: Callable[[int], str]) -> Handoff:
    status = results.read("documents/status", 0, len(results))
    rows = _rows_of(results, count, id_of)
    known = rows != _FROM_START
    failed = np.zeros(count, dtype=bool)
    failed[known] = status[rows[known]] != STATUS["ok"]
    rows[failed] = _FROM_START
    known &= ~failed
    before = []
    for own, earlier in zip(("bytes", "tokens"), BEFORE, strict=True):
        total = results.read(f"documents/{own}", 0, len(results))
        if results.has(f"documents/{earlier}"):
            total = total + results.read(f"documents/{earlier}", 0, len(results))
        before.append(np.where(known, total[rows], 0) if len(results) else np.zeros(count, np.int64))
    return Handoff(results, rows, before[0], before[1], int(failed.sum()))


def _rows_of(results: Results, count: int, id_of: Callable[[int], str]) -> np.ndarray:
    """int64 [count]: the row of the document with the same id, or -1. By 128-bit hashes: ids may be long and many."""
    old = np.zeros((len(results), 2), np.uint64)
    for low in range(0, len(results), _ROWS):
        ids = results.read("documents/id", low, min(low + _ROWS, len(results)))
        old[low : low + len(ids)] = [_hash(name) for name in ids]
    new = np.zeros((count, 2), np.uint64)
    for doc in range(count):
        new[doc] = _hash(printable(id_of(doc)))
    if not len(results):
        return np.full(count, _FROM_START, np.int64)
    order = np.argsort(old[:, 0], kind="stable")
    places = order[np.minimum(np.searchsorted(old[order, 0], new[:, 0]), len(order) - 1)]
    return np.where((old[places] == new).all(axis=1), places, _FROM_START).astype(np.int64)


def _hash(name: str) -> tuple[int, int]:
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
