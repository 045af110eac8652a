"""Signs of life between neighbours over MPI, and how their clocks differ.

A rank that waits cannot tell a slow neighbour from a lost one: MPI may wait for ever. So every rank tells each of its
neighbours about once a second, whenever it polls, that it is there.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

PULSE_TAG = 4095
CLOCK_TAG = 4094
BEAT_EVERY_S = 1.0
CLOCK_ROUNDS = 8
_HERE, _LEAVING = 1, 2


class Pulse:
    """The signs that one rank gives to its neighbours `peers`, and takes from them."""

    def __init__(self, comm: Any, peers: list[int]) -> None:
        now = time.monotonic()
        self._heard = dict.fromkeys(peers, now)
        self._left: set[int] = set()
        self._next = now
        self._out = {peer: np.array([_HERE], dtype=np.int64) for peer in peers}
        self._in = {peer: np.zeros(1, dtype=np.int64) for peer in peers}
        self._sends = {peer: comm.Send_init(self._out[peer], dest=peer, tag=PULSE_TAG) for peer in peers}
        self._receives = {peer: comm.Recv_init(self._in[peer], source=peer, tag=PULSE_TAG) for peer in peers}
        self._sent = dict.fromkeys(peers, 0.0)
        self._under_way: set[int] = set()
        self._parting: set[int] | None = None  # whom the last sign is still to be given to
        for request in self._receives.values():
            request.Start()

    def tick(self) -> None:
        """Give signs that are due, and take those that have come. Cheap when there is nothing to do."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + BEAT_EVERY_S
        self._exchange(now)

    def silence_s(self, peer: int) -> float:
        """Seconds since the neighbour's last sign."""
        self._exchange(time.monotonic())
        return time.monotonic() - self._heard[peer]

    def take_leave(self) -> None:
        """The next sign to everybody is the last one."""
        self._parting = set(self._out)

    def has_left(self, peer: int) -> bool:
        """Whether the neighbour has given its last sign, and has got ours."""
        self._exchange(time.monotonic())
        parted = self._parting is not None and peer not in self._parting and peer not in self._under_way
        return parted and peer in self._left

    def close(self) -> None:
        """Free the requests; everybody has left."""
        for request in [*self._sends.values(), *self._receives.values()]:
            request.Free()

    def _exchange(self, now: float) -> None:
        for peer, request in self._receives.items():
            while peer not in self._left and request.Test():
                self._heard[peer] = now
                if self._in[peer][0] == _LEAVING:
                    self._left.add(peer)
                else:
                    request.Start()
        for peer, request in self._sends.items():
            if peer in self._under_way:
                if not request.Test():
                    continue
                self._under_way.discard(peer)
            if self._parting is None:
                if now < self._sent[peer] + BEAT_EVERY_S:
                    continue
            elif peer in self._parting:
                self._parting.discard(peer)
                self._out[peer][0] = _LEAVING
            else:
                continue
            request.Start()
            self._sent[peer] = now
            self._under_way.add(peer)


def compare_clocks(comm: Any, peers: list[int], deadline_s: float) -> dict[int, int]:
    """Every neighbour's monotonic clock minus this rank's, ns: 0 on one machine, else by the quickest of some round
    trips. Collective over the communicator; whoever is a rank's neighbour has it as its own. TimeoutError with the
    neighbour's rank if it does not answer."""
    machines = comm.allgather(_machine())
    offsets = {}
    for peer in sorted(peers, key=lambda peer: (min(peer, comm.rank), max(peer, comm.rank))):  # the same order for all
        if machines[peer] == machines[comm.rank]:
            offsets[peer] = 0
            continue
        talk = _Talk(comm, peer, deadline_s)
        if comm.rank < peer:
            trips = [talk.ask() for _ in range(CLOCK_ROUNDS)]
            offsets[peer] = min(trips)[1]
            talk.send(offsets[peer])
        else:
            for _ in range(CLOCK_ROUNDS):
                talk.receive()
                talk.send(time.monotonic_ns())
            offsets[peer] = -talk.receive()
    return offsets


class _Talk:
    """Single numbers to and from a neighbour, none of them waited for without end."""

    def __init__(self, comm: Any, peer: int, deadline_s: float) -> None:
        self._comm, self._peer, self._deadline_s = comm, peer, deadline_s

    def send(self, number: int) -> None:
        word = np.array([number], dtype=np.int64)
        self._finish(self._comm.Isend(word, dest=self._peer, tag=CLOCK_TAG))

    def receive(self) -> int:
        word = np.zeros(1, dtype=np.int64)
        self._finish(self._comm.Irecv(word, source=self._peer, tag=CLOCK_TAG))
        return int(word[0])

    def ask(self) -> tuple[int, int]:
        """(ns of a round trip, the neighbour's clock minus the middle of it)."""
        begun = time.monotonic_ns()
        self.send(0)
        theirs = self.receive()
        ended = time.monotonic_ns()
        return ended - begun, theirs - (begun + ended) // 2

    def _finish(self, request: Any) -> None:
        end = time.monotonic() + self._deadline_s
        while not request.Test():
            if time.monotonic() > end:
                raise TimeoutError(self._peer)


def _machine() -> str:
    """A running system: containers of one machine share its clock, whatever their names are."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return platform.node()
