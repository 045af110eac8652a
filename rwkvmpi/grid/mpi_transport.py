"""Host memory through MPI: persistent requests, receives posted ahead."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from rwkvmpi.errors import FabricError
from rwkvmpi.grid.pulse import Pulse
from rwkvmpi.grid.transport import HostBuffer, Receiver, Room, Sender, Terms, Transport


class MpiTransport(Transport):
    """Messages on a communicator of their own, whose ranks are the grid's."""

    name = "mpi"

    def __init__(self, comm: Any, terms: Terms) -> None:
        super().__init__(comm.rank, terms)
        self.comm = comm
        self._peers: set[int] = set()
        self._nodes: list[str] = []
        self._pulse: Pulse | None = None

    def receiver(self, source: int, tag: int, room: Room, depth: int, label: str) -> Receiver:
        self._peers.add(source)
        return MpiReceiver(self, source, tag, room, depth, label)

    def sender(self, dest: int, tag: int, room: Room, depth: int, label: str) -> Sender:
        self._peers.add(dest)
        return MpiSender(self, dest, tag, room, depth, label)

    def connect(self) -> None:
        self._nodes = self.comm.allgather(platform.node())
        self.compare_clocks(self.comm, self._peers)
        self._pulse = Pulse(self.comm, sorted(self._peers))

    def tick(self) -> None:
        if self._pulse is not None:
            self.guard(self._pulse.tick)

    def silence_s(self, peer: int) -> float:
        return self._pulse.silence_s(peer) if self._pulse is not None else 0.0

    def where(self, peer: int) -> str:
        node = self._nodes[peer] if self._nodes else "another node"
        way = os.environ.get("UCX_NET_DEVICES") or "the port that MPI chose"
        return f"rank {peer} on {node}, reached through {way},"

    def close(self) -> None:
        """Ranks that are done wait for their neighbours' last sign of life here."""
        pulse = self._pulse
        if pulse is None:
            return
        pulse.take_leave()
        for peer in sorted(self._peers):
            self.wait(partial(pulse.has_left, peer), peer, "its farewell")
        self._pulse = None
        pulse.close()

    def guard(self, call: Callable[[], Any], peer: int | None = None) -> Any:
        """The call's result; what MPI raises becomes a FabricError."""
        from mpi4py import MPI

        try:
            return call()
        except MPI.Exception as error:
            whom = peer if peer is not None else min(self._peers)
            raise self.mpi_error(whom, str(error)) from error

    def mpi_error(self, peer: int, text: str) -> FabricError:
        """The error for a call of MPI that failed on the way to `peer`."""
        return self.error(
            peer,
            f"cannot be reached any more: MPI says {text!r}",
            "look whether its node and the link are up (`rwkvmpi doctor --fabric`)",
        )


class MpiReceiver(Receiver):
    """A persistent receive for each buffer, all posted from the start; messages come in the order of the buffers."""

    def __init__(self, transport: MpiTransport, peer: int, tag: int, room: Room, depth: int, label: str) -> None:
        super().__init__(transport, peer, tag, room, label)
        self._mpi = transport
        self._buffers = [HostBuffer(room, transport.terms.pin) for _ in range(depth)]
        self._requests = [transport.comm.Recv_init(b.memory, source=peer, tag=tag) for b in self._buffers]
        self._tests = [request.Test for request in self._requests]
        self._turn = 0
        for request in self._requests:
            request.Start()

    def _here(self) -> bool:
        try:
            return self._tests[self._turn]()  # type: ignore[no-any-return]
        except Exception as error:
            raise self._mpi.mpi_error(self._peer, str(error)) from error

    def _parcel(self) -> tuple[np.ndarray, np.ndarray, Any]:
        return self._buffers[self._turn].parcel

    def _whole(self, body_bytes: int) -> np.ndarray | None:
        return self._buffers[self._turn].whole(body_bytes)

    def release(self) -> None:
        self._requests[self._turn].Start()
        self._turn = (self._turn + 1) % len(self._buffers)

    def close(self) -> None:
        for request in self._requests:
            request.Cancel()
            request.Wait()
            request.Free()
        self._requests = []


class MpiSender(Sender):
    """A persistent send for each buffer, for messages of full size; shorter ones are sent by themselves."""

    def __init__(self, transport: MpiTransport, peer: int, tag: int, room: Room, depth: int, label: str) -> None:
        super().__init__(transport, peer, tag, room, label)
        self._mpi = transport
        self._buffers = [HostBuffer(room, transport.terms.pin) for _ in range(depth)]
        self._whole_sends = [transport.comm.Send_init(b.memory, dest=peer, tag=tag) for b in self._buffers]
        self._going: list[Any] = [None] * depth
        self._turn = 0

    def _free(self) -> bool:
        return self._has_left(self._turn)

    def _parcel(self) -> tuple[np.ndarray, np.ndarray, Any]:
        return self._buffers[self._turn].parcel

    def _whole(self, body_bytes: int) -> np.ndarray | None:
        return self._buffers[self._turn].whole(body_bytes)

    def _start(self, body_bytes: int) -> None:
        turn = self._turn
        if body_bytes == self._room.body:
            self._whole_sends[turn].Start()
            self._going[turn] = self._whole_sends[turn]
        else:
            message = self._buffers[turn].message(body_bytes)
            self._going[turn] = self._mpi.comm.Isend(message, dest=self._peer, tag=self._tag)
        self._turn = (turn + 1) % len(self._buffers)

    def flush(self) -> None:
        for turn in range(len(self._buffers)):
            self.waited_s += self._transport.wait(
                partial(self._has_left, turn), self._peer, f"the end of a message ({self._label})"
            )

    def close(self) -> None:
        """Everything was flushed; no more will be sent."""
        for request in self._whole_sends:
            request.Free()
        self._whole_sends = []

    def _has_left(self, turn: int) -> bool:
        request = self._going[turn]
        if request is None:
            return True
        try:
            if not request.Test():
                return False
        except Exception as error:
            raise self._mpi.mpi_error(self._peer, str(error)) from error
        self._going[turn] = None
        return True
