"""How messages travel between neighbours: receives posted ahead, sends that go on while the rank computes.

A transport hands out receivers and senders for one neighbour and one tag each; they own their buffers, which live
as long as the run. The wavefront knows only these three classes' faces, so that another fabric (verbs, device
memory) is another transport and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

PAGE = 4096  # bytes
SPINS_BEFORE_SLEEP = 200
SLEEP_S = 20e-6  # long enough to hand the core to another rank where there are more ranks than cores


class Receiver(Protocol):
    """Messages from one neighbour in the order they were sent."""

    waited_s: float

    def wait(self) -> np.ndarray:
        """Block until the next message is here; its buffer (uint8), valid until `release`."""

    def release(self) -> None:
        """Give the buffer of the last `wait` back, to receive into it again."""

    def cancel(self) -> None:
        """No more messages will come; stop receiving."""


class Sender(Protocol):
    """Messages to one neighbour."""

    waited_s: float

    def buffer(self) -> np.ndarray:
        """A free buffer (uint8) to fill; blocks while all are still on their way."""

    def send(self, nbytes: int) -> None:
        """Send the first `nbytes` of the buffer handed out last; returns at once."""

    def flush(self) -> None:
        """Block until everything sent has left."""


class Transport(Protocol):
    """Receivers and senders between this rank and its neighbours."""

    def receiver(self, source: int, tag: int, nbytes: int, depth: int) -> Receiver: ...

    def sender(self, dest: int, tag: int, nbytes: int, depth: int) -> Sender: ...


class MpiTransport:
    """Host memory through MPI: persistent receives, non-blocking sends.

    `idle` is called while a rank waits, so that control messages are answered during long waits too. `pin` is told of
    every buffer that a GPU may copy from or to.
    """

    def __init__(
        self, comm: Any, idle: Callable[[], None], pin: Callable[[np.ndarray], None] = lambda buffer: None
    ) -> None:
        self._comm = comm
        self._idle = idle
        self._pin = pin

    def receiver(self, source: int, tag: int, nbytes: int, depth: int) -> MpiReceiver:
        return MpiReceiver(self._comm, source, tag, self._buffers(nbytes, depth), self._idle)

    def sender(self, dest: int, tag: int, nbytes: int, depth: int) -> MpiSender:
        return MpiSender(self._comm, dest, tag, self._buffers(nbytes, depth), self._idle)

    def _buffers(self, nbytes: int, depth: int) -> list[np.ndarray]:
        # Whole pages, so that no two buffers lie on one: pages are locked, and only once.
        pages = [aligned_bytes(-(-nbytes // PAGE) * PAGE, PAGE) for _ in range(depth)]
        for page in pages:
            self._pin(page)
        return [page[:nbytes] for page in pages]


class MpiReceiver:
    """A persistent receive for each buffer, all posted from the start; messages come in the order of the buffers."""

    def __init__(self, comm: Any, source: int, tag: int, buffers: list[np.ndarray], idle: Callable[[], None]) -> None:
        self._buffers = buffers
        self._requests = [comm.Recv_init(buffer, source=source, tag=tag) for buffer in self._buffers]
        self._idle = idle
        self._turn = 0
        self.waited_s = 0.0
        for request in self._requests:
            request.Start()

    def wait(self) -> np.ndarray:
        self.waited_s += wait_for(self._requests[self._turn], self._idle)
        return self._buffers[self._turn]

    def release(self) -> None:
        self._requests[self._turn].Start()
        self._turn = (self._turn + 1) % len(self._buffers)

    def cancel(self) -> None:
        for request in self._requests:
            request.Cancel()
            request.Wait()
            request.Free()
        self._requests = []


class MpiSender:
    """Buffers used in turn; one is free again when its send has completed."""

    def __init__(self, comm: Any, dest: int, tag: int, buffers: list[np.ndarray], idle: Callable[[], None]) -> None:
        self._comm, self._dest, self._tag, self._idle = comm, dest, tag, idle
        self._buffers = buffers
        self._requests: list[Any] = [None] * len(buffers)
        self._turn = 0
        self.waited_s = 0.0

    def buffer(self) -> np.ndarray:
        self._complete(self._turn)
        return self._buffers[self._turn]

    def send(self, nbytes: int) -> None:
        turn = self._turn
        self._requests[turn] = self._comm.Isend(self._buffers[turn][:nbytes], dest=self._dest, tag=self._tag)
        self._turn = (turn + 1) % len(self._buffers)

    def flush(self) -> None:
        for turn in range(len(self._requests)):
            self._complete(turn)

    def _complete(self, turn: int) -> None:
        if self._requests[turn] is not None:
            self.waited_s += wait_for(self._requests[turn], self._idle)
            self._requests[turn] = None


def wait_for(request: Any, idle: Callable[[], None]) -> float:
    """Wait for one MPI request while serving `idle`; returns the seconds waited."""
    if request.Test():
        return 0.0
    start = time.perf_counter()
    spins = 0
    while not request.Test():
        spins += 1
        if spins % 64 == 0:
            idle()
        if spins > SPINS_BEFORE_SLEEP:
            time.sleep(SLEEP_S)
    return time.perf_counter() - start


def aligned_bytes(nbytes: int, alignment: int = 64) -> np.ndarray:
    """uint8 [nbytes], zeroed, starting at a multiple of `alignment` (a cache line, a vector register)."""
    raw = np.zeros(nbytes + alignment, dtype=np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes]
