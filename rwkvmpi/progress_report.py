"""How far the job is: the bar or the line on rank 0's stderr, and RUN/logs/progress.json for `status` and `watch`."""

from __future__ import annotations

import json
import os
import time
from types import TracebackType
from typing import Any

from rwkvmpi.cluster.launcher import slurm_job_id, slurm_seconds_left
from rwkvmpi.cluster.logs import Progress
from rwkvmpi.grid.coordinator import Coordinator
from rwkvmpi.prepare import Preparation

SHOW_EVERY_S = 0.5
WRITE_EVERY_S = 5.0


class ProgressReport:
    """Totals of the whole job, earlier starts included. `tick` is cheap: call it at every poll; `facts` from any
    thread."""

    def __init__(self, preparation: Preparation, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._path = preparation.run.progress
        self._total = len(preparation.index)
        nbytes = preparation.nbytes
        progress = preparation.progress
        self._documents_before = progress.documents_done if progress is not None else 0
        self._failed_before = progress.documents_failed if progress is not None else 0
        self._tokens_before = progress.tokens_done if progress is not None else 0
        self._bytes_total = int(nbytes.sum())
        self._bytes_before = int(nbytes[progress.done].sum()) if progress is not None else 0
        self._bytes_per_token: float = preparation.bytes_per_token
        self._bar = Progress(self._total, self._bytes_total, (self._tokens_before, self._bytes_before))
        self._next_show = self._next_write = 0.0
        self._start = time.monotonic()
        grid, job = preparation.grid, preparation.job
        left = slurm_seconds_left()
        self._fixed = {
            "attempt": preparation.attempt,
            "task": job.task.name,
            "shard": job.input.shard,
            "grid": [grid.stages, grid.ring, grid.replicas],
            "ranks": grid.size,
            "started": time.time(),
            "slurm_job": slurm_job_id(),
            "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            "slurm_end": None if left is None else time.time() + left,
        }

    def __enter__(self) -> ProgressReport:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()
        self._bar.__exit__(kind, error, trace)

    def tick(self) -> None:
        """Show and write when it is time."""
        now = time.monotonic()
        if now >= self._next_show:
            self._next_show = now + SHOW_EVERY_S
            tokens, documents = self._coordinator.progress
            done = self._documents_before + documents, self._tokens_before + tokens
            self._bar.update(*done, self._bytes_done(tokens), self._failed_before + self._coordinator.failed)
        if now >= self._next_write:
            self._next_write = now + WRITE_EVERY_S
            self._write()

    def facts(self) -> dict[str, Any]:
        """What is known of the job as a whole: counts of all its starts, the rate of this one (tokens/s), times in unix
        seconds. started, attempt: of this start; slurm_end: when Slurm ends it; commits, commit, commit_time: how many
        this start has written, the number of the last one and when it was safe; seconds_left: by the bytes still to
        read."""
        tokens, documents = self._coordinator.progress
        elapsed = max(time.monotonic() - self._start, 1e-9)
        done = self._bytes_done(tokens)
        read = done - self._bytes_before
        number, when = self._coordinator.last_commit or (None, None)
        return {
            **self._fixed,
            "time": time.time(),
            "documents_done": self._documents_before + documents,
            "documents_total": self._total,
            "documents_failed": self._failed_before + self._coordinator.failed,
            "tokens_done": self._tokens_before + tokens,
            "tokens_per_second": tokens / elapsed,
            "bytes_done": done,
            "bytes_total": self._bytes_total,
            "seconds_left": (self._bytes_total - done) * elapsed / read if read > 0 else None,
            "commits": self._coordinator.commits,
            "commit": number,
            "commit_time": when,
        }

    def _bytes_done(self, tokens: int) -> int:
        """An estimate: what was read of documents in flight is counted by the average token."""
        return min(self._bytes_total, self._bytes_before + int(tokens * self._bytes_per_token))

    def _write(self) -> None:
        """Not synced and never an error: losing it must not harm the run."""
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            temporary.write_text(json.dumps(self.facts()))
            os.replace(temporary, self._path)
        except OSError:
            pass
