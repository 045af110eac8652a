"""Measures what a hop between two ranks of one machine costs beside MPI's own, and how much of it work hides.

    python scripts/bench_hops.py [--json figures.json]       both
    python scripts/bench_hops.py hops --ranks 4               4 ranks: pairs send at the same time
    mpirun -n 2 python scripts/bench_hops.py                  the hops alone
    python scripts/bench_hops.py hidden                       a score on a ring of two ranks with one thread each

All ways of sending take turns in one run. `bare` is a ping-pong with persistent requests on buffers like the
transport's, which waits as the transport waits; `MPI waits` is the same with MPI's own waiting, which never gives the
core away. Times are of one way: medians, and beside them the tenth quickest of a hundred, which other programs on the
machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from bench_grid import ENVIRONMENT, cpu_name, mpirun, random_words, score, shaped_model
from xxhash import xxh3_64_intdigest

from rwkvmpi.cluster import mpi
from rwkvmpi.cluster.launcher import launch_facts
from rwkvmpi.errors import UserError
from rwkvmpi.grid.mpi_transport import MpiTransport
from rwkvmpi.grid.transport import ENVELOPE_BYTES, HostBuffer, Room, Terms

SIZES = (64, 4096, 65_536, 262_144, 1 << 20, 4 << 20, 16 << 20)  # bytes of the body
TINY = 8
WAYS = ("MPI waits", "bare", "transport", "with checksum")
WARM_UP = 5
LOOPS, BATCHES = 500, 15  # of the transport's own cost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["hops", "hidden"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size of a hop, all ways together")
    parser.add_argument("--ranks", type=int, default=2, help="of the hops, an even number")
    parser.add_argument("--tokens", type=int, default=30_720, help="of the text that is scored")
    parser.add_argument("--repeats", type=int, default=3, help="of the score")
    arguments = parser.parse_args()
    if launch_facts().size > 1:
        mpi.guard(lambda: hops_of_rank(arguments))
    figures: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory(prefix="rwkvmpi-bench-") as name:
        for what in arguments.what:
            print(f"== {what}", flush=True)
            figures[what] = {"hops": hops, "hidden": hidden}[what](Path(name), arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def hops(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks that measure hops; what rank 0 found."""
    path = folder / "hops.json"
    options = ["--json", str(path), "--seconds", str(arguments.seconds)]
    command = [mpirun(), "-n", str(arguments.ranks), sys.executable, __file__, *options]
    subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def hidden(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The share of the hops' time in which their receiver worked: a 0.1B in bfloat16 on a ring of two ranks."""
    model, text = shaped_model(folder, "0.1B"), random_words(folder / "words.txt", 4 * arguments.tokens)
    runs = []
    for repeat in range(arguments.repeats):
        facts = score(2, model, text, folder / f"hidden-{repeat}", "--dtype", "bfloat16", "--ring", "2")
        messages, seen, seen_s, exposed = (
            sum(rank[key] for rank in facts["hops"]) for key in ("messages", "seen", "seen_s", "exposed_s")
        )
        if not seen:
            raise SystemExit("no message was waited for from its start: nobody saw how long one takes; more --tokens")
        total = max(exposed, seen_s / seen * messages)
        share = 1 - exposed / total
        runs.append({"share": share, "load": os.getloadavg()[0], "ranks": facts["hops"], "seconds": facts["seconds"]})
        print(
            f"{share:.2%} of {total:.4f} s hidden; {seen} of {messages:,} messages were waited for from their start, "
            f"{exposed:.4f} s in all; the run took {facts['seconds']:.1f} s",
            flush=True,
        )
    return {"tokens": arguments.tokens, "share": statistics.median(run["share"] for run in runs), "runs": runs}


def hops_of_rank(arguments: argparse.Namespace) -> int:
    """What every rank does."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.size % 2:
        raise UserError(f"{comm.size} ranks cannot send in pairs; start an even number")
    sizes = [measure(comm, size, arguments.seconds) for size in (TINY, *SIZES)]
    own = own_cost(MPI.COMM_SELF)
    if comm.rank == 0:
        tiny = sizes[0]["quick_us"]
        figures = {
            "mpi": mpi.library_version(),
            "python": platform.python_version(),
            "ranks": comm.size,
            "sizes": sizes,
            "python_us_per_hop": {way: tiny[way] - tiny["bare"] for way in WAYS[2:]},
            "one_rank_us": own,
            "checksum_us": {str(size): checksum_us(size) for size in SIZES},
        }
        show(figures)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def measure(comm: Any, size: int, seconds: float) -> dict[str, Any]:
    """Medians of all ways for bodies of `size` bytes; the times of pairs are put together."""
    peer, asks = comm.rank ^ 1, comm.rank % 2 == 0
    room = Room(0, size)
    plain, summed = (MpiTransport(comm.Dup(), Terms(job=1, summed=on)) for on in (False, True))
    ends: dict[str, End] = {
        "MPI waits": BareEnd(plain, peer, room, own_waiting=False),
        "bare": BareEnd(plain, peer, room, own_waiting=True),
        "transport": TransportEnd(plain, peer, room),
        "with checksum": TransportEnd(summed, peer, room),
    }
    plain.connect()
    summed.connect()
    for end in ends.values():
        for _ in range(WARM_UP):
            trip(end, asks)
    start = time.perf_counter()
    for end in ends.values():
        trip(end, asks)
    rounds = comm.bcast(max(15, min(5000, int(seconds / (time.perf_counter() - start)))))
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, end in ends.items():
            taken[way].append(trip(end, asks) / 2)
    for end in ends.values():
        end.close()
    plain.close()
    summed.close()
    everyone = comm.allgather(taken if asks else {way: [] for way in WAYS})
    times = {way: sorted(t * 1e6 for rank in everyone for t in rank[way]) for way in WAYS}
    us = {way: statistics.median(times[way]) for way in WAYS}
    quick = {way: times[way][len(times[way]) // 10] for way in WAYS}
    return {
        "bytes": size,
        "rounds": rounds,
        "us": us,
        "quick_us": quick,
        "to_bare": {way: us[way] / us["bare"] for way in WAYS},
        "quick_to_bare": {way: quick[way] / quick["bare"] for way in WAYS},
    }


def trip(end: End, asks: bool) -> float:
    """Seconds of one message there and one back."""
    start = time.perf_counter()
    if asks:
        end.send()
        end.receive()
    else:
        end.receive()
        end.send()
    return time.perf_counter() - start


class End(Protocol):
    """One end of a ping-pong."""

    def send(self) -> None: ...

    def receive(self) -> None: ...

    def close(self) -> None: ...


class BareEnd:
    """Persistent requests, nothing else. `own_waiting`: as the transport waits, else as MPI does."""

    def __init__(self, transport: MpiTransport, peer: int, room: Room, own_waiting: bool) -> None:
        tag = 1 if own_waiting else 2
        out, into = HostBuffer(room), HostBuffer(room)
        out.memory[:], into.memory[:] = 1, 2  # pages that were never written to are all one page
        self._send = transport.comm.Send_init(out.memory, dest=peer, tag=tag)
        self._receive = transport.comm.Recv_init(into.memory, source=peer, tag=tag)
        if own_waiting:
            self._wait: Callable[[Any], object] = lambda request: transport.wait(request.Test, peer, "a message")
        else:
            self._wait = lambda request: request.Wait()
        self._receive.Start()

    def send(self) -> None:
        self._wait(self._send)  # that it was sent before has left; a request never started has
        self._send.Start()

    def receive(self) -> None:
        self._wait(self._receive)
        self._receive.Start()

    def close(self) -> None:
        self._wait(self._send)
        self._receive.Cancel()
        self._receive.Wait()
        self._send.Free()
        self._receive.Free()


class TransportEnd:
    """What a run uses."""

    def __init__(self, transport: MpiTransport, peer: int, room: Room) -> None:
        self._sender = transport.sender(peer, 3, room, 1, "a benchmark")
        self._receiver = transport.receiver(peer, 3, room, 1, "a benchmark")
        self._room = room
        self._sent = self._received = 0
        self._sender.buffer().body[:] = 1

    def send(self) -> None:
        self._sender.buffer()
        self._sender.send(self._sent, self._room.body)
        self._sent += 1

    def receive(self) -> None:
        self._receiver.wait(self._received)
        self._receiver.release()
        self._received += 1

    def close(self) -> None:
        self._sender.flush()
        self._sender.close()
        self._receiver.close()


def own_cost(comm: Any) -> dict[str, float]:
    """us of buffer + send + wait + release where the message is there at once, sent to the own rank, and of the same
    calls of MPI alone. CPU time of this thread."""
    room = Room(0, TINY)
    plain, summed = (MpiTransport(comm.Dup(), Terms(job=1, summed=on)) for on in (False, True))
    ends: dict[str, End] = {
        "bare": BareEnd(plain, 0, room, own_waiting=True),
        "transport": TransportEnd(plain, 0, room),
        "with checksum": TransportEnd(summed, 0, room),
    }
    taken: dict[str, list[float]] = {way: [] for way in ends}
    for _ in range(BATCHES):
        for way, end in ends.items():
            start = time.thread_time()
            for _ in range(LOOPS):
                end.send()
                end.receive()
            taken[way].append((time.thread_time() - start) / LOOPS * 1e6)
    for end in ends.values():
        end.close()
    return {way: statistics.median(times) for way, times in taken.items()}


def checksum_us(size: int) -> float:
    """us of the checksum alone."""
    memory = np.ones(size, dtype=np.uint8)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        xxh3_64_intdigest(memory.data)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def show(figures: dict[str, Any]) -> None:
    """The table."""
    print(f"{figures['ranks']} ranks, {figures['mpi']}; us of one way: medians, then the tenth quickest of a hundred")
    print(
        f"{'bytes':>12} {'MPI waits':>10} {'bare':>9} {'transport':>9} {'x bare':>6} {'summed':>9} {'x bare':>6} | ",
        end="",
    )
    print(f"{'MPI waits':>10} {'bare':>9} {'transport':>9} {'x bare':>6} {'summed':>9} {'x bare':>6} {'GB/s':>6}")
    for entry in figures["sizes"]:
        print(f"{entry['bytes']:>12,} ", end="")
        for us, ratio in ((entry["us"], entry["to_bare"]), (entry["quick_us"], entry["quick_to_bare"])):
            print(f"{us['MPI waits']:10.1f} {us['bare']:9.1f} ", end="")
            for way in WAYS[2:]:
                print(f"{us[way]:9.1f} {ratio[way]:6.2f} ", end="")
            print("| " if us is entry["us"] else "", end="")
        print(f"{(ENVELOPE_BYTES + entry['bytes']) / entry['quick_us']['transport'] / 1e3:6.2f}")
    own = figures["one_rank_us"]
    for way in WAYS[2:]:
        print(
            f"{way}: {figures['python_us_per_hop'][way]:.1f} us per hop more than bare ({TINY} bytes, the quick ones); "
            f"on one rank alone {own[way] - own['bare']:.1f} us of its processor more"
        )
    sums = ", ".join(f"{int(size):,} bytes {us:.1f} us" for size, us in figures["checksum_us"].items())
    print(f"checksum alone: {sums}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
