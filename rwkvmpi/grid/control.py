"""Small messages outside the stream: documents asked for and handed out, shards reported, a wish to stop.

Messages are JSON objects with a `kind`; each rank names a handler per kind it understands. They are served
whenever a rank polls, between two layers and while it waits, so no rank needs a thread for them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any

Handler = Callable[[int, dict[str, Any]], None]
COORDINATOR = 0
TAG = 1


class Control:
    """One rank's letter box. `comm` None: a world of one rank, whose messages go straight to its own handlers."""

    def __init__(self, comm: Any | None) -> None:
        self._comm = comm
        self.rank = comm.rank if comm is not None else 0
        self._handlers: dict[str, Handler] = {}
        self._own: deque[dict[str, Any]] = deque()
        self._sending: list[tuple[Any, bytes]] = []
        self._polling = False
        self.on_poll: list[Callable[[], None]] = []

    def handle(self, kind: str, handler: Handler) -> None:
        """Let `handler(source, message)` answer messages of this kind."""
        self._handlers[kind] = handler

    def send(self, dest: int, kind: str, **fields: Any) -> None:
        """Send a message; returns at once. One to the own rank is handled at the next poll."""
        message = {"kind": kind, **fields}
        if dest == self.rank:
            self._own.append(message)
            return
        assert self._comm is not None
        data = json.dumps(message).encode()
        self._sending.append((self._comm.Isend(data, dest=dest, tag=TAG), data))

    def poll(self) -> None:
        """Handle everything that has arrived. Handlers may send, and may poll without harm (nothing nests)."""
        if self._polling:
            return
        self._polling = True
        try:
            for call in self.on_poll:
                call()
            while self._own:
                self._dispatch(self.rank, self._own.popleft())
            if self._comm is not None:
                self._receive_all()
        finally:
            self._polling = False

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for request, _ in self._sending:
            request.Wait()
        self._sending = []

    def _receive_all(self) -> None:
        from rwkvmpi.cluster.mpi import any_source

        assert self._comm is not None
        if self._sending:
            self._sending = [(request, data) for request, data in self._sending if not request.Test()]
        while True:
            status = any_source(self._comm, TAG)
            if status is None:
                return
            source, nbytes = status
            data = bytearray(nbytes)
            self._comm.Recv(data, source=source, tag=TAG)
            self._dispatch(source, json.loads(bytes(data)))
            while self._own:
                self._dispatch(self.rank, self._own.popleft())

    def _dispatch(self, source: int, message: dict[str, Any]) -> None:
        self._handlers[message["kind"]](source, message)
