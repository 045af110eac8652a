"""How far a run is: from its files alone, before, during and after it, whoever may be writing to them."""

from __future__ import annotations

import fcntl
import struct
import time
from pathlib import Path
from typing import Any

from rwkvmpi.errors import UserError
from rwkvmpi.store.commits import Commit
from rwkvmpi.store.files import read_json
from rwkvmpi.store.lock import BEAT_SECONDS, RunLock
from rwkvmpi.store.results_file import open_results
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.shard_file import ShardFile

_FLOCK = "@hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid
_TRIES = 5
MAX_FAILURES = 10


def status(path: str | Path) -> dict[str, Any]:
    """The state of a run, as plain values.

    state: "not started", "running", "stopped" (resumable), "crashed" (its process died without saying so; resumable)
    or "finished"; documents_done, documents_failed, documents_total, tokens_done (live while it runs, else as of the
    last commit; None when unknown); commit, commit_age_s; attempt; holder; failures: the first 10 as {document, id,
    error}; progress: what the running job last said about itself (rate, waits, ranks), else None.
    UserError when the path is no run folder.
    """
    run = RunFolder(path)
    if not run.exists:
        what = "there is no such folder" if not run.path.exists() else "holds no run of rwkvmpi"
        raise UserError(f"{run.path}: {what}; give the folder that was named with -o")
    facts: dict[str, Any] = {"run": str(run.path), "state": _state(run), "attempt": _attempt(run)}
    facts.update(dict.fromkeys(("documents_done", "documents_failed", "documents_total", "tokens_done")))
    facts.update(commit=None, commit_age_s=None, holder=run.lock.holder(), failures=[], progress=None)
    if facts["state"] == "finished" and run.results.exists():
        facts.update(_of_results(run))
        return facts
    commit, age = _last_commit(run)
    if commit is not None:
        facts.update(
            documents_done=commit.documents_done,
            documents_failed=commit.documents_failed,
            documents_total=commit.documents_total,
            tokens_done=commit.tokens_done,
            commit=commit.number,
            commit_age_s=age,
            failures=_failures(run, commit),
        )
    if facts["state"] == "running":
        facts["progress"] = live = read_json(run.progress)
        for key in ("documents_done", "documents_failed", "documents_total", "tokens_done"):
            if live is not None and isinstance(live.get(key), int):
                facts[key] = live[key]
    return facts


def _state(run: RunFolder) -> str:
    if run.finished:
        return "finished"
    if _is_locked(run.lock, run.path / "lock"):
        return "running"
    if run.lock.holder() is not None:
        return "crashed"
    return "stopped" if run.commit_paths() or run.results.exists() else "not started"


def _is_locked(lock: RunLock, path: Path) -> bool:
    """Ask the kernel who holds the lock, without taking it; where locks do not reach, believe a recent beat."""
    if lock.held_here():
        return True
    try:
        with open(path, "rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0)
            answer = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
            if answer[0] != fcntl.F_UNLCK:
                return True
    except FileNotFoundError:
        return False
    except OSError:
        pass
    return lock.other_host() and time.time() - lock.last_beat() < 3 * BEAT_SECONDS


def _attempt(run: RunFolder) -> int | None:
    number = (read_json(run.path / "attempt") or {}).get("attempt")
    return number if isinstance(number, int) else None


def _last_commit(run: RunFolder) -> tuple[Commit | None, float | None]:
    """The newest readable commit and its age in seconds; a running job may remove one while it is being read."""
    for _ in range(_TRIES):
        vanished = False
        for path in run.commit_paths():
            try:
                age = max(0.0, time.time() - path.stat().st_mtime)
                return Commit.read(path), age
            except FileNotFoundError:
                vanished = True
            except ValueError:
                vanished = vanished or not path.exists()
        if not vanished:
            break
    return None, None


def _failures(run: RunFolder, commit: Commit) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for ref in commit.shards:
        if not ref.failed or len(found) >= MAX_FAILURES:
            continue
        try:
            with ShardFile(run.shards / ref.name) as file:
                columns = (file.column("documents", "document").tolist(), file.column("documents", "ok").tolist())
                rows = zip(*columns, file.errors(), strict=True)
                found += [{"document": doc, "id": None, "error": error} for doc, ok, error in rows if not ok]
        except UserError:  # replaced by a fuller version meanwhile
            continue
    return sorted(found, key=lambda failure: failure["document"])[:MAX_FAILURES]


def _of_results(run: RunFolder) -> dict[str, Any]:
    with open_results(run.results) as results:
        failed = results.documents["status"].nonzero()[0].tolist()
        rows = [results.documents[index] for index in failed[:MAX_FAILURES]]
        return {
            "documents_done": len(results),
            "documents_failed": len(failed),
            "documents_total": len(results),
            "tokens_done": int(results.documents["tokens"].sum()),
            "failures": [{"document": row.index, "id": row.id, "error": row.error} for row in rows],
        }
