"""The coordinator: hands out documents, puts commits together, and carries the wish to stop. It runs on rank 0,
between that rank's layers, and never touches a tensor."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rwkvmpi.cluster.pinning import free_this_thread
from rwkvmpi.grid.activity import COMMITS, Activity
from rwkvmpi.grid.control import Control
from rwkvmpi.grid.layout import Grid
from rwkvmpi.grid.queue import DocumentQueue
from rwkvmpi.store.commits import Commit, InFlight
from rwkvmpi.store.ledger import Ledger
from rwkvmpi.store.shards import Cut

STOPPED_ON_ERROR = "a document that failed (--on-error stop)"
COMMIT_SPACING_S = 0.5  # many replicas commit at their own moments; their commits are written together


@dataclass
class _Replica:
    """Cuts of one replica that not all of its ranks have reported yet: number -> rank -> report."""

    members: range
    applied: int = 0
    reports: dict[int, dict[int, Cut]] = field(default_factory=dict)
    in_flight: dict[int, InFlight | None] = field(default_factory=dict)


class Coordinator:
    """`ledger` writes the commits; `begun` documents go on from where an earlier start left them; `reference(doc)`
    gives, as plain values, what a source needs to open a document."""

    def __init__(
        self,
        control: Control,
        grid: Grid,
        queue: DocumentQueue,
        ledger: Ledger,
        begun: dict[int, InFlight],
        *,
        reference: Callable[[int], dict[str, Any]],
        on_failed: Callable[[int, str], None],
        stop_on_error: bool,
        activity: Activity | None = None,
    ) -> None:
        self._activity = activity or Activity()
        self._control, self._grid, self._queue, self._ledger, self._begun = control, grid, queue, ledger, begun
        self._reference, self._on_failed, self._stop_on_error = reference, on_failed, stop_on_error
        self._replicas = [_Replica(grid.members(d)) for d in range(grid.replicas)]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commits", initializer=free_this_thread)
        self._saving: Future[Any] | None = None
        self._dirty = False
        self._saved_at = 0.0
        self._stop_sent = False
        self._progress: dict[int, dict[str, Any]] = {}
        self.farewells: dict[int, dict[str, Any]] = {}
        self.stop_reason = ""
        self.failed = 0
        self.commits = 0
        self.last_commit: tuple[int, float] | None = None  # its number, and when it was safe (unix s)
        control.handle("take", self._on_take)
        control.handle("report", self._on_report)
        control.handle("stop-wanted", self._on_stop)
        control.handle("failed", self._on_failure)
        control.handle("progress", lambda source, message: self._progress.__setitem__(source, message))
        control.handle("farewell", lambda source, message: self.farewells.__setitem__(source, message))

    def tick(self) -> None:
        """Write a commit when there is something new and the last one is not of this very moment.

        A thread of its own waits for the disk: this rank's layers do not. An error of it surfaces here.
        """
        if self._saving is not None and self._saving.done():
            self._saving.result()
            self._saving = None
        if self._dirty and self._saving is None and time.monotonic() - self._saved_at >= COMMIT_SPACING_S:
            self._saving = self._thread.submit(self._save, self._ledger.commit())
            self.commits += 1
            self._dirty = False
            self._saved_at = time.monotonic()

    def save_now(self) -> None:
        """Commit what all ranks have reported, and wait for it. Nothing more can be committed afterwards."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None
        if self._dirty:
            self._save(self._ledger.commit())
            self.commits += 1
            self._dirty = False
        self._thread.shutdown()

    def _save(self, commit: Commit) -> None:
        with self._activity.recorded(COMMITS, "commit", b=commit.number):
            self._ledger.save(commit)
        self.last_commit = commit.number, time.time()

    def stop(self, reason: str) -> None:
        """Let every source end its stream after the chunks that are on their way."""
        if self._stop_sent:
            return
        self._stop_sent = True
        self.stop_reason = reason
        for replica in range(self._grid.replicas):
            self._control.send(self._grid.source(replica), "stop")

    @property
    def all_gone(self) -> bool:
        """Every rank has reported all its commits and said farewell."""
        return len(self.farewells) == self._grid.size

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens and documents that passed the last stages in this start of the job."""
        latest = self._progress.values()
        return sum(message["tokens"] for message in latest), sum(message["documents"] for message in latest)

    def _on_take(self, source: int, message: dict[str, Any]) -> None:
        items = []
        for doc in self._queue.take():
            begun = self._begun.get(doc)
            resume = [begun.position, begun.byte_start, begun.tokens_before] if begun else None
            items.append({"doc": doc, "resume": resume, "ref": self._reference(doc)})
        self._control.send(source, "documents", documents=items, exhausted=self._queue.exhausted)

    def _on_stop(self, source: int, message: dict[str, Any]) -> None:
        self.stop(f"{message['reason']} (rank {source})")

    def _on_failure(self, source: int, message: dict[str, Any]) -> None:
        self.failed += 1
        self._on_failed(message["doc"], message["error"])
        if self._stop_on_error:
            self.stop(STOPPED_ON_ERROR)

    def _on_report(self, source: int, message: dict[str, Any]) -> None:
        """A cut counts once every rank of its replica has closed it; cuts are applied in their order."""
        replica = self._replicas[message["replica"]]
        cut = Cut.from_json(message["cut"])
        replica.reports.setdefault(cut.commit, {})[source] = cut
        if message["in_flight"] is not None:
            replica.in_flight[cut.commit] = InFlight(*message["in_flight"])
        while len(replica.reports.get(replica.applied + 1, {})) == len(replica.members):
            replica.applied += 1
            cuts = replica.reports.pop(replica.applied).values()
            self._ledger.apply(message["replica"], replica.applied, cuts, replica.in_flight.pop(replica.applied, None))
            self._dirty = True
