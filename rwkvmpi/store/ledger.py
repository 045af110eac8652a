"""The coordinator's book: what every rank reported, gathered into commits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rwkvmpi.store.commits import Commit, InFlight, ReplicaCommit, write_commit
from rwkvmpi.store.progress import Progress
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.shard_file import Cut, ShardRef, merge_cuts


class Ledger:
    """Keeps the full picture of a run and writes it as commits. One object, on the coordinator.

    Replicas cut at different moments: `apply` takes in one replica's cut once ALL its ranks have reported it (cuts of
    one replica in their order, none left out), and `write` commits what has been applied so far. `progress` is that
    of the commit from which this attempt goes on; its documents in flight wait until a replica holds or finishes them.
    """

    def __init__(
        self, run: RunFolder, attempt: int, job_sha256: str, documents_total: int, progress: Progress | None = None
    ) -> None:
        self._run, self._attempt, self._job_sha256 = run, attempt, job_sha256
        self._documents_total = documents_total
        self._saved = progress.saved if progress else None
        self._waiting = {entry.doc: entry for entry in (progress.in_flight if progress else [])}
        self._restarted = dict(progress.commit.restarted) if progress else {}
        old = progress.commit.shards if progress else ()
        self._old_states = [ref for ref in old if ref.kind == "state"]
        self._shards: list[ShardRef] = [ref for ref in old if ref.kind == "results"]
        self._replicas: dict[int, ReplicaCommit] = {}
        self._number = max([int(path.stem) for path in run.commit_paths()], default=0)

    @property
    def waiting(self) -> list[InFlight]:
        """Documents in flight of earlier attempts that no applied cut has taken up yet."""
        return sorted(self._waiting.values(), key=lambda entry: entry.doc)

    def apply(self, replica: int, commit: int, cuts: Iterable[Cut], in_flight: InFlight | None) -> None:
        """Take in one replica's cut number `commit`: the reports of all its ranks, and the document that crosses it."""
        cuts = list(cuts)
        if wrong := [cut for cut in cuts if cut.commit != commit or cut.attempt != self._attempt]:
            raise ValueError(f"replica {replica}: a report of cut {wrong[0].commit} among those of cut {commit}")
        self._shards = merge_cuts(self._shards, cuts)
        self._replicas[replica] = ReplicaCommit(replica, commit, in_flight)
        for doc in [doc for cut in cuts for doc in cut.documents]:
            self._waiting.pop(doc, None)
        if in_flight is not None:
            self._waiting.pop(in_flight.doc, None)

    def restart(self, doc: int) -> None:
        """A waiting document will be read from its start: what earlier attempts wrote about it no longer counts.

        Before this attempt's first `apply` of anything about it.
        """
        self._waiting.pop(doc, None)
        self._restarted[doc] = self._attempt

    def commit(self, extra: dict[str, Any] | None = None) -> Commit:
        """The next commit, with the number after the last one; nothing is written."""
        needed = self._saved.shards_of(self._waiting) if self._saved else set()
        return Commit(
            number=self._number + 1,
            attempt=self._attempt,
            job_sha256=self._job_sha256,
            documents_total=self._documents_total,
            shards=(*self._shards, *(ref for ref in self._old_states if ref.name in needed)),
            replicas=tuple(replica for _, replica in sorted(self._replicas.items())),
            waiting=tuple(self.waiting),
            restarted=dict(self._restarted),
            extra=extra or {},
        )

    def write(self, extra: dict[str, Any] | None = None) -> Path:
        """Commit what has been applied so far (blocks for an fsync or two). UserError when the disk is full."""
        return self.save(self.commit(extra))

    def save(self, commit: Commit) -> Path:
        """Write what `commit` gave; may run in another thread, one at a time, while cuts are applied."""
        path = write_commit(self._run, commit)
        self._number = commit.number
        return path
