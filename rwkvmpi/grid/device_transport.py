"""Bodies in a device's memory, through MPI: straight from GPU to GPU, or in pieces through the host.

Envelope and head travel as a message of the host, as in grid.mpi_transport; the body follows in messages of its own,
so that no message has its memory in two places. A body without a byte is sent all the same: the receives are posted
ahead, and every one of them must end.

Straight: one message, contiguous, from device memory to device memory; only where a trial has shown that MPI can do it
(cluster.device_probe), and then MPI finds the way: the same GPU, NVLink, or the network card.

Staged: a body is cut into pieces, each of which is copied to page-locked memory, sent, and copied to the other device,
on streams of their own. So the two copies and the way between them overlap with each other, and all three with the
computation, which only waits for what has not come when it needs it. That pays for activations; what is no larger than
a piece goes as the host's messages do, with one copy less.

Whoever fills a body waits for the device before `send`, and whoever reads one before `release`: MPI knows no streams.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from rwkvmpi.cluster.device_probe import memory_at
from rwkvmpi.grid.envelope import Envelope
from rwkvmpi.grid.mpi_transport import MpiReceiver, MpiSender, MpiTransport
from rwkvmpi.grid.transport import HostBuffer, Receiver, Room, Sender, Terms
from rwkvmpi.models.device import OVER, Device, Ticket

BODY_TAGS = 1 << 12  # added to a channel's tag, which is smaller
PIECE_BYTES = 4 << 20  # a tenth of a millisecond on a GPU's bus: far more than a message costs by itself


class DeviceTransport(MpiTransport):
    """MPI where bodies may lie in `device`'s memory. staged: through the host, in pieces of `piece_bytes`.

    Not for messages with checksums (`terms.summed`), which only the host could compute.
    """

    def __init__(
        self, comm: Any, device: Device, terms: Terms, staged: bool = False, piece_bytes: int = PIECE_BYTES
    ) -> None:
        if terms.summed:
            raise ValueError("messages between devices have no checksums")
        super().__init__(comm, terms)
        self.name = "mpi" if staged else "mpi-device"
        self.device = device
        self.staged = staged
        self._piece_bytes = piece_bytes
        self._channels: list[DeviceReceiver | DeviceSender] = []  # whose pieces must be moved on while others compute

    def receiver(self, source: int, tag: int, room: Room, depth: int, label: str) -> Receiver:
        if not self._on_device(room):
            return super().receiver(source, tag, room, depth, label)
        self._peers.add(source)
        receiver = DeviceReceiver(self, source, tag, room, depth, label)
        if self.staged:
            self._channels.append(receiver)
        return receiver

    def sender(self, dest: int, tag: int, room: Room, depth: int, label: str) -> Sender:
        if not self._on_device(room):
            return super().sender(dest, tag, room, depth, label)
        self._peers.add(dest)
        sender = DeviceSender(self, dest, tag, room, depth, label)
        if self.staged:
            self._channels.append(sender)
        return sender

    def tick(self) -> None:
        for channel in self._channels:
            channel.serve()
        super().tick()

    def pieces(self, nbytes: int) -> list[slice]:
        """How a body with room for so many bytes travels."""
        step = self._piece_bytes if self.staged else nbytes
        return [slice(first, min(first + step, nbytes)) for first in range(0, nbytes, step)]

    def _on_device(self, room: Room) -> bool:
        return room.on_device and room.body > (self._piece_bytes if self.staged else 0)


class _Body:
    """A body in the device's memory, and what MPI is given of it: itself, or memory of the host for copies."""

    def __init__(self, transport: DeviceTransport, nbytes: int) -> None:
        self._device = transport.device
        self.memory = self._device.message_memory(nbytes)
        self._host = HostBuffer(Room(0, nbytes), transport.terms.pin).parcel[2] if transport.staged else None

    def given(self, piece: slice) -> Any:
        """A piece as MPI takes it."""
        if self._host is not None:
            return self._host[piece]
        return memory_at(self.memory.data_ptr() + piece.start, piece.stop - piece.start)

    def fetch(self, piece: slice) -> Ticket:
        """Begins to make a piece ready to be sent."""
        if self._host is None or piece.start == piece.stop:
            return OVER
        return self._device.transfer(self.memory[piece], self._host[piece])

    def put(self, piece: slice) -> Ticket:
        """Begins to bring a piece that was received to where it belongs."""
        if self._host is None or piece.start == piece.stop:
            return OVER
        return self._device.transfer(self._host[piece], self.memory[piece])


class DeviceReceiver(MpiReceiver):
    """Persistent receives for each buffer: one for envelope and head, one for each piece of the body."""

    def __init__(self, transport: DeviceTransport, peer: int, tag: int, room: Room, depth: int, label: str) -> None:
        from mpi4py import MPI

        super().__init__(transport, peer, tag, Room(room.head, 0), depth, label)
        self._room = room
        self._device, self._unit, self._status = transport.device, MPI.BYTE, MPI.Status()
        self._pieces = transport.pieces(room.body)
        self._bodies = [_Body(transport, room.body) for _ in range(depth)]
        self._posted = [
            [transport.comm.Recv_init(body.given(piece), source=peer, tag=BODY_TAGS + tag) for piece in self._pieces]
            for body in self._bodies
        ]
        self._coming: deque[tuple[int, int]] = deque()  # (turn, number of the piece) of all that are to come, in order
        self._came = [0] * depth  # bytes
        self._missing = [0] * depth  # pieces
        self._copies: list[list[Ticket]] = [[] for _ in range(depth)]
        for turn in range(depth):
            self._post(turn)

    def serve(self) -> None:
        """Take what has come to its place."""
        while self._coming:
            turn, number = self._coming[0]
            try:
                if not self._posted[turn][number].Test(self._status):
                    return
            except Exception as error:
                raise self._mpi.mpi_error(self._peer, str(error)) from error
            self._coming.popleft()
            nbytes = self._status.Get_count(self._unit)
            first = self._pieces[number].start
            self._copies[turn].append(self._bodies[turn].put(slice(first, first + nbytes)))
            self._came[turn] += nbytes
            self._missing[turn] -= 1

    def release(self) -> None:
        turn = self._turn
        super().release()
        self._post(turn)

    def close(self) -> None:
        super().close()
        for turn, requests in enumerate(self._posted):
            for number, request in enumerate(requests):
                if (turn, number) in self._coming:
                    request.Cancel()
                    request.Wait()
                request.Free()
        self._posted = []
        self._coming.clear()

    def _here(self) -> bool:
        self.serve()
        return not self._missing[self._turn] and super()._here()

    def _parcel(self) -> tuple[np.ndarray, np.ndarray, Any]:
        for ticket in self._copies[self._turn]:
            self._device.follow(ticket)
        envelope, head, _ = super()._parcel()
        return envelope, head, self._bodies[self._turn].memory

    def _check(self, envelope: np.ndarray, words: Envelope, position: int) -> None:
        super()._check(envelope, words, position)
        if words.body_bytes != self._came[self._turn]:
            raise self._transport.error(
                self._peer,
                f"sent {self._came[self._turn]} bytes ({self._label}) where it announced {words.body_bytes}",
                "look at the links' counters (`rwkvmpi doctor --fabric`)",
            )

    def _post(self, turn: int) -> None:
        self._came[turn], self._missing[turn] = 0, len(self._pieces)
        self._copies[turn].clear()
        for number, request in enumerate(self._posted[turn]):
            request.Start()
            self._coming.append((turn, number))


class DeviceSender(MpiSender):
    """Persistent sends of envelope and head, and of every piece that is full."""

    def __init__(self, transport: DeviceTransport, peer: int, tag: int, room: Room, depth: int, label: str) -> None:
        super().__init__(transport, peer, tag, Room(room.head, 0), depth, label)
        self._pieces = transport.pieces(room.body)
        self._bodies = [_Body(transport, room.body) for _ in range(depth)]
        self._full = [
            [transport.comm.Send_init(body.given(piece), dest=peer, tag=BODY_TAGS + tag) for piece in self._pieces]
            for body in self._bodies
        ]
        self._ready: deque[tuple[Ticket, int, int, slice]] = deque()  # (when, turn, number of the piece, its bytes)
        self._gone: list[list[Any]] = [[] for _ in range(depth)]

    def serve(self) -> None:
        """Send the pieces that are ready."""
        while self._ready and self._ready[0][0].done():
            _, turn, number, piece = self._ready.popleft()
            if piece == self._pieces[number]:
                request = self._full[turn][number]
                request.Start()
            else:
                given = self._bodies[turn].given(piece)
                request = self._mpi.comm.Isend(given, dest=self._peer, tag=BODY_TAGS + self._tag)
            self._gone[turn].append(request)

    def close(self) -> None:
        super().close()
        for request in (request for requests in self._full for request in requests):
            request.Free()
        self._full = []

    def _parcel(self) -> tuple[np.ndarray, np.ndarray, Any]:
        envelope, head, _ = super()._parcel()
        return envelope, head, self._bodies[self._turn].memory

    def _start(self, body_bytes: int) -> None:
        turn = self._turn
        super()._start(0)
        for number, whole in enumerate(self._pieces):
            piece = slice(whole.start, max(whole.start, min(whole.stop, body_bytes)))
            self._ready.append((self._bodies[turn].fetch(piece), turn, number, piece))
        self.serve()

    def _has_left(self, turn: int) -> bool:
        self.serve()
        if not super()._has_left(turn) or any(of == turn for _, of, _, _ in self._ready):
            return False
        try:
            self._gone[turn] = [request for request in self._gone[turn] if not request.Test()]
        except Exception as error:
            raise self._mpi.mpi_error(self._peer, str(error)) from error
        return not self._gone[turn]
