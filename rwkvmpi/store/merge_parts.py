"""Which runs are merged: all parts of one corpus, finished, undamaged, and fit to be joined end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkvmpi.errors import UserError
from rwkvmpi.store.files import read_json, sha256_file
from rwkvmpi.store.parts import Part, most_common, ranges, sibling, why_foreign
from rwkvmpi.store.results_file import Results, open_results

_TOLD = 5  # of many unfinished parts, so many are named


@dataclass(frozen=True)
class Layout:
    """A dataset of a results file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...] | None

    @property
    def row(self) -> tuple[Any, ...]:
        """What must be the same in every part."""
        return (self.dtype.str, *self.shape[1:])


@dataclass(frozen=True)
class Source:
    """A finished part and what its SUCCESS says."""

    part: Part
    content_sha256: str
    results_sha256: str
    failed: int

    @property
    def path(self) -> Path:
        """Its results.h5."""
        return self.part.run.results

    def summary(self) -> dict[str, Any]:
        """What SUCCESS of the whole says of it."""
        return {"shard": list(self.part.shard), "run": str(self.part.run.path), "content_sha256": self.content_sha256}

    def verify(self) -> None:
        """Compare the file with the SHA-256 that was written when the part was done. UserError if it is another."""
        if not self.path.exists():
            raise UserError(f"{self.path}: is missing although the part is finished; {self._way_out}")
        try:
            found = sha256_file(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); {self._way_out}") from error
        if found != self.results_sha256:
            raise UserError(f"{self.path}: its SHA-256 differs from the one in SUCCESS; {self._way_out}")

    def open(self) -> Results:
        """Its results, which must be of what identity.json says. UserError else."""
        identity = self.part.identity or {}
        results = open_results(self.path)
        first, stop, _ = identity.get("documents") or (0, len(results), 0)
        wanted = (identity["task"], identity["model"], " ".join(map(str, identity["tokenizer"])), stop - first)
        found = (results.task, results.model_sha256, results.tokenizer, len(results))
        if found == wanted and results.content_sha256 == self.content_sha256:
            return results
        results.close()
        raise UserError(f"{self.path}: holds other results than the part's identity.json tells of; {self._way_out}")

    def check_digest(self, digest: str) -> None:
        """The digest of the values that were read must be the recorded one. UserError else."""
        if digest != self.content_sha256:
            raise UserError(
                f"{self.path}: its values have digest {digest}, but {self.content_sha256} was recorded; {self._way_out}"
            )

    @property
    def _way_out(self) -> str:
        return f"restore it from a copy, or read that part again with --force -o {self.part.run.path}"


def choose_sources(runs: Sequence[Part], out: Path) -> list[Source]:
    """The runs in the order of their documents, if they are all parts of one corpus and each is finished.

    A run of the whole that lies among them (`out` of an earlier merge) is no part. UserError names what is wrong.
    """
    chief = most_common(runs) or next((part for part in runs if part.identity is not None), None)
    if chief is None:
        why = why_foreign(runs[0], runs[0]) if runs else "there is no part besides the run folder of -o"
        raise UserError(f"{runs[0].run.path if runs else out}: {why}")
    here = out.resolve()
    by_number: dict[int, Part] = {}
    for part in runs:
        if part.is_whole_of(chief):
            continue
        if part.run.path.resolve() == here:
            if part.identity is None:  # a merge that was killed when it had just begun
                continue
            raise UserError(f"-o {out}: is one of the runs to be merged; give the whole a folder of its own")
        if not part.belongs_to(chief):
            raise UserError(f"{part.run.path}: {why_foreign(chief, part)}")
        other = by_number.setdefault(part.shard[0], part)
        if other is not part:
            what = f"are both part {part.shard[0]} of {part.shard[1]}" if part.of_a_corpus else "are no parts (--shard)"
            raise UserError(f"{other.run.path} and {part.run.path}: {what}; give one of them")
    _check_all_there(chief, by_number)
    parts = [by_number[number] for number in sorted(by_number)]
    _check_joints(parts)
    return [_source(part) for part in parts]


def layouts(sources: Sequence[Source]) -> dict[str, Layout]:
    """Every dataset of the whole: path -> its layout, with the rows of all parts. UserError where parts do not fit."""
    whole: dict[str, Layout] = {}
    for source in sources:
        with source.open() as results:
            found = {path: Layout(shape, *results.layout(path)) for path, shape in results.shapes().items()}
        if not whole:
            whole = found
            continue
        rows = {path: layout.row for path, layout in found.items()}
        if rows != {path: layout.row for path, layout in whole.items()}:
            raise UserError(
                f"{source.path}: has other datasets than {sources[0].path}; read one of these parts again with the "
                "same version of rwkvmpi as the other"
            )
        for path, layout in found.items():
            before = whole[path]
            shape = (before.shape[0] + layout.shape[0], *before.shape[1:])
            whole[path] = Layout(shape, before.dtype, before.chunks or layout.chunks)
    return whole


def _check_all_there(chief: Part, by_number: dict[int, Part]) -> None:
    total = chief.shard[1]
    if missing := [number for number in range(1, total + 1) if number not in by_number]:
        first, many = missing[0], len(missing) > 1
        raise UserError(
            f"{'parts' if many else 'part'} {ranges(missing)} of {total} {'are' if many else 'is'} missing; read "
            f"{'them' if many else 'it'} (--shard {first}/{total} -o {sibling(chief, first)}) or name "
            f"{'their folders' if many else 'its folder'}, then merge again"
        )
    if unfinished := [part for part in by_number.values() if not part.run.finished]:
        names = ", ".join(f"{part.run.path} (part {part.shard[0]} of {total})" for part in unfinished[:_TOLD])
        more = f" and {len(unfinished) - _TOLD} more" if len(unfinished) > _TOLD else ""
        raise UserError(
            f"{names}{more}: not finished; the command line that began it goes on with it (`rwkvmpi status "
            f"{unfinished[0].run.path}` says how far it is), then merge again"
        )


def _check_joints(parts: Sequence[Part]) -> None:
    """The parts were cut from the same documents at the same places: each begins where the one before it ends."""
    if not parts[0].of_a_corpus:
        return
    cuts = [part.identity["documents"] for part in parts if part.identity is not None]
    end, before, total = 0, parts[0], cuts[0][2]
    for part, (first, stop, of) in zip(parts, cuts, strict=True):
        if (first, of) != (end, total):
            raise UserError(
                f"{part.run.path}: begins after {first:,} of {of:,} documents, but {before.run.path} ends after "
                f"{end:,} of {total:,}: the input was another one then; read what is wrong of them again with --force"
            )
        end, before = stop, part
    if end != total:
        raise UserError(f"{before.run.path}: is the last part, and ends after {end:,} of {total:,} documents")


def _source(part: Part) -> Source:
    said = read_json(part.run.success) or {}
    match (said.get("content_sha256"), said.get("results_sha256"), said.get("failed")):
        case (str(content), str(file), int(failed)):
            return Source(part, content, file, failed)
    raise UserError(f"{part.run.success}: is damaged; restore it from a copy, or read that part again with --force")
