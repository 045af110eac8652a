"""A rank's side of a commit: closes shards when the stream says so, and reports them once they are on disk.

A commit cuts the stream between two chunks. Everything recorded before the cut goes into shards of that commit;
the state with which the open document crosses it is kept by the ranks that read the chunk behind the cut. Writing
goes on in the writer's thread; the report leaves when the files are safe.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import Any

import numpy as np

from rwkvmpi.grid.control import COORDINATOR, Control
from rwkvmpi.grid.source import Source
from rwkvmpi.store.shards import Cut, ShardWriter


class RankLedger:
    """See grid.wavefront.Ledger. `source`: the own one, on ranks that have it."""

    def __init__(self, writer: ShardWriter, control: Control, replica: int, source: Source | None) -> None:
        self.recorder = writer
        self._control, self._replica, self._source = control, replica, source
        self._commit = 0
        self._in_flight: list[int] | None = None
        self._closing: deque[tuple[Future[Cut], list[int] | None]] = deque()

    def close_results(self, commit: int) -> None:
        """Commits of which this rank saw no frame are closed on the way: it had no chunk behind their cuts."""
        for number in range(self._commit + 1, commit + 1):
            self._in_flight = self._record_documents(number) if self._source is not None else None
            self.recorder.begin_cut(number)
            if number < commit:
                self.close_states(number)
        self._commit = commit

    def keep_state(self, doc: int, position: int, layer: int, state: Any) -> None:
        self.recorder.add_inflight(doc, position, layer, *state.arrays(0))

    def keep_carry(self, doc: int, position: int, carry: np.ndarray) -> None:
        self.recorder.add_carry(doc, position, carry)

    def close_states(self, commit: int) -> None:
        self._closing.append((self.recorder.end_cut(commit), self._in_flight))
        self.poll()

    def poll(self) -> None:
        """Report the commits whose shards are safe by now. Errors of the writer surface here."""
        while self._closing and self._closing[0][0].done():
            future, in_flight = self._closing.popleft()
            self._control.send(
                COORDINATOR, "report", replica=self._replica, cut=future.result().to_json(), in_flight=in_flight
            )

    @property
    def settled(self) -> bool:
        """All commits closed so far are reported."""
        return not self._closing

    def _record_documents(self, number: int) -> list[int] | None:
        """Record the documents that ended before the cut; where the open one goes on, if there is one:
        [document, position, byte_start, tokens_before]."""
        assert self._source is not None
        cut = self._source.cuts.pop(number)
        for ended in cut.ended:
            ok, error = ended.error is None, ended.error or ""
            self.recorder.add_document(ended.doc, ended.nbytes, ended.ntokens, ok, error, ended.sha256)
        flight = cut.in_flight
        return None if flight is None else [flight.doc, flight.position, *flight.cursor]
