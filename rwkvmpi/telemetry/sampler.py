"""The thread in every rank that says once a second what the rank is doing.

Costs, measured on a slow core: 0.5 ms of a rank's processor time per sample, once a second (`sampling_s` counts it in
every run). The exchange costs rank 0 nothing while nobody watches; while somebody does, 13 us per sample: 0.4% of one
core with 300 ranks, and not much more with 1,000, which take turns.

Nothing it does may harm the run. It wakes once a second for a fraction of a millisecond and sleeps otherwise; the
network drops what it cannot take; files are small and written in place; a folder that cannot be written, a full disk,
a network that is gone or a missing pyzmq cost one line in the rank's log file, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkvmpi.cluster import logs
from rwkvmpi.telemetry import files, network
from rwkvmpi.telemetry.sample import Sample, decode, encode

EVERY_S = 1.0
RATE_OVER_S = 10.0
_FILE_EVERY_S, _FILES_PER_S = 5.0, 50
_RANKS_AT_A_TIME, _MOST_TURNS = 300, 3  # of more ranks a half or a third sends at a time: rank 0 must pass it all on
_FAILURES = 5  # facts that fail so often in a row end telemetry
_CLOSE_S = (0.6, 0.3)  # the thread, then the exchange
_FULL = {errno.ENOSPC, errno.EDQUOT}


def begin(comm: Any, folder: Path, facts: Callable[[], dict[str, Any]], mode: str, attempt: int) -> Telemetry:
    """Start telemetry on every rank; collective (`comm` None: this process alone). `close` it at the end.

    comm: an MPI communicator; only rank, size and bcast are used
    folder: the run folder; RUN/logs must be there
    facts: what the rank knows of itself, see `Telemetry`
    mode: "on": network and files; "files"; "off": nothing at all
    Raises nothing but what comm.bcast raises; waits at most 5 s, on rank 0, for the ports.
    """
    rank, size = (comm.rank, comm.size) if comm is not None else (0, 1)
    telemetry = Telemetry(folder, rank, size, facts, mode, attempt=attempt)
    if comm is not None and mode == "on":
        endpoint = comm.bcast(telemetry.endpoint())
        if rank:
            telemetry = Telemetry(folder, rank, size, facts, mode, endpoint, attempt=attempt)
    telemetry.start()
    return telemetry


class Telemetry:
    """One rank's. On rank 0 the constructor opens the exchange; the others' get its `endpoint`."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        facts: Callable[[], dict[str, Any]],
        mode: str = "on",
        endpoint: dict[str, Any] | None = None,
        *,
        attempt: int,
    ) -> None:
        """facts: called once a second in the thread, so it may only read plain values: no MPI, nothing that waits for
        the device, no lock that is held during computation. It gives the keys of a sample (see `sample`) but for those
        that are added here: rank, ranks, time, and if it does not give them itself attempt, host, pid, rss_bytes,
        tokens_per_second (over about 10 s, from tokens) and sampling_s (CPU seconds of this thread so far). When it
        fails the sample is left out; five failures in a row end this rank's telemetry.
        """
        self._folder, self._rank, self._size, self._facts, self._mode = folder, rank, size, facts, mode
        self._said: set[str] = set()
        self._constant = {"host": platform.node(), "pid": os.getpid(), "attempt": attempt}
        self._endpoint = endpoint if mode == "on" else None
        self._exchange = self._open_exchange(attempt) if mode == "on" and rank == 0 else None
        self._history: deque[tuple[float, int]] = deque(maxlen=int(RATE_OVER_S / EVERY_S) + 1)
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._file_every_s = max(_FILE_EVERY_S, size / _FILES_PER_S)
        self._file_at = 0.0 if rank == 0 else time.monotonic() + self._file_every_s * rank / size
        self._turns = min(_MOST_TURNS, 1 + (size - 1) // _RANKS_AT_A_TIME)
        self._checked = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def endpoint(self) -> dict[str, Any] | None:
        """On rank 0: what the other ranks need to send, a plain dict with a secret in it; None without a network."""
        return self._exchange.endpoint if self._exchange is not None else None

    def start(self) -> None:
        """Begin to sample; nothing when the mode is off."""
        if self._mode != "off" and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Take a last sample and end; waits less than a second, whatever is stuck. May be called twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S[0])
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            with contextlib.suppress(Exception):
                exchange.close(_CLOSE_S[1])

    def _open_exchange(self, attempt: int) -> network.Exchange | None:
        try:
            return network.Exchange(self._folder, self._size, attempt)
        except ImportError as error:
            self._say("network", f"pyzmq is missing ({error}); telemetry goes into files only")
        except Exception as error:
            self._say("network", f"telemetry goes into files only: {error}")
        return None

    def _run(self) -> None:
        sender = None
        try:
            from rwkvmpi.cluster.pinning import free_this_thread

            with contextlib.suppress(OSError):
                free_this_thread()
            sender = self._make_sender()
            self._loop(sender)
        except Exception as error:
            self._say("end", f"telemetry of this rank ends: {type(error).__name__}: {error}")
        finally:
            if sender is not None:
                with contextlib.suppress(Exception):
                    sender.close()

    def _make_sender(self) -> network.Sender | None:
        endpoint = self.endpoint() or self._endpoint
        if endpoint is None:
            return None
        try:
            return network.Sender(endpoint)
        except ImportError as error:
            self._say("network", f"pyzmq is missing ({error}); telemetry of this rank goes into files only")
            return None

    def _loop(self, sender: network.Sender | None) -> None:
        failures = 0
        wait_s = 0.0
        last = False
        while not last:
            last = self._stop.wait(wait_s)
            # All ranks wake at the same moment, the clock's full second: what disturbs one of them makes its neighbours
            # wait, so it had better disturb all at once; and the exchange passes on a bunch for a tenth of the cost.
            now = time.time()
            wait_s = EVERY_S - now % EVERY_S
            wait_s += EVERY_S if wait_s < EVERY_S / 5 else 0.0
            try:
                data = self._sample()
                failures = 0
            except Exception:
                failures += 1
                if failures >= _FAILURES:
                    raise
                continue
            if sender is not None and (last or (round(now / EVERY_S) + self._rank) % self._turns == 0):
                sender = self._send(sender, data)
            self._write(data, last)

    def _sample(self) -> bytes:
        now = time.monotonic()
        sample: Sample = {"sampling_s": round(time.thread_time(), 4), **self._constant, **self._facts()}
        sample.update(rank=self._rank, ranks=self._size, time=time.time())
        if "rss_bytes" not in sample:
            sample["rss_bytes"] = self._resident_bytes()
        if "tokens_per_second" not in sample and "tokens" in sample:
            self._history.append((now, sample["tokens"]))
            then, tokens = self._history[0]
            sample["tokens_per_second"] = (sample["tokens"] - tokens) / (now - then) if now > then else 0.0
        data = encode(sample)
        if not self._checked:  # once: what readers would refuse all the time is a mistake that should be seen
            decode(data)
            self._checked = True
        return data

    def _send(self, sender: network.Sender, data: bytes) -> network.Sender | None:
        """Send; the sender, or None when the network is given up."""
        try:
            if not sender.send(data):
                self._say("network", "rank 0 cannot be reached for telemetry; it goes into files, and is tried again")
            return sender
        except Exception as error:
            self._say("network", f"telemetry goes into files only: {error}")
            with contextlib.suppress(Exception):
                sender.close()
            return None

    def _write(self, data: bytes, last: bool) -> None:
        now = time.monotonic()
        if now < self._file_at - EVERY_S / 2 and not last:
            return
        self._file_at = now + self._file_every_s
        try:
            files.write_sample(self._folder, self._rank, data)
        except OSError as error:
            if error.errno not in _FULL:  # there the log file has no room either
                self._say("files", f"telemetry cannot be written: {error}")
        if self._exchange is not None:
            self._exchange.keep()

    def _resident_bytes(self) -> int | None:
        try:
            with open("/proc/self/statm", "rb") as file:
                return int(file.read().split()[1]) * self._page
        except (OSError, ValueError, IndexError):
            return None

    def _say(self, about: str, text: str) -> None:
        """One line in the log file, once about each thing."""
        if about not in self._said:
            self._said.add(about)
            logging.getLogger(logs.LOGGER).debug("%s", text)
