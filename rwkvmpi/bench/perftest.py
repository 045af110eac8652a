"""Raw verbs between the ports of two ranks: perftest's ib_write_lat and ib_write_bw, where they are installed.

What they show is the most that any transport could reach on the same link. They run as children of the two ranks and
find each other over TCP; the ranks tell each other host, port and the end over MPI, and sleep meanwhile.
"""

from __future__ import annotations

import math
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rwkvmpi.bench.hops import gathered, in_turn
from rwkvmpi.cluster import rdma
from rwkvmpi.errors import UserError

LATENCY, BANDWIDTH = "ib_write_lat", "ib_write_bw"
INSTALL = "apt install perftest, or dnf install perftest"
MOST_ROUNDS, FEWEST_ROUNDS = 1000, 20
BYTES_PER_SIZE = 64 << 20
LIMIT_S = 60.0  # of one program with one size
CONNECT_S = 10.0  # until the partner's program listens
RETRY_EVERY_S = 0.2
LOOK_EVERY_S = 5e-3
_TYPICAL_US, _AVERAGE_GBITS = 4, 3  # columns of the two programs' tables


def reason() -> str:
    """Why perftest cannot be run on this machine, with the way out; "" if it can."""
    if not rdma.ports():
        return "this machine has no RDMA device"
    missing = [name for name in (LATENCY, BANDWIDTH) if shutil.which(name) is None]
    return f"no {' and no '.join(missing)} on PATH ({INSTALL})" if missing else ""


def measure(comm: Any, sizes: Mapping[str, int], local_rank: int, gpu: str = "") -> tuple[list[dict[str, Any]], str]:
    """Between every rank and the next, for writes of these `sizes` (bytes, by name): (pairs, reason).

    Collective; rank 0 gets the pairs, the others []. reason: why there are none, or what failed first; "" if nothing
    did. A pair has `ranks`, `nodes`, `ports` and `sizes`: by name `bytes`, `seconds` of one way, `bytes_per_second`.
    """
    why, own = reason(), _Place(platform.node(), "", "", [])
    if not why:
        try:
            own = _place(rdma.port_of_rank(local_rank, gpu))
        except UserError as refusal:
            why = str(refusal)
    if lacking := _first(comm, f"{why} ({own.node})" if why else ""):
        return [], lacking
    places = comm.allgather(own)
    found, failed = [], ""
    for partner, asks in in_turn(comm):
        if not asks:
            _answer(comm, partner, own.options, sizes)
            continue
        there = places[partner]
        measured, error = _ask(comm, partner, own, "127.0.0.1" if there.node == own.node else there.address, sizes)
        found.append(
            {
                "ranks": [comm.rank, partner],
                "nodes": [own.node, there.node],
                "ports": [own.port, there.port],
                "sizes": measured,
            }
        )
        failed = failed or (f"between ranks {comm.rank} and {partner} {error}" if error else "")
    return gathered(comm, found), _first(comm, failed)


class _Place(NamedTuple):
    """Where one rank's programs run. address: for TCP; options: how both programs are told to use the port."""

    node: str
    address: str
    port: str
    options: list[str]


def _place(port: rdma.Port) -> _Place:
    options, address = ["-d", port.device, "-i", str(port.number), "-F"], platform.node()
    if port.link_layer == "Ethernet":
        gid = rdma.choose_gid(port, rdma.wanted_gid_index())
        address = str(gid.ip) if gid.ip.version == 4 else address
        options += ["-x", str(gid.index)]
        if (traffic_class := rdma.wanted_traffic_class()) is not None:
            options += ["--tclass", str(traffic_class)]
    return _Place(platform.node(), address, port.name, options)


def typical_seconds(text: str) -> float:
    """One way, of what ib_write_lat printed. ValueError where it has no table."""
    return _column(text, _TYPICAL_US) * 1e-6


def bytes_per_second(text: str) -> float:
    """Of what ib_write_bw --report_gbits printed. ValueError where it has no table."""
    return _column(text, _AVERAGE_GBITS) * 1e9 / 8


def _column(text: str, column: int) -> float:
    for line in reversed(text.splitlines()):
        words = line.split()
        if len(words) > column and words[0].isdigit():
            value = float(words[column])
            if 0 < value < math.inf:
                return value
            raise ValueError(f"it measured {words[column]}: it does not know this processor's clock")
    raise ValueError("it printed no table")


def _programs(options: list[str], nbytes: int) -> list[list[str]]:
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, BYTES_PER_SIZE // nbytes))
    common = [*options, "-s", str(nbytes), "-n", str(rounds)]
    return [[LATENCY, *common], [BANDWIDTH, "--report_gbits", *common]]


def _ask(
    comm: Any, partner: int, own: _Place, host: str, sizes: Mapping[str, int]
) -> tuple[dict[str, dict[str, float]], str]:
    """The client's side for all sizes: what was measured, and what ended it early."""
    measured: dict[str, dict[str, float]] = {}
    for name, nbytes in sizes.items():
        latency, bandwidth = _programs(own.options, nbytes)
        seconds, error = _client(comm, partner, latency, host, typical_seconds)
        rate = 0.0
        if not error:
            rate, error = _client(comm, partner, bandwidth, host, bytes_per_second)
        if error:
            return measured, error
        measured[name] = {"bytes": nbytes, "seconds": seconds, "bytes_per_second": rate}
    return measured, ""


def _client(comm: Any, partner: int, command: list[str], host: str, value: Callable[[str], float]) -> tuple[float, str]:
    """(what the program measured, "") or (0, what went wrong), which the partner is told."""
    number = _hear(comm, partner)
    found, error = 0.0, ""
    try:
        found = value(_connect([*command, "-p", str(number), host]))
    except (OSError, ValueError, subprocess.TimeoutExpired) as failure:
        error = f"{command[0]} failed: {failure}"
    comm.send(error, dest=partner)
    return found, error


def _connect(command: list[str]) -> str:
    """What the client prints; it is started again while the partner's program does not listen yet."""
    begun = time.monotonic()
    while True:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
        if done.returncode == 0:
            return done.stdout
        if "connect" not in done.stdout or time.monotonic() > begun + CONNECT_S:
            words = [line.strip() for line in done.stdout.splitlines() if line.strip(" -")]
            raise OSError(f"exit code {done.returncode}, {words[-1] if words else 'without a word'}")
        time.sleep(RETRY_EVERY_S)


def _answer(comm: Any, partner: int, options: list[str], sizes: Mapping[str, int]) -> None:
    """The server's side: a program for each of the client's, until the client says that something went wrong."""
    for nbytes in sizes.values():
        for command in _programs(options, nbytes):
            number = _free_port()
            with subprocess.Popen(
                [*command, "-p", str(number)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ) as server:
                comm.send(number, dest=partner)
                error = _hear(comm, partner)
                if error:
                    server.kill()
                else:
                    server.wait(LIMIT_S)
            if error:
                return


def _hear(comm: Any, partner: int) -> Any:
    """A message of the partner; sleeps meanwhile."""
    request = comm.irecv(source=partner)
    while True:
        there, message = request.test()
        if there:
            return message
        time.sleep(LOOK_EVERY_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _first(comm: Any, reason: str) -> str:
    """The reason of the first rank that has one, on all ranks."""
    return next(filter(None, comm.allgather(reason)), "")
