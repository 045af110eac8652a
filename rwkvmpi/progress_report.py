"""How far the job is: the bar or the line on rank 0's stderr, and RUN/logs/progress.json for `rwkvmpi status`."""

from __future__ import annotations

import json
import os
import time
from types import TracebackType

from rwkvmpi.cluster.logs import Progress
from rwkvmpi.grid.coordinator import Coordinator
from rwkvmpi.prepare import Preparation

SHOW_EVERY_S = 0.5
WRITE_EVERY_S = 5.0


class ProgressReport:
    """Totals of the whole job, earlier starts included. `tick` is cheap: call it at every poll."""

    def __init__(self, preparation: Preparation, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._path = preparation.run.progress
        self._total = len(preparation.index)
        nbytes = preparation.nbytes
        progress = preparation.progress
        self._documents_before = progress.documents_done if progress is not None else 0
        self._tokens_before = progress.tokens_done if progress is not None else 0
        self._bytes_total = int(nbytes.sum())
        self._bytes_before = int(nbytes[progress.done].sum()) if progress is not None else 0
        self._bytes_per_token: float = preparation.bytes_per_token
        self._bar = Progress(self._total, self._bytes_total, (self._tokens_before, self._bytes_before))
        self._next_show = self._next_write = 0.0
        self._start = time.monotonic()

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
            nbytes = min(self._bytes_total, self._bytes_before + int(tokens * self._bytes_per_token))
            self._bar.update(
                self._documents_before + documents, self._tokens_before + tokens, nbytes, self._coordinator.failed
            )
        if now >= self._next_write:
            self._next_write = now + WRITE_EVERY_S
            self._write()

    def _write(self) -> None:
        """Not synced and never an error: losing it must not harm the run."""
        tokens, documents = self._coordinator.progress
        elapsed = max(time.monotonic() - self._start, 1e-9)
        facts = {
            "time": time.time(),
            "documents_done": self._documents_before + documents,
            "documents_total": self._total,
            "documents_failed": self._coordinator.failed,
            "tokens_done": self._tokens_before + tokens,
            "tokens_per_second": tokens / elapsed,
            "bytes_total": self._bytes_total,
        }
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            temporary.write_text(json.dumps(facts))
            os.replace(temporary, self._path)
        except OSError:
            pass
