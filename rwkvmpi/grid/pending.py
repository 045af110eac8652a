"""What is to be done when a device has come so far: in the order in which it was asked for, and without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from rwkvmpi.grid.activity import Activity
from rwkvmpi.models.device import Ticket


class Pending:
    """A queue of (ticket, action, item). Nothing waits in it while every ticket is done at once, as on a CPU."""

    def __init__(self, activity: Activity) -> None:
        self._activity = activity
        self._queue: deque[tuple[Ticket, Callable[[], None], int]] = deque()
        self._serving = False

    def add(self, ticket: Ticket, action: Callable[[], None], item: int = -1) -> None:
        """Call `action` when the ticket and all before it are done; at once if they are. `item`: see `settle_until`."""
        self._queue.append((ticket, action, item))
        self.serve()

    def serve(self) -> None:
        """Do what can be done now. An action may wait for a message, and be served again while it does."""
        if self._serving:
            return
        while self._queue and self._queue[0][0].done():
            self._do_first()

    def settle_until(self, item: int) -> None:
        """Wait until nothing of this item is left."""
        while any(of == item for _, _, of in self._queue):
            self._wait_for_first()

    def settle(self) -> None:
        """Wait until nothing is left."""
        while self._queue:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        ticket = self._queue[0][0]
        if not ticket.done():
            outer = self._activity.begin_wait(None, "the GPU")
            ticket.wait()
            self._activity.end_wait(outer)
        self._do_first()

    def _do_first(self) -> None:
        _, action, _ = self._queue[0]
        self._serving = True
        try:
            action()
        finally:
            self._serving = False
        self._queue.popleft()
