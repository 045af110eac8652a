"""Two ranks without a launcher, for many short trials of the verbs transport: forked, and joined by a socket.

MPI takes seconds to start in the laboratory, and its mpirun ends a rank whose neighbour has died before the transport
has shown that it would notice by itself. `Wire` is as much of a communicator as the transport uses to introduce the
ranks to each other; the parcels go through the ports.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "roce"))

import hop_program

from rwkvmpi.errors import FabricError, UserError
from rwkvmpi.grid.transport import Terms
from rwkvmpi.grid.verbs.door import pyverbs
from rwkvmpi.grid.verbs.transport import VerbsTransport

PAUSE_S = 0.01  # the longest of the pauses that the ranks make here and there
_ALLGATHER = -1  # a tag that no message has


class Wire:
    """A communicator of two ranks over a socket, of the calls that the verbs transport makes."""

    size = 2

    def __init__(self, rank: int, end: socket.socket) -> None:
        self.rank = rank
        self._end = end
        self._inbox: dict[int, list[Any]] = {}
        self._bytes = b""

    def allgather(self, value: Any) -> list[Any]:
        """Both ranks' values."""
        self.send(value, 1 - self.rank, _ALLGATHER)
        theirs = self.recv(1 - self.rank, _ALLGATHER)
        return [value, theirs] if self.rank == 0 else [theirs, value]

    def Iallgather(self, mine: np.ndarray, everybodys: np.ndarray) -> _Request:
        """Both ranks' rows, in time."""
        self.send(mine.copy(), 1 - self.rank, _ALLGATHER)
        everybodys[self.rank] = mine

        def take(theirs: np.ndarray) -> None:
            everybodys[1 - self.rank] = theirs

        return _Request(self, _ALLGATHER, take)

    def isend(self, value: Any, dest: int, tag: int = 0) -> _Request:
        """Send an object; a small one, that the socket takes at once."""
        self.send(value, dest, tag)
        return _Request(self, None)

    def Isend(self, values: np.ndarray, dest: int, tag: int = 0) -> _Request:
        """Send an array."""
        return self.isend(values.copy(), dest, tag)

    def Irecv(self, place: np.ndarray, source: int, tag: int = 0) -> _Request:
        """Receive an array, in time."""

        def take(values: np.ndarray) -> None:
            place[:] = values

        return _Request(self, tag, take)

    def improbe(self, source: int, tag: int = 0) -> _Message | None:
        """A message that is here."""
        self.look()
        return _Message(self._inbox[tag].pop(0)) if self._inbox.get(tag) else None

    def send(self, value: Any, dest: int, tag: int = 0) -> None:
        """Send an object. A neighbour that is gone will never read it, which is for the transport to find out."""
        data = pickle.dumps((tag, value))
        try:
            self._end.sendall(struct.pack("<q", len(data)) + data)
        except OSError:
            return

    def recv(self, source: int, tag: int = 0) -> Any:
        """Wait for an object."""
        while (message := self.improbe(source, tag)) is None:
            time.sleep(1e-3)
        return message.recv()

    def look(self) -> None:
        """Take in what the socket has."""
        while select.select([self._end], [], [], 0)[0]:
            try:
                data = self._end.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                break  # the neighbour is gone; what it said before still counts
            self._bytes += data
        while len(self._bytes) >= 8 and len(self._bytes) >= (end := 8 + struct.unpack("<q", self._bytes[:8])[0]):
            tag, value = pickle.loads(self._bytes[8:end])
            self._inbox.setdefault(tag, []).append(value)
            self._bytes = self._bytes[end:]


class _Message:
    def __init__(self, value: Any) -> None:
        self._value = value

    def recv(self) -> Any:
        return self._value


class _Request:
    """Something under way; done at once when there is no tag to wait for."""

    def __init__(self, wire: Wire, tag: int | None, take: Callable[[Any], None] = lambda value: None) -> None:
        self._wire, self._tag, self._take = wire, tag, take

    def Test(self) -> bool:
        if self._tag is not None:
            message = self._wire.improbe(1 - self._wire.rank, self._tag)
            if message is None:
                return False
            self._take(message.recv())
            self._tag = None
        return True

    def test(self) -> tuple[bool, None]:
        return self.Test(), None


class Pair:
    """The two processes of one trial. `ready()`: both are connected. `ended()`: what each said, or became of it."""

    def __init__(self, seed: int, rounds: int, nbytes: int, deadline_s: float, environment: dict[str, str]) -> None:
        pyverbs()  # once here, not in every child
        ends = socket.socketpair()
        self.pids: list[int] = []
        self._said: list[int] = []
        self._codes: dict[int, int] = {}
        self._heard = {0: b"", 1: b""}
        for rank in (0, 1):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                ends[1 - rank].close()
                os.environ.update(environment, RWKVMPI_RDMA_PORTS=f"rxe{rank}:1")
                _be_rank(Wire(rank, ends[rank]), write, seed, rounds, nbytes, deadline_s)
            os.close(write)
            self.pids.append(pid)
            os.set_blocking(read, False)
            self._said.append(read)
        for end in ends:
            end.close()

    def alive(self) -> list[int]:
        """The ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self._codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in (0, 1) if rank not in self._codes]

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank that has not ended."""
        if rank in self.alive():
            os.kill(self.pids[rank], number)

    def end(self) -> None:
        """Kill what is left of it."""
        for rank in (0, 1):
            self.signal(rank, signal.SIGKILL)
        while self.alive():
            time.sleep(0.01)

    def ready(self) -> bool:
        """Whether both ranks have connected."""
        return all(b"\n" in self._listen(rank) for rank in (0, 1))

    def ended(self) -> list[dict[str, Any]]:
        """What the ranks said at their end; all must have ended."""
        results = []
        for rank, said in enumerate(self._said):
            lines = self._listen(rank).decode().splitlines()
            os.close(said)
            told = json.loads(lines[-1]) if lines else {}
            nothing = {"outcome": "killed", "error": f"exit code {self._codes.get(rank)}", "rounds": 0}
            results.append(told if "outcome" in told else nothing)
        return results

    def _listen(self, rank: int) -> bytes:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._said[rank], 1 << 16):
                self._heard[rank] += data
        return self._heard[rank]


def _be_rank(wire: Wire, said: int, seed: int, rounds: int, nbytes: int, deadline_s: float) -> None:
    """The whole life of a rank; never returns."""
    result: dict[str, Any] = {"outcome": "ok", "error": "", "rounds": 0}
    try:
        terms = Terms(job=seed, deadline_s=deadline_s, summed=True)
        transport = VerbsTransport(wire, terms)
        terms.idle = transport.tick
        rank = hop_program.Rank(transport, wire.rank, seed, nbytes, PAUSE_S)
        transport.connect()
        os.write(said, b'{"ready": true}\n')
        for number in range(rounds):
            rank.round(number)
            transport.tick()
            result["rounds"] = number + 1
        rank.end()
        transport.close()
    except (FabricError, UserError) as error:
        result |= {"outcome": type(error).__name__, "error": str(error)}
    except BaseException as error:
        result |= {"outcome": type(error).__name__, "error": "".join(traceback.format_exception(error))}
    os.write(said, json.dumps(result).encode())
    os._exit(0)
