"""A hop between neighbours: there and back through a transport that a run uses, at the sizes that ranks send."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rwkvmpi.bench.timing import Effort
from rwkvmpi.cluster.waiting import quiet_barrier
from rwkvmpi.grid.figures import Figures, set_hop
from rwkvmpi.grid.frame import frame_room
from rwkvmpi.grid.transport import Room, Transport
from rwkvmpi.models import cost
from rwkvmpi.models.schema import ModelShape

SMALL_BYTES = 64
FIRST_ROUNDS = 10  # warm up, and tell how long a round takes
MOST_ROUNDS = 5000


def message_rooms(shape: ModelShape, chunk: int) -> dict[str, Room]:
    """What ranks send: next to nothing, a layer's state to the right, a chunk's activations down."""
    return {
        "small": Room(0, SMALL_BYTES, on_device=True),
        "state": Room(0, cost.state_bytes(shape), on_device=True),
        "activations": frame_room(chunk, shape.n_embd, shape.version == "7"),
    }


def measure_hops(comm: Any, transport: Transport, rooms: Mapping[str, Room], effort: Effort) -> list[dict[str, Any]]:
    """Latency and bandwidth between every rank and the next for messages of these `rooms`; collective, rank 0 gets
    them all, the others []. The first room is the smallest and tells the latency, the largest one the bandwidth.

    The transport is a fresh one without channels, and is closed in the end. UserError where it cannot be connected.
    """
    partners = [peer for peer in (comm.rank - 1, comm.rank + 1) if 0 <= peer < comm.size]
    channels = {
        peer: {name: _Channel(transport, peer, n, room) for n, (name, room) in enumerate(rooms.items())}
        for peer in partners
    }
    transport.connect()
    found = []
    for partner, asks in in_turn(comm):
        if asks:
            found.append(_ask(comm, partner, channels[partner], effort))
        else:
            _answer(comm, partner, channels[partner])
    for of_peer in channels.values():
        for channel in of_peer.values():
            channel.close()
    transport.close()
    return gathered(comm, found)


def in_turn(comm: Any) -> Iterator[tuple[int, bool]]:
    """(partner, whether this rank asks it) for what is done between every rank and the next; collective.

    Ranks 0-1, 2-3, ... go at the same time, then 1-2, 3-4, ...: in a run all of them send at once, too.
    """
    for first in (0, 1):
        quiet_barrier(comm)
        if (comm.rank - first) % 2 == 0 and comm.rank >= first and comm.rank + 1 < comm.size:
            yield comm.rank + 1, True
        elif (comm.rank - first) % 2 == 1 and comm.rank > first:
            yield comm.rank - 1, False
    quiet_barrier(comm)


def gathered(comm: Any, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What all ranks found between pairs, in the order of the pairs, on rank 0; [] elsewhere. Collective."""
    everyone = comm.gather(found)
    return sorted((hop for hops in everyone for hop in hops), key=lambda hop: hop["ranks"]) if everyone else []


def keep(known: Figures, transport: str, hops: list[dict[str, Any]]) -> None:
    """Put the slowest pair's among the figures: on a ring the slowest link sets the pace."""
    hop = max(hops, key=lambda hop: hop["sizes"]["state"]["seconds"])
    set_hop(known, transport, hop["latency_s"], hop["bytes_per_second"], is_between_nodes(hop))


def is_between_nodes(hop: dict[str, Any]) -> bool:
    """Whether a pair's ranks are on two machines."""
    return len(set(hop["nodes"])) > 1


def _ask(comm: Any, partner: int, channels: dict[str, _Channel], effort: Effort) -> dict[str, Any]:
    measured = {}
    for name, channel in channels.items():
        rounds = max(FIRST_ROUNDS, min(MOST_ROUNDS, round(effort.seconds * FIRST_ROUNDS / channel.ask(FIRST_ROUNDS))))
        comm.send(rounds, dest=partner)
        trips = sorted(channel.ask(1) for _ in range(rounds))
        measured[name] = {"bytes": channel.room.nbytes, "seconds": trips[len(trips) // 2] / 2}
    latency = next(iter(measured.values()))["seconds"]
    large = max(measured.values(), key=lambda entry: entry["bytes"])
    return {
        "ranks": [comm.rank, partner],
        "nodes": [platform.node(), comm.recv(source=partner)],
        "sizes": measured,
        "latency_s": latency,
        "bytes_per_second": large["bytes"] / max(large["seconds"] - latency, 1e-9),
    }


def _answer(comm: Any, partner: int, channels: dict[str, _Channel]) -> None:
    for channel in channels.values():
        channel.answer(FIRST_ROUNDS)
        channel.answer(comm.recv(source=partner))
    comm.send(platform.node(), dest=partner)


class _Channel:
    """Messages of one size to and from one partner."""

    def __init__(self, transport: Transport, partner: int, tag: int, room: Room) -> None:
        self._receiver = transport.receiver(partner, tag, room, 1, "a benchmark")
        self._sender = transport.sender(partner, tag, room, 1, "a benchmark")
        self.room = room
        self._sent = self._received = 0

    def ask(self, rounds: int) -> float:
        """Seconds of sending and waiting for the answer."""
        start = time.perf_counter()
        for _ in range(rounds):
            self._send()
            self._receive()
        return time.perf_counter() - start

    def answer(self, rounds: int) -> None:
        """The other side of `ask`."""
        for _ in range(rounds):
            self._receive()
            self._send()

    def close(self) -> None:
        """Nothing more will be sent."""
        self._sender.flush()
        self._sender.close()
        self._receiver.close()

    def _send(self) -> None:
        parcel = self._sender.buffer()
        if self._sent == 0:
            parcel.body[:] = 1  # pages that were never written to are all one page
        self._sender.send(self._sent, self.room.body)
        self._sent += 1

    def _receive(self) -> None:
        self._receiver.wait(self._received)
        self._receiver.release()
        self._received += 1
