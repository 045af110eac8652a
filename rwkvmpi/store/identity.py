"""RUN/identity.json: the settings and fingerprints that decide what a run's results are, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkvmpi.corpus.index import compare_fingerprints
from rwkvmpi.errors import UserError
from rwkvmpi.store.files import dump_json, read_json, write_durably
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.telemetry.trace import trace_folder

# What tells the parts of one corpus apart: number and count of parts; its first document, the one after its last, and
# how many the whole has. Both are null in a run that reads everything.
OF_A_PART = ("shard", "documents")
_NAMES = {
    "model": "model (its SHA-256)",
    "from": "--from (the digest of its results)",
    "shard": "--shard",
    "documents": "documents (first, end, all)",
}


def identity_path(run: RunFolder) -> Path:
    """Where it lies."""
    return run.path / "identity.json"


def read_identity(run: RunFolder) -> dict[str, Any] | None:
    """What was written, or None: nothing, or nothing that can be read."""
    return read_json(identity_path(run))


def write_identity(run: RunFolder, identity: Mapping[str, Any]) -> None:
    """Write it durably. UserError when the system refuses."""
    write_durably(identity_path(run), dump_json(dict(identity)))


def sha256_of(identity: Mapping[str, Any]) -> str:
    """The identity in one number."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def of_the_whole(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a run that reads all of which this one reads a part."""
    return {**identity, **dict.fromkeys(OF_A_PART)}


def difference(old: Mapping[str, Any], new: Mapping[str, Any], turn: str) -> str | None:
    """The first thing in which the new one differs, as words for after "was started with"; None: they agree.

    turn: what stands between the old value and the new one. A setting that one of them does not know is null there.
    """
    for key, value in new.items():
        before = old.get(key)
        if key == "input":
            said = compare_fingerprints(before or [], value)
            if said is not None:
                return f"other input: {said}"
        elif before != value:
            if key == "shard":
                before, value = ("/".join(map(str, shard)) if shard else "everything" for shard in (before, value))
            return f"{_NAMES.get(key, key)} = {before}, {turn} {value}"
    return None


def check_identity(run: RunFolder, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with a job whose results would be others than those that lie in the run folder."""
    old = read_identity(run)
    if old is None:
        return  # killed before anything was computed
    if said := difference(old, identity, "now it is"):
        raise UserError(
            f"{run.path}: this run was started with {said}; give another run folder, or --force to throw away what "
            f"{run.path} holds"
        )


def clear(run: RunFolder) -> None:
    """--force: remove results, commits, shards and trace of the job that was here before; the lock is held."""
    paths = [run.success, run.results, identity_path(run), run.job_toml, *run.commit_paths(), *run.shard_paths()]
    trace = trace_folder(run.path)
    for path in [*paths, *trace.glob("*.events"), *trace.glob("*.json")]:
        path.unlink(missing_ok=True)
