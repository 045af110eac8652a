"""Following a run from outside: over the network while that works, from the files of the run folder when it does not.

`follow` never fails and never gives up: the run may not have begun, may end, may be started again elsewhere, its folder
may be removed or full of rubbish.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

from rwkvmpi.telemetry import files, network
from rwkvmpi.telemetry.sample import MAX_BYTES, Sample, parse

SILENCE_S = 4.0  # without a sample over the network, after which files are read and other addresses are tried
_FILES_EVERY_S = 2.0
_TICKET_EVERY_S = 1.0
_REST_S = 5.0  # after all addresses were tried in vain
_POLL_S = 0.2
_JOIN_S = 0.9


def latest(folder: str | Path) -> dict[int, Sample]:
    """The last sample of every rank of the newest start, from the files alone; empty when there is none. No error."""
    return _of_newest_attempt(files.read_samples(folder))


def follow(folder: str | Path) -> Follower:
    """Follow the run in this folder, which need not be there yet; `close` it at the end, or use it in a with block."""
    return Follower(Path(folder))


class Follower:
    """The newest samples of a run's ranks, which a thread keeps up to date. All properties may be read at any time."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._samples: dict[int, Sample] = {}
        self._came: dict[int, float] = {}  # rank -> when its sample came here, on this process's clock
        self._by_network: float | None = None  # when the last one came that way
        self._link = _Link(run)
        self._stop = threading.Event()
        self._read_files()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)
        self._thread.start()

    def latest(self) -> dict[int, Sample]:
        """The newest sample of every rank of the newest start of the job."""
        with self._lock:
            return _of_newest_attempt(self._samples)

    def ages(self) -> dict[int, float]:
        """For every rank of `latest`: seconds since its sample came here, or since its file changed; whatever the
        nodes' clocks say. Of a file that was there before: by its time."""
        now = time.monotonic()
        with self._lock:
            return {rank: max(0.0, now - self._came[rank]) for rank in _of_newest_attempt(self._samples)}

    @property
    def way(self) -> str:
        """How the newest samples came: "network", "files", or "none" when there are none."""
        if not self._samples:
            return "none"
        return "network" if self._heard_lately() else "files"

    @property
    def age_s(self) -> float | None:
        """Seconds since the newest sample of any rank came; None when there is none."""
        return min(self.ages().values(), default=None)

    def close(self) -> None:
        """End the thread; waits less than a second."""
        self._stop.set()
        self._thread.join(_JOIN_S)

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _follow(self) -> None:
        read_at = 0.0
        while not self._stop.is_set():
            self._link.tend()
            for data in self._link.receive(_POLL_S, self._stop):
                self._take(data)
            now = time.monotonic()
            if now >= read_at and not self._everybody_is_heard():
                started = time.monotonic()
                self._read_files()
                # A thousand files on a slow file system are not read all the time.
                read_at = time.monotonic() + max(_FILES_EVERY_S, 10 * (time.monotonic() - started))
        self._link.close()

    def _take(self, data: bytes) -> None:
        sample = parse(data)
        if sample is not None:
            now = time.monotonic()
            with self._lock:
                self._by_network = now
                self._put(sample, now)

    def _read_files(self) -> None:
        found = files.read_samples(self._run)
        now, clock = time.monotonic(), time.time()
        with self._lock:
            for rank, sample in found.items():
                known = self._samples.get(rank)
                if known is None:
                    self._put(sample, now - max(0.0, clock - sample["time"]))
                elif _follows(sample, known, now - self._came[rank]):
                    self._put(sample, now)

    def _put(self, sample: Sample, came: float) -> None:
        self._samples[sample["rank"]] = sample
        self._came[sample["rank"]] = came

    def _heard_lately(self) -> bool:
        return self._by_network is not None and time.monotonic() - self._by_network < SILENCE_S

    def _everybody_is_heard(self) -> bool:
        """Whether the network alone brings the samples of all ranks."""
        if not self._heard_lately():
            return False
        samples, now = self.latest(), time.monotonic()
        wanted = max((sample["ranks"] for sample in samples.values()), default=0)
        return sum(now - self._came[rank] < SILENCE_S for rank in samples) >= wanted


class _Link:
    """The connection to the exchange, for one thread. Without pyzmq there never is one."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._ticket: dict[str, Any] | None = None
        self._look_at = self._try_at = self._quiet_since = 0.0
        self._addresses: list[str] = []
        self._context: Any = None
        self._socket: Any = None

    def tend(self) -> None:
        """Do what is due of: look for a new ticket, leave an address that says nothing, try the next one."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _TICKET_EVERY_S
            ticket = files.read_endpoint(self._run)
            if ticket is not None and ticket != self._ticket:  # of the first start, or of a new one
                self._ticket, self._addresses, self._try_at = ticket, network.candidates(ticket), now
                self._disconnect()
        if self._socket is not None and now - self._quiet_since > SILENCE_S:
            self._disconnect()
        if self._ticket is not None and self._socket is None and now >= self._try_at:
            self._try_next(self._ticket)

    def receive(self, wait_s: float, stop: threading.Event) -> list[bytes]:
        """What has come, waiting so long for the first; sleeps where there is no connection."""
        if self._socket is None:
            stop.wait(wait_s)
            return []
        import zmq

        found: list[bytes] = []
        with contextlib.suppress(zmq.ZMQError):
            if self._socket.poll(int(1000 * wait_s)):
                while len(found) < 10_000:
                    found.append(self._socket.recv(zmq.NOBLOCK))
        if found:
            self._quiet_since = time.monotonic()
        return found

    def close(self) -> None:
        self._disconnect()
        if self._context is not None:
            self._context.term()

    def _try_next(self, ticket: dict[str, Any]) -> None:
        if not self._addresses:
            self._addresses = network.candidates(ticket)
            self._try_at = time.monotonic() + _REST_S
            return
        address = self._addresses.pop(0)
        if not network.touch(address, ticket["port"]):
            return
        try:
            import zmq

            self._context = self._context or zmq.Context(io_threads=1)
            self._socket = self._context.socket(zmq.SUB)
            options = {"RCVHWM": 8192, "MAXMSGSIZE": MAX_BYTES, "LINGER": 0, "RECONNECT_IVL": 1000}
            network.connect(self._socket, ticket, address, **options)
            self._socket.subscribe(b"")
        except ImportError:
            self._ticket = None
            self._look_at = float("inf")
        except (zmq.ZMQError, ValueError):  # a key that is none, a name that cannot be resolved
            self._disconnect()
        self._quiet_since = time.monotonic()

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close(0)
            self._socket = None


def _follows(sample: Sample, known: Sample, age_s: float) -> bool:
    """Whether the sample in a rank's file is newer than the known one, which came `age_s` ago. Other starts may have
    run on other nodes with other clocks; an earlier start's file is believed only where the later one is silent."""
    if sample["attempt"] > known["attempt"]:
        return True
    return sample["time"] > known["time"] and (sample["attempt"] == known["attempt"] or age_s > SILENCE_S)


def _of_newest_attempt(samples: dict[int, Sample]) -> dict[int, Sample]:
    """Without what an earlier start on more ranks has left behind. The newest start is the one heard last, not the one
    with the highest number: --force begins to count anew."""
    newest = max(samples.values(), key=lambda sample: sample["time"], default=None)
    return {r: samples[r] for r in sorted(samples) if newest is not None and samples[r]["attempt"] == newest["attempt"]}
