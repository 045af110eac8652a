"""A hop between neighbours: there and back through the transport that a run uses, at the sizes that the model sends."""

from __future__ import annotations

import platform
import time
from typing import Any

from rwkvmpi.bench.timing import Effort
from rwkvmpi.grid.relay import HEADER_BYTES
from rwkvmpi.grid.transport import MpiTransport
from rwkvmpi.grid.wiring import frame_bytes
from rwkvmpi.models import cost
from rwkvmpi.models.schema import ModelShape

SMALL_BYTES = 64
FIRST_ROUNDS = 10  # warm up, and tell how long a round takes
MOST_ROUNDS = 5000
BENCH_TAG = 1000  # + the size's number


def message_sizes(shape: ModelShape, chunk: int) -> dict[str, int]:
    """Bytes of what ranks send: next to nothing, a layer's state to the right, a chunk's activations down."""
    return {
        "small": SMALL_BYTES,
        "state": HEADER_BYTES + cost.state_bytes(shape),
        "activations": frame_bytes(chunk, shape.n_embd, shape.version == "7"),
    }


def measure_hops(comm: Any, shape: ModelShape, chunk: int, effort: Effort) -> list[dict[str, Any]]:
    """Latency and bandwidth between every rank and the next; collective, rank 0 gets them all, the others [].

    Ranks 0-1, 2-3, ... measure at the same time, then 1-2, 3-4, ...: in a run all of them send at once, too.
    """
    transport = MpiTransport(comm.Dup(), lambda: None)
    found = []
    for first in (0, 1):
        comm.Barrier()
        if (comm.rank - first) % 2 == 0 and comm.rank >= first and comm.rank + 1 < comm.size:
            found.append(_ask(comm, transport, comm.rank + 1, message_sizes(shape, chunk), effort))
        elif (comm.rank - first) % 2 == 1 and comm.rank > first:
            _answer(comm, transport, comm.rank - 1, message_sizes(shape, chunk))
    everyone = comm.gather(found)
    return sorted((hop for hops in everyone for hop in hops), key=lambda hop: hop["ranks"]) if everyone else []


def slowest(hops: list[dict[str, Any]]) -> dict[str, Any]:
    """The pair whose state takes longest: on a ring the slowest link sets the pace."""
    return max(hops, key=lambda hop: hop["sizes"]["state"]["seconds"])


def _ask(comm: Any, transport: MpiTransport, partner: int, sizes: dict[str, int], effort: Effort) -> dict[str, Any]:
    measured = {}
    for number, (name, nbytes) in enumerate(sizes.items()):
        channel = _Channel(transport, partner, BENCH_TAG + number, nbytes)
        rounds = max(FIRST_ROUNDS, min(MOST_ROUNDS, round(effort.seconds * FIRST_ROUNDS / channel.ask(FIRST_ROUNDS))))
        comm.send(rounds, dest=partner)
        trips = sorted(channel.ask(1) for _ in range(rounds))
        channel.close()
        measured[name] = {"bytes": nbytes, "seconds": trips[len(trips) // 2] / 2}
    latency = measured["small"]["seconds"]
    large = max(measured.values(), key=lambda entry: entry["bytes"])
    return {
        "ranks": [comm.rank, partner],
        "nodes": [platform.node(), comm.recv(source=partner)],
        "sizes": measured,
        "latency_s": latency,
        "bytes_per_second": large["bytes"] / max(large["seconds"] - latency, 1e-9),
    }


def _answer(comm: Any, transport: MpiTransport, partner: int, sizes: dict[str, int]) -> None:
    for number, nbytes in enumerate(sizes.values()):
        channel = _Channel(transport, partner, BENCH_TAG + number, nbytes)
        channel.answer(FIRST_ROUNDS)
        channel.answer(comm.recv(source=partner))
        channel.close()
    comm.send(platform.node(), dest=partner)


class _Channel:
    """Messages of one size to and from one partner."""

    def __init__(self, transport: MpiTransport, partner: int, tag: int, nbytes: int) -> None:
        self._receiver = transport.receiver(partner, tag, nbytes, depth=1)
        self._sender = transport.sender(partner, tag, nbytes, depth=1)
        self._nbytes = nbytes
        self._sender.buffer()[:] = 1  # pages that were never written to are all one page

    def ask(self, rounds: int) -> float:
        """Seconds of sending and waiting for the answer."""
        start = time.perf_counter()
        for _ in range(rounds):
            self._send()
            self._receive()
        return time.perf_counter() - start

    def answer(self, rounds: int) -> None:
        for _ in range(rounds):
            self._receive()
            self._send()

    def close(self) -> None:
        self._sender.flush()
        self._receiver.cancel()

    def _send(self) -> None:
        self._sender.buffer()
        self._sender.send(self._nbytes)

    def _receive(self) -> None:
        self._receiver.wait()
        self._receiver.release()
