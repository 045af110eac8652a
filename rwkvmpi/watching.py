"""Following a run from outside: what is known of it at this moment, and whether it has ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rwkvmpi.cluster.logs import duration
from rwkvmpi.cluster.slurm_queue import QueueEntry, SlurmQueue
from rwkvmpi.errors import UserError
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.status import holds_a_run, status
from rwkvmpi.telemetry import client
from rwkvmpi.telemetry.ranks import (
    ENDED,
    Rank,
    amount,
    ranks_of,
    rate_of_all,
    silence_limit,
    silent_ranks,
    stalls,
    whole,
)

FILES_EVERY_S = 1.0  # how often the run folder is looked at for state and commits
RESTART_WITHIN_S = 3.0  # a script that starts a stopped run again does it at once
QUEUED_WITHIN_S = 60.0  # so does a batch script, which may copy results and queue its job again
GONE_FOR_S = 15.0  # a job that Slurm calls ended may be on its way back into the queue
EXIT_FINISHED, EXIT_CRASHED, EXIT_STOPPED = 0, 1, 75
_OF_STATUS = ("task", "shard", "grid", "documents_done", "documents_failed", "documents_total", "tokens_done")


@dataclass(frozen=True)
class Ending:
    """How the run ended: an exit code and a sentence."""

    code: int
    sentence: str


@dataclass(frozen=True)
class Moment:
    """What is known of a run at one moment.

    facts: plain values, see `Watching.look`. ranks, ages: by rank number; ages in seconds, above `limit` a rank is
    silent. samples: as they came. ending: None while the run goes on, or may yet.
    """

    facts: dict[str, Any]
    ranks: Mapping[int, Rank] = field(default_factory=dict)
    ages: Mapping[int, float] = field(default_factory=dict)
    samples: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    limit: float = 0.0
    ending: Ending | None = None

    def to_json(self, order: list[int]) -> dict[str, Any]:
        """One plain object with the samples of these ranks, in this order."""
        rows = [{**self.samples[number], "age_s": round(self.ages.get(number, 0.0), 3)} for number in order]
        for row in rows:
            row.pop("job", None)
        ending = self.ending and {"code": self.ending.code, "sentence": self.ending.sentence}
        return {**self.facts, "ranks": rows, "ended": ending}


class Watching:
    """Follows the run of a folder, which need not exist yet; `close` it at the end, or use it in a with block.

    UserError when it can never hold a run: a file, or a folder with something else in it. `must_exist`: also when no
    run was started in it.
    """

    def __init__(self, path: Path, must_exist: bool = False) -> None:
        self._run = RunFolder(path)
        _check(self._run, must_exist)
        self._once = must_exist
        self._follower = client.follow(path)
        self._queue = SlurmQueue()
        self._status: dict[str, Any] = {"state": "not started", "attempt": None}
        self._looked_at = -1e9
        self._first_attempt: int | None = None
        self._begun = False  # whether it was seen running, or a new start of it
        self._still_since: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._follower.close()

    @property
    def may_know_more_soon(self) -> bool:
        """Whether what is on its way would complete the first moment: Slurm's answer, a running job's samples."""
        return self._queue.asking or (self._status["state"] == "running" and self._follower.way != "network")

    def look(self) -> Moment:
        """The run now. facts: run, time, state, attempt, task, shard, grid, ranks_total, documents_*, tokens_done,
        bytes_done, bytes_total, tokens_per_second, tokens_per_second_average, seconds_left, started, commit,
        commit_age_s, slurm_job, slurm_state, slurm_seconds_left, way and age_s of the ranks' samples, job_age_s of the
        counts, silent (ranks), stalls and words (sentences), note (what is being waited for). None: not known."""
        now = time.monotonic()
        if now - self._looked_at >= FILES_EVERY_S:
            self._looked_at = now
            self._look_at_folder()
        found = self._status
        samples = self._follower.latest()
        ranks = ranks_of(samples.values(), found["attempt"])
        ages = self._follower.ages()
        way = self._follower.way if ranks else "none"
        size = max((samples[number].get("ranks", 1) for number in ranks), default=0)
        limit = silence_limit(way, size)
        running = found["state"] == "running"
        silent = silent_ranks(ranks, ages, limit) if running else []
        job, job_age = self._job(samples if 0 in ranks else {}, ages)
        slurm_job = found.get("slurm_job") or (str(job["slurm_job"]) if job.get("slurm_job") else None)
        entry = self._queue.follow(slurm_job)
        facts = {
            "run": str(self._run.path),
            "time": time.time(),
            "state": found["state"],
            "attempt": found["attempt"],
            "ranks_total": size or whole(job.get("ranks")),
            **{key: found.get(key) for key in _OF_STATUS},
            **_counts(job, job_age, running),
            "tokens_per_second": rate_of_all(ranks, silent) if running else None,
            "tokens_per_second_average": amount(job.get("tokens_per_second")) or found.get("rate_average"),
            "commit": found.get("commit"),
            "commit_age_s": self._commit_age(found),
            "slurm_job": slurm_job,
            "slurm_state": entry.state if entry else None,
            "slurm_seconds_left": _time_granted(job, entry) if running else None,
            "way": way,
            "age_s": min((ages[number] for number in ranks if number in ages), default=None),
            "silent": silent,
            "stalls": stalls(ranks, ages, limit) if running else [],
            "words": [f"rank {w['rank']}: {w['text']} ({w['log']})" for w in found.get("words", [])],
        }
        ending = self._ending(entry, slurm_job)
        facts["note"] = None if ending else self._note(entry, slurm_job, ranks, size)
        return Moment(facts, ranks, ages, {number: samples[number] for number in ranks}, limit, ending)

    def _look_at_folder(self) -> None:
        before = self._status
        try:
            found = status(self._run.path, details=False)
        except UserError:
            if self._run.exists:
                raise
            found = {"state": "not started", "attempt": None}  # not there yet, or no more
        if found["state"] not in ("running", "not started", before["state"]):
            found = status(self._run.path)  # with the last words, once
        elif found["state"] == before["state"] and before.get("words"):
            found["words"] = before["words"]
        found["looked_at"] = time.monotonic()
        attempt = found["attempt"]
        if self._first_attempt is None:
            self._first_attempt = attempt or 0  # those before are none of this watch's business
        self._begun = self._begun or found["state"] == "running" or (attempt or 0) > self._first_attempt
        if found["state"] == "running":
            self._still_since = None
        elif self._still_since is None or attempt != before["attempt"]:
            self._still_since = time.monotonic()
        self._status = found

    def _job(self, samples: Mapping[int, dict[str, Any]], ages: Mapping[int, float]) -> tuple[dict[str, Any], float]:
        """The newest of what rank 0 said of the job, and how many seconds ago: over the network, or in its file."""
        told, told_age = samples.get(0, {}).get("job"), ages.get(0, 0.0)
        written, written_age = self._status.get("progress"), self._status.get("progress_age_s")
        if written is not None and written_age is not None:
            written_age += time.monotonic() - self._status["looked_at"]
            if not told or (amount(written.get("time")) or 0.0) > (amount(told.get("time")) or 0.0):
                return written, written_age
        return told or {}, told_age

    @staticmethod
    def _commit_age(found: dict[str, Any]) -> float | None:
        age = found.get("commit_age_s")
        return None if age is None else age + time.monotonic() - found["looked_at"]

    def _ending(self, entry: QueueEntry | None, job: str | None) -> Ending | None:
        """The run's end, if this is one: finished, or stopped with nobody in sight who will start it again."""
        state = self._status["state"]
        if state == "finished":
            return Ending(EXIT_FINISHED, _finished(self._status))
        if state == "running" or not self._begun or self._still_since is None:
            return None
        still = time.monotonic() - self._still_since
        if job is not None:
            if not self._queue.here or entry is None:
                return None
            waits_in_queue = entry.goes_on and entry.state != "RUNNING"
            if waits_in_queue or still < (QUEUED_WITHIN_S if entry.goes_on else GONE_FOR_S):
                return None
        elif still < RESTART_WITHIN_S:
            return None
        again = "the same command line goes on from the last commit"
        slurm = f" (Slurm job {job} is {entry.state})" if entry is not None and entry.state else ""
        if state == "crashed":
            return Ending(EXIT_CRASHED, f"crashed: its process died without saying so{slurm}; {again}")
        if state == "stopped":
            return Ending(EXIT_STOPPED, f"stopped{slurm}; {again}")
        what = "ended before its first commit" if self._run.exists else "gone: its folder was removed"
        return Ending(EXIT_CRASHED, f"{what}{slurm}")

    def _note(self, entry: QueueEntry | None, job: str | None, ranks: Mapping[int, Rank], size: int) -> str | None:
        state = self._status["state"]
        if state == "running":
            if not ranks:
                return "nothing from its ranks yet: it looks at the model and the input, or loads weights"
            return ENDED if sum(rank.over for rank in ranks.values()) == size else None
        known = []
        if entry is not None and entry.goes_on:
            when = f", to start at {entry.start}" if entry.start and entry.state == "PENDING" else ""
            why = f" ({entry.reason})" if entry.reason else ""
            known.append(f"Slurm job {job} is {entry.state}{why}{when}")
        elif state == "not started":
            known.append("nothing has begun here yet" if self._run.exists else "there is no such folder yet")
        elif job is not None and not self._queue.here:
            known.append(f"whether Slurm job {job} is queued again cannot be seen from this machine")
        if not self._once:
            known.append("waiting for a run to start" if state == "not started" else "waiting for it to go on")
        return "; ".join(known) or None


def _check(run: RunFolder, must_exist: bool) -> None:
    path = run.path
    if holds_a_run(run):
        return
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, not a run folder; give the folder that was named with -o")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path}: holds no run of rwkvmpi; give the folder that was named with -o")
    if must_exist and not path.exists():
        raise UserError(f"{path}: there is no such folder; give the folder that was named with -o")
    if must_exist:
        raise UserError(f"{path}: is empty: no run has begun in it yet; without --once this waits for one")


def _counts(job: dict[str, Any], age: float, running: bool) -> dict[str, Any]:
    """What rank 0 said of the job while it ran; after that, what counts is what was committed."""
    facts: dict[str, Any] = {}
    if running:
        for key in ("documents_done", "documents_failed", "documents_total", "tokens_done"):
            if (value := whole(job.get(key))) is not None:
                facts[key] = value
    left = amount(job.get("seconds_left")) if running else None
    return {
        **facts,
        "bytes_done": whole(job.get("bytes_done")) if running else None,
        "bytes_total": whole(job.get("bytes_total")),
        "seconds_left": max(0.0, left - age) if left is not None else None,
        "started": amount(job.get("started")),
        "job_age_s": age if job and running else None,
    }


def _time_granted(job: dict[str, Any], entry: QueueEntry | None) -> float | None:
    """Seconds to the end of the Slurm allocation."""
    end = amount(job.get("slurm_end"))
    if end is not None:
        return max(0.0, end - time.time())
    return entry.seconds_left if entry is not None else None


def _finished(found: dict[str, Any]) -> str:
    done, failed, tokens = (found.get(key) for key in ("documents_done", "documents_failed", "tokens_done"))
    what = f": {done:,} documents, {failed or 0:,} failed, {tokens:,} tokens" if done is not None else ""
    ago = found.get("finished_age_s")
    return f"finished{f' {duration(ago)} ago' if ago is not None and ago > 60 else ''}{what}"
