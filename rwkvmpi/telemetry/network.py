"""Samples over the network: from every rank to the exchange in rank 0's process, and from there to all who watch.

    ranks (PUB) -> senders' port (XSUB)  exchange  watchers' port (XPUB) -> watchers (SUB)

The exchange is a loop of ZeroMQ's own in a thread that never runs Python. What watchers subscribe to travels up to the
ranks, so as long as nobody watches nothing is sent at all. Nobody waits for anybody: a queue that is full drops.

Who may do what. The ports lie on all interfaces, since a login node may be on any of them, and clusters share their
networks among users; so both speak CURVE (encrypted, and the server proves who it is). Each port has a key pair of its
own, made anew at every start of the job. CURVE's first message can only be formed by who knows the server's public key,
and that key never travels in the clear, so here it is the ticket, and no list of clients is needed:

- the watchers' key stands in RUN/logs/telemetry/endpoint.json, mode 0600. Who cannot read that file cannot watch. A
  watcher can send nothing but subscriptions of at most 1,024 bytes: it injects no samples, reaches no other watcher.
- the senders' key is never written anywhere; it goes over MPI to the ranks alone. So samples come from ranks only, and
  a watcher, who has the other key, is a stranger at this port.
- somebody else who listens at the port of a job that has ended cannot play its exchange: the secret keys were in rank
  0's memory only.

What is left: strangers can open connections and say nothing useful; those are dropped after some seconds. MPI's own
ports in the same process are as open as that.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkvmpi.telemetry import files
from rwkvmpi.telemetry.sample import MAX_BYTES

OPEN_WITHIN_S = 5.0
_TOUCH_S = 0.7  # for a TCP connection to one address
_LINGER_MS = 100
_MAX_ADDRESSES = 8
_RETRY_S = (10.0, 300.0)
_OWN_FILES, _SPARE_FILES = 64, 128


class Exchange:
    """Rank 0's: takes samples from the ranks, gives them to watchers. Raises nothing after the constructor."""

    def __init__(self, run: Path, size: int, attempt: int) -> None:
        """Opens both ports and writes endpoint.json. ImportError without pyzmq; OSError or RuntimeError: no network.

        When the file cannot be written (a full disk) `keep` tries again.
        """
        _make_room(size)
        self._run, self._size = run, size
        self._context: Any = None
        self._failure: BaseException | None = None
        self._published: dict[str, Any] = {}
        self._for_ranks: dict[str, Any] = {}
        self._written = False
        self._common = {"host": platform.node(), "addresses": local_addresses()}
        opened = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(opened, attempt), name="exchange", daemon=True)
        self._thread.start()
        if not opened.wait(OPEN_WITHIN_S):
            self._failure = TimeoutError(f"the ports were not open after {OPEN_WITHIN_S:.0f} s")
        if self._failure is not None:
            raise self._failure
        self.keep()

    @property
    def endpoint(self) -> dict[str, Any]:
        """What a rank needs to send: host, addresses, port and key of the senders' port. Not for any file."""
        return dict(self._for_ranks)

    def keep(self) -> None:
        """Write endpoint.json, unless it is there; somebody may have removed it."""
        with contextlib.suppress(OSError):
            if not self._written or not (files.folder_of(self._run) / files.ENDPOINT).exists():
                files.write_endpoint(self._run, self._published)
                self._written = True

    def close(self, within_s: float) -> None:
        """Remove endpoint.json, end the thread and close the ports; waits at most so long."""
        files.remove_endpoint(self._run, self._published)
        # Ending the context ends the proxy, and waits until its thread has closed the sockets.
        ending = threading.Thread(target=self._context.term, name="exchange-end", daemon=True)
        ending.start()
        ending.join(within_s)

    def _serve(self, opened: threading.Event, attempt: int) -> None:
        sockets: list[Any] = []
        try:
            from rwkvmpi.cluster.pinning import free_this_thread

            with contextlib.suppress(OSError):
                free_this_thread()  # ZeroMQ's own threads start where this one may run
            import zmq

            self._context = zmq.Context(io_threads=1)
            # Linger lets the last samples out; strangers have 5 s to say the right thing.
            common = {"LINGER": _LINGER_MS, "BACKLOG": 1024, "HANDSHAKE_IVL": 5000, "TCP_KEEPALIVE": 1}
            for kind, options in (
                (zmq.XSUB, {"RCVHWM": 4, "MAXMSGSIZE": MAX_BYTES}),
                (zmq.XPUB, {"SNDHWM": max(64, 3 * self._size), "MAXMSGSIZE": 1024, **_BEATS}),
            ):
                server = self._context.socket(kind)
                sockets.append(server)
                public, secret = zmq.curve_keypair()
                server.curve_secretkey, server.curve_server = secret, True
                for name, value in {**common, **options}.items():
                    server.setsockopt(getattr(zmq, name), value)
                address = {**self._common, "port": _bind(server), "key": public.decode()}
                if kind == zmq.XSUB:
                    self._for_ranks = address
                else:
                    self._published = {**address, "attempt": attempt, "pid": os.getpid(), "time": time.time()}
            opened.set()
            zmq.proxy(*sockets)
        except Exception as error:  # the context's end on closing; before that, the constructor raises it
            self._failure = error
        finally:
            for server in sockets:
                server.close()
            opened.set()


class Sender:
    """A rank's way to the exchange; belongs to the thread that uses it. Never waits but for a touch of each address."""

    def __init__(self, endpoint: dict[str, Any]) -> None:
        """endpoint: what `Exchange.endpoint` gave on rank 0. ImportError without pyzmq."""
        import zmq

        self._zmq, self._endpoint = zmq, endpoint
        self._context: Any = None
        self._socket: Any = None
        self._try_at, self._pause_s = 0.0, _RETRY_S[0]

    def send(self, data: bytes) -> bool:
        """Hand a sample over; False when the exchange was never reached. It may be dropped all the same."""
        if self._socket is None and time.monotonic() >= self._try_at:
            self._connect()
        if self._socket is None:
            return False
        with contextlib.suppress(self._zmq.Again):
            self._socket.send(data, self._zmq.NOBLOCK)
        return True

    def close(self) -> None:
        """Gives the last sample a moment to leave."""
        if self._context is not None:
            self._context.destroy(linger=_LINGER_MS)

    def _connect(self) -> None:
        address = next(touched(self._endpoint), None)
        if address is None:
            self._try_at = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _RETRY_S[1])
            return
        zmq = self._zmq
        self._context = zmq.Context(io_threads=1)
        sender = self._context.socket(zmq.PUB)
        options = {"SNDHWM": 4, "RECONNECT_IVL": 1000, "RECONNECT_IVL_MAX": 30_000, "TCP_KEEPALIVE": 1}
        connect(sender, self._endpoint, address, **options)
        self._socket = sender


def connect(client: Any, endpoint: dict[str, Any], address: str, **options: int) -> None:
    """Set a fresh PUB or SUB socket's options, key and peer; `address` is one of the endpoint's. Does not wait."""
    import zmq

    client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
    client.curve_serverkey = endpoint["key"].encode()
    for name, value in options.items():
        client.setsockopt(getattr(zmq, name), value)
    client.setsockopt(zmq.IPV6, int(":" in address))
    client.connect(f"tcp://[{address}]:{endpoint['port']}" if ":" in address else f"tcp://{address}:{endpoint['port']}")


def touched(endpoint: dict[str, Any]) -> Iterator[str]:
    """The addresses of an endpoint at which something answers, the likeliest first; each is tried when asked for."""
    for address in candidates(endpoint):
        if touch(address, endpoint["port"]):
            yield address


def candidates(endpoint: dict[str, Any]) -> list[str]:
    """The loopback on the same host, then the host's name, then its addresses."""
    names = ["127.0.0.1"] if endpoint["host"] == platform.node() else []
    return list(dict.fromkeys([*names, endpoint["host"], *endpoint["addresses"][:_MAX_ADDRESSES]]))


def touch(address: str, port: int) -> bool:
    """Whether something accepts a TCP connection there, soon."""
    try:
        socket.create_connection((address, port), timeout=_TOUCH_S).close()
    except (OSError, ValueError):  # ValueError: a host name that cannot be one
        return False
    return True


def local_addresses() -> list[str]:
    """This node's addresses on interfaces that are up, IPv4 first; no loopback, no link-local ones."""
    import psutil

    up = {name for name, facts in psutil.net_if_stats().items() if facts.isup}
    found = [item for name, items in psutil.net_if_addrs().items() if name in up for item in items]
    v4 = [item.address for item in found if item.family == socket.AF_INET and not item.address.startswith("127.")]
    v6 = [item.address for item in found if item.family == socket.AF_INET6]
    v6 = [address for address in v6 if address != "::1" and not address.lower().startswith("fe80")]
    return (v4 + v6)[:_MAX_ADDRESSES]


_BEATS = {"HEARTBEAT_IVL": 10_000, "HEARTBEAT_TIMEOUT": 30_000}  # so that watchers on dead nodes are forgotten


def _bind(server: Any) -> int:
    """Listen on all interfaces at a port of the system's choice; its number."""
    import zmq

    try:
        server.setsockopt(zmq.IPV6, 1)
        server.bind("tcp://*:*")
    except zmq.ZMQError:  # a node without IPv6
        server.setsockopt(zmq.IPV6, 0)
        server.bind("tcp://*:*")
    return int(server.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def _make_room(size: int) -> None:
    """Every rank takes a file descriptor of rank 0's. The run's own must not get scarce by that: raise the limit as far
    as is allowed. RuntimeError when that is not enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    wanted = used + size + _OWN_FILES + max(_SPARE_FILES, size)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise RuntimeError(f"{size} ranks need {wanted} open files, and the hard limit (ulimit -Hn) is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
