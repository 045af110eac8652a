"""The shards of one rank while it computes: a ShardBuilder whose files a background thread writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rwkvmpi.cluster.pinning import free_this_thread
from rwkvmpi.store.shard_builder import DEFAULT_LIMIT_BYTES, MAX_LIMIT_BYTES, ShardBuilder, newest
from rwkvmpi.store.shard_file import Cut, ShardRef, merge_cuts

__all__ = ["DEFAULT_LIMIT_BYTES", "MAX_LIMIT_BYTES", "Cut", "ShardBuilder", "ShardRef", "ShardWriter", "merge_cuts"]


class ShardWriter(ShardBuilder):
    """A ShardBuilder with one thread that writes: the compute loop never waits for fsync.

    It takes the same add_* calls, from one thread. A commit has two moments: `begin_cut` closes the results, and
    `end_cut`, called when all states of that moment were added, closes the states; results added in between belong to
    the next commit. `cut` does both. An error of the thread (disk full: UserError) is raised by every call after it,
    and by the Future. At most 64 MiB wait to be written; `waited_s` counts the seconds spent because of that.
    `on_written(begun_ns, ended_ns, nbytes)` is called in the thread after each file.
    """

    def __init__(self, folder: Path, attempt: int, rank: int, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        super().__init__(folder, attempt, rank, limit_bytes)
        self.waited_s = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards", initializer=free_this_thread)
        self._room = threading.Condition()
        self._queued_bytes = 0
        self._error: BaseException | None = None
        self.on_written: Callable[[int, int, int], None] = lambda begun_ns, ended_ns, nbytes: None
        self._open_cut: int | None = None
        self._closed: list[ShardRef] = []  # results of the open cut; touched by the thread only, as is _written
        self._documents: list[int] = []
        self._closed_documents: list[int] = []

    def add_document(self, doc: int, nbytes: int, ntokens: int, ok: bool, error: str = "", sha256: bytes = b"") -> None:
        self._documents.append(doc)
        super().add_document(doc, nbytes, ntokens, ok, error, sha256)

    def begin_cut(self, commit: int) -> None:
        """Everything recorded so far belongs to `commit`; results added later do not, states still do."""
        self.check()
        if self._open_cut is not None:
            raise RuntimeError(f"commit {commit} begins while commit {self._open_cut} is still open")
        self._open_cut = commit
        self.close_results()
        self._closed_documents, self._documents = self._documents, []
        self._thread.submit(self._close_results_of_cut)

    def end_cut(self, commit: int) -> Future[Cut]:
        """All states of `commit` were added. The Future gives what to report, once all of it is safe on disk."""
        self.check()
        if self._open_cut != commit:
            raise RuntimeError(f"commit {commit} ends, but {self._open_cut} is open")
        self.close_states()
        self._open_cut = None
        documents, self._closed_documents = tuple(self._closed_documents), []
        return self._thread.submit(self._finish_cut, commit, documents)

    def cut(self, commit: int) -> Future[Cut]:
        """Close results and states at once."""
        self.begin_cut(commit)
        return self.end_cut(commit)

    def check(self) -> None:
        """Raise the error of the writing thread, if it had one."""
        if self._error is not None:
            raise self._error

    def close(self, wait: bool = True) -> None:
        """End the thread; with `wait`, once everything handed to it is written, and its error is raised here."""
        self._thread.shutdown(wait=wait, cancel_futures=not wait)
        if wait:
            self.check()

    def _results_grew(self) -> None:
        self.check()
        super()._results_grew()

    def _states_grew(self, nbytes: int) -> None:
        self.check()
        super()._states_grew(nbytes)

    def _submit(self, write: Callable[[], ShardRef], nbytes: int) -> None:
        with self._room:
            if self._queued_bytes and self._queued_bytes + nbytes > MAX_LIMIT_BYTES:
                begun = time.perf_counter()
                self._room.wait_for(lambda: not self._queued_bytes or self._queued_bytes + nbytes <= MAX_LIMIT_BYTES)
                self.waited_s += time.perf_counter() - begun
            self._queued_bytes += nbytes
        self._thread.submit(self._write_in_thread, write, nbytes)

    def _write_in_thread(self, write: Callable[[], ShardRef], nbytes: int) -> None:
        try:
            if self._error is None:  # after an error nothing more is written: it could not be part of a commit
                begun = time.monotonic_ns()
                self._written.append(write())
                self.on_written(begun, time.monotonic_ns(), nbytes)
        except BaseException as error:
            self._error = error
        finally:
            with self._room:
                self._queued_bytes -= nbytes
                self._room.notify_all()

    def _close_results_of_cut(self) -> None:
        self._closed, self._written = self._written, []

    def _finish_cut(self, commit: int, documents: tuple[int, ...]) -> Cut:
        self.check()
        states = [ref for ref in self._written if ref.kind == "state"]
        self._written = [ref for ref in self._written if ref.kind == "results"]
        refs = (*newest(self._closed), *states)
        self._closed = []
        return Cut(self._attempt, self._rank, commit, refs, documents)
