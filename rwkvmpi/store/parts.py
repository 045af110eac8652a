"""The runs of a job array over one corpus: which parts there are, how far each is, and which are missing."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rwkvmpi.errors import UserError
from rwkvmpi.store.identity import difference, of_the_whole, read_identity, sha256_of
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.status import status

TOTALS = ("documents_done", "documents_failed", "documents_total", "tokens_done")
WELL = ("finished", "running")
PLANNER = "--stages 0 --ring 0 --replicas 0 --threads 0"  # job.toml has the grid of the last start; any other will do


@dataclass(frozen=True)
class Part:
    """A run folder and what its identity.json says, without the list of its input files, which may be long: None when
    it says nothing yet. corpus: equal for runs that differ in nothing but in which part of the documents they read."""

    run: RunFolder
    identity: dict[str, Any] | None
    corpus: str

    @classmethod
    def of(cls, run: RunFolder) -> Self:
        """Look at a run folder."""
        identity = read_identity(run) or {}
        match identity:
            case {"task": str(), "model": str(), "tokenizer": [*_], "shard": [int(), int()], "documents": documents}:
                known = [type(number) for number in documents] == [int] * 3 if isinstance(documents, list) else False
            case {"task": str(), "model": str(), "tokenizer": [*_]}:
                known = not identity.get("shard")
            case _:
                known = False
        if not known:
            return cls(run, None, "")
        corpus = sha256_of(of_the_whole(identity))
        return cls(run, {key: value for key, value in identity.items() if key != "input"}, corpus)

    @property
    def shard(self) -> tuple[int, int]:
        """Its number, from 1, and how many parts there are; a run that reads everything is part 1 of 1."""
        number, parts = (self.identity or {}).get("shard") or (1, 1)
        return number, parts

    @property
    def of_a_corpus(self) -> bool:
        """Whether it was started with --shard."""
        return bool((self.identity or {}).get("shard"))

    def belongs_to(self, other: Part) -> bool:
        """Whether both are parts of the same cut of the same corpus."""
        return self.identity is not None and (self.corpus, self.shard[1]) == (other.corpus, other.shard[1])

    def is_whole_of(self, other: Part) -> bool:
        """Whether this run reads everything of which the other one reads a part."""
        return self.corpus == other.corpus and not self.of_a_corpus and other.of_a_corpus


def find_runs(paths: Iterable[str | Path], but: Path | None = None) -> list[Part]:
    """The runs at `paths`: run folders, and folders that hold some, which are looked through one level deep. Each once,
    in their order; those in such a folder sorted by name, without `but`. UserError when a path holds none."""
    found: dict[Path, RunFolder] = {}
    for path in map(Path, paths):
        if RunFolder(path).exists:
            found.setdefault(path.resolve(), RunFolder(path))
            continue
        try:
            inside = [entry for entry in sorted(path.iterdir()) if RunFolder(entry).exists]
            what = "holds no run of rwkvmpi"
        except OSError as error:
            inside, what = [], error.strerror or str(error)
        if not inside:
            raise UserError(f"{path}: {what}; give run folders, or one folder that holds them")
        for entry in inside:
            if but is None or entry.resolve() != but.resolve():
                found.setdefault(entry.resolve(), RunFolder(entry))
    return [Part.of(run) for run in found.values()]


def parts_status(paths: Sequence[str | Path]) -> dict[str, Any]:
    """How far several runs are, as plain values. paths: run folders, or folders that hold them.

    parts_total: n of --shard i/n, None when no run was started with it. state: "finished" when every part is, else
    "running" when one is, else "unfinished". counts: state -> number of parts, those of `missing` included. parts: one
    each, sorted: {shard: [i, n] or None, run, state, attempt, documents_done, documents_failed, documents_total,
    tokens_done, error: why its state cannot be told ("damaged"), status: what store.status says}. missing: numbers of
    which there is no run. array: the numbers that are neither finished nor running, as `sbatch --array` takes them;
    again: the same parts, {shard, run, state, command}, where the command reads that part alone. merged: the run of the
    whole corpus, as merge writes it, {run, state}, or None. others: runs that do not belong to these, {run, why}.
    totals: sums over the parts, None where no part knows. UserError when there is no run at the paths.
    """
    runs = find_runs(paths)
    chief = most_common(runs)
    shown, others, merged = [], [], None
    for part in runs:
        if chief is None or part.belongs_to(chief):
            shown.append(part)
        elif part.is_whole_of(chief):
            merged = {"run": str(part.run.path), "state": _status(part.run)["state"]}
        else:
            others.append({"run": str(part.run.path), "why": why_foreign(chief, part)})
    total = chief.shard[1] if chief is not None else None
    rows = sorted((_row(part) for part in shown), key=lambda row: (row["shard"] or [0, 0], row["run"]))
    have = {row["shard"][0] for row in rows if row["shard"]}
    missing = [number for number in range(1, (total or 0) + 1) if number not in have]
    counts = Counter(row["state"] for row in rows)
    if missing:
        counts["missing"] = len(missing)
    again = [_again(row["run"], row) for row in rows if row["state"] not in WELL]
    if chief is not None:
        for number in missing:
            row = {"shard": [number, total], "state": "missing"}
            again.append(_again(sibling(chief, number), row, chief))
    return {
        "paths": [str(path) for path in paths],
        "parts_total": total,
        "state": "finished" if set(counts) <= {"finished"} else "running" if counts["running"] else "unfinished",
        "counts": dict(counts),
        "parts": rows,
        "missing": missing,
        "array": ranges(row["shard"][0] for row in again if row["shard"]),
        "again": again,
        "merged": merged,
        "others": others,
        "totals": {key: _sum(row[key] for row in rows) for key in TOTALS},
    }


def most_common(runs: Sequence[Part]) -> Part | None:
    """The first part of the corpus of which most parts are there; None when no run is a part of one."""
    parts = [part for part in runs if part.of_a_corpus]
    counts = Counter((part.corpus, part.shard[1]) for part in parts)
    return max(parts, key=lambda part: counts[part.corpus, part.shard[1]], default=None)


def why_foreign(chief: Part, part: Part) -> str:
    """Why a run is no part of the corpus that `chief` is a part of, in words."""
    if part.identity is None:
        return "has not come so far as to say what it reads; start its own command again"
    if not part.of_a_corpus and chief.shard[1] > 1:
        return f"was not started with --shard, and {chief.run.path} was"
    if part.shard[1] != chief.shard[1]:
        return f"is one of {part.shard[1]} parts, but {chief.run.path} is one of {chief.shard[1]}"
    old, new = (of_the_whole(read_identity(run) or {}) for run in (chief.run, part.run))
    said = difference(old, new, "and this one with")
    return f"does not belong to {chief.run.path}, which was started with {said}"


def sibling(part: Part, number: int) -> str:
    """Where part `number` of the same corpus probably lies or shall lie: the same name with another number, if the
    name has one."""
    name = part.run.path.name
    for found in re.finditer(r"\d+", name):
        if int(found[0]) == part.shard[0]:
            name = f"{name[: found.start()]}{number:0{len(found[0])}}{name[found.end() :]}"
            return str(part.run.path.with_name(name))
    return str(part.run.path.with_name(f"{name}-part-{number}"))


def ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 -> "1-3,7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _row(part: Part) -> dict[str, Any]:
    facts = _status(part.run)
    return {
        "shard": list(part.shard) if part.of_a_corpus else None,
        "run": str(part.run.path),
        "state": facts["state"],
        "attempt": facts.get("attempt"),
        **{key: facts.get(key) for key in TOTALS},
        "error": facts.get("error"),
        "status": facts,
    }


def _status(run: RunFolder) -> dict[str, Any]:
    try:
        facts = status(run.path, details=False)
        return facts if facts["state"] in WELL else status(run.path)
    except UserError as error:  # one damaged part must not hide the others
        return {"state": "damaged", "error": str(error)}


def _again(run: str, row: dict[str, Any], like: Part | None = None) -> dict[str, Any]:
    """What reads one part alone: from its own job.toml, or from that of another part `like` it."""
    job = (like.run if like is not None else RunFolder(run)).job_toml
    shard = row["shard"]
    option = f" --shard {shard[0]}/{shard[1]}" if like is not None else ""
    force = " --force" if row["state"] == "damaged" else ""
    command = f"rwkvmpi run {shlex.quote(str(job))}{option} -o {shlex.quote(run)}{force} {PLANNER}"
    known = job.exists()
    return {"shard": shard, "run": run, "state": row["state"], "command": command if known else None}


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
