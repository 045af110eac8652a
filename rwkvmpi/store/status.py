"""How far a run is: from its files alone, before, during and after it, whoever may be writing to them."""

from __future__ import annotations

import fcntl
import struct
import time
import tomllib
from pathlib import Path
from typing import Any

from rwkvmpi.errors import UserError
from rwkvmpi.store.commits import Commit
from rwkvmpi.store.files import read_json
from rwkvmpi.store.last_words import last_words
from rwkvmpi.store.lock import BEAT_SECONDS, RunLock
from rwkvmpi.store.results_file import open_results
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.shard_file import ShardFile

_FLOCK = "@hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid
_TRIES = 5
MAX_FAILURES = 10
_COUNTS = ("documents_done", "documents_failed", "documents_total", "tokens_done")
_FACTS: dict[str, Any] = {
    **dict.fromkeys(("task", "shard", "grid", *_COUNTS, "rate_now", "rate_now_age_s", "rate_average", "seconds_left")),
    **dict.fromkeys(("commit", "commit_age_s", "commit_every_s", "holder", "holder_silent_s", "slurm_job")),
    **dict.fromkeys(("progress", "progress_age_s", "ranks", "finished_age_s")),
}


def status(path: str | Path, details: bool = True) -> dict[str, Any]:
    """The state of a run, as plain values. `details` False leaves out what opens many files: failures, words, ranks.

    state: "not started", "running", "stopped" (resumable), "crashed" (its process died without saying so; resumable)
    or "finished"; task; shard ("3/16"); grid [stages, ring, replicas]; attempt; finished_age_s;
    documents_done, documents_failed, documents_total, tokens_done (live while it runs, else as of the last commit; None
    when unknown); rate_now: tokens/s by the ranks' last samples, of which the oldest is rate_now_age_s old;
    rate_average: of the last start; seconds_left;
    commit, commit_age_s, commit_every_s (between the last two of this start); holder (in words), holder_silent_s (since
    its last sign of life), slurm_job; failures: the first 10 as {document, id, error};
    progress: what the job last said about itself in this start, progress_age_s ago, else None;
    words: why it stopped, see last_words; ranks: what the ranks' files say, see ranks_in_files.
    UserError when the path is no run folder.
    """
    run = RunFolder(path)
    if not holds_a_run(run):
        what = "there is no such folder" if not run.path.exists() else "holds no run of rwkvmpi"
        raise UserError(f"{run.path}: {what}; give the folder that was named with -o")
    facts: dict[str, Any] = {"run": str(run.path), "state": _state(run), "attempt": _attempt(run), **_FACTS}
    facts.update(failures=[], words=[], holder=run.lock.holder(), **_of_job(run))
    if facts["state"] == "finished" and run.results.exists():
        facts.update(_of_results(run))
        return facts
    _add_commit(facts, run, details)
    facts["progress"], facts["progress_age_s"] = _last_progress(run, facts["attempt"])
    live = facts["progress"] or {}
    holder = read_json(run.path / "lock.json") or {}
    facts["slurm_job"] = str(holder.get("job_id") or live.get("slurm_job") or "") or None
    facts["rate_average"] = _number(live.get("tokens_per_second"))
    if facts["state"] == "running":
        facts.update({key: live[key] for key in _COUNTS if isinstance(live.get(key), int)})
        facts["holder_silent_s"] = max(0.0, time.time() - beat) if (beat := run.lock.last_beat()) else None
        left = _number(live.get("seconds_left"))
        facts["seconds_left"] = max(0.0, left - facts["progress_age_s"]) if left is not None else None
    elif details:
        facts["words"] = last_words(run.logs, _begun(run))
    if details and facts["state"] in ("running", "crashed"):
        facts["ranks"] = ranks_in_files(run, facts["attempt"])
        if facts["state"] == "running" and facts["ranks"] is not None:
            facts["rate_now"], facts["rate_now_age_s"] = (facts["ranks"][key] for key in ("tokens_per_second", "age_s"))
    return facts


def holds_a_run(run: RunFolder) -> bool:
    """Whether a run has ever been started there. UserError where this user may not look."""
    try:
        return run.exists
    except OSError as error:
        raise UserError(
            f"{run.path}: cannot be looked into ({error.strerror}); ask its owner for permission"
        ) from error


def ranks_in_files(run: RunFolder, attempt: int | None) -> dict[str, Any] | None:
    """What the files of the ranks' telemetry say of this start of the job; None where there are none.

    ranks: how many there are; known: of how many there is a file, of which the oldest is age_s and the newest
    newest_age_s old; ended: how many have read everything; silent:
    [{rank, host, age_s, log}], whose file is old, the oldest first; slowest, most_waiting: {rank, host, ...}; stalls:
    sentences; tokens_per_second: of the job, None where a rank is silent. Ages are by the ranks' own clocks.
    """
    from rwkvmpi.cluster.logs import log_path
    from rwkvmpi.telemetry import files, ranks

    samples = files.read_samples(run.path)
    found = ranks.ranks_of(samples.values(), attempt)
    if not found:
        return None
    now = time.time()
    ages = {number: max(0.0, now - rank.time) for number, rank in found.items()}
    size = max(sample["ranks"] for number, sample in samples.items() if number in found)
    limit = ranks.silence_limit("files", size)
    silent = [found[number] for number in ranks.silent_ranks(found, ages, limit)]
    slow, waiting = ranks.slowest(found), ranks.most_waiting(found)
    return {
        "ranks": size,
        "known": len(found),
        "ended": sum(rank.over for rank in found.values()),
        "age_s": max(ages.values()),
        "newest_age_s": min(ages.values()),
        "silent": [
            {"rank": r.rank, "host": r.host, "age_s": ages[r.rank], "log": str(log_path(run.path, r.rank))}
            for r in silent
        ],
        "slowest": slow and {"rank": slow.rank, "host": slow.host, "tokens_per_second": slow.rate},
        "most_waiting": waiting and {"rank": waiting.rank, "host": waiting.host, "waited_s": waiting.waited},
        "stalls": ranks.stalls(found, ages, limit),
        "tokens_per_second": None if silent or len(found) < size else ranks.rate_of_all(found),
    }


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


def _begun(run: RunFolder) -> float:
    """When the last start of the job counted itself, by the file system's clock; 0.0: unknown."""
    return _changed(run.path / "attempt") or 0.0


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _of_job(run: RunFolder) -> dict[str, Any]:
    """What job.toml says of the task, the shard and the grid, as the last start of the job wrote it."""
    try:
        job = tomllib.loads(run.job_toml.read_text(encoding="utf-8"))
        grid = [job["grid"][key] for key in ("stages", "ring", "replicas")]
        sound = all(type(value) is int and value > 0 for value in grid)
        name, shard = job["task"]["name"], job["input"].get("shard")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {"task": str(name), "shard": str(shard) if shard else None, "grid": grid if sound else None}


def _last_progress(run: RunFolder, attempt: int | None) -> tuple[dict[str, Any] | None, float | None]:
    """What the job said about itself in its last start, and how many seconds ago; what an earlier start said is None:
    it may have read more than it committed."""
    changed = _changed(run.progress)
    live = read_json(run.progress)
    if live is None or changed is None or changed < _begun(run) or live.get("attempt", attempt) != attempt:
        return None, None
    return live, max(0.0, time.time() - changed)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _add_commit(facts: dict[str, Any], run: RunFolder, details: bool) -> None:
    commit, changed, every = _last_commit(run)
    if commit is None or changed is None:
        return
    facts.update(
        documents_done=commit.documents_done,
        documents_failed=commit.documents_failed,
        documents_total=commit.documents_total,
        tokens_done=commit.tokens_done,
        commit=commit.number,
        commit_age_s=max(0.0, time.time() - changed),
        commit_every_s=every,
    )
    if details:
        facts["failures"] = _failures(run, commit)


def _last_commit(run: RunFolder) -> tuple[Commit | None, float | None, float | None]:
    """The newest readable commit, when it was written, and the seconds since the one before it where the same start of
    the job wrote both; a running job may remove one while it is being read."""
    for _ in range(_TRIES):
        vanished = False
        paths = run.commit_paths()
        for number, path in enumerate(paths):
            try:
                changed, commit = path.stat().st_mtime, Commit.read(path)
            except FileNotFoundError:
                vanished = True
            except ValueError:
                vanished = vanished or not path.exists()
            else:
                return commit, changed, _since_last(paths[number + 1 :], commit, changed)
        if not vanished:
            break
    return None, None, None


def _since_last(paths: list[Path], commit: Commit, changed: float) -> float | None:
    try:
        before = Commit.read(paths[0])
        return max(0.0, changed - paths[0].stat().st_mtime) if before.attempt == commit.attempt else None
    except (IndexError, OSError, ValueError):
        return None


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
    figures = (read_json(run.success) or {}).get("figures")
    ended = _changed(run.success)
    with open_results(run.results) as results:
        failed = results.documents["status"].nonzero()[0].tolist()
        rows = [results.documents[index] for index in failed[:MAX_FAILURES]]
        return {
            "documents_done": len(results),
            "documents_failed": len(failed),
            "documents_total": len(results),
            "tokens_done": int(results.documents["tokens"].sum()),
            "rate_average": _number(figures.get("tokens_per_second")) if isinstance(figures, dict) else None,
            "finished_age_s": max(0.0, time.time() - ended) if ended is not None else None,
            "failures": [{"document": row.index, "id": row.id, "error": row.error} for row in rows],
        }
