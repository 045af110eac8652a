"""Channels through a link: slots that the neighbour writes into, buffers that are written from."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkvmpi.grid.transport import ENVELOPE_BYTES, HostBuffer, Receiver, Room, Sender
from rwkvmpi.grid.verbs.device import Device, Region
from rwkvmpi.grid.verbs.link import MESSAGE, RELEASED, Link, Unexpected, Write, immediate

if TYPE_CHECKING:
    from rwkvmpi.grid.verbs.transport import VerbsTransport


class VerbsReceiver(Receiver):
    """Slots that the neighbour fills in turn; it learns when one is free again."""

    def __init__(self, transport: VerbsTransport, peer: int, tag: int, room: Room, depth: int, label: str) -> None:
        super().__init__(transport, peer, tag, room, label)
        self.depth = depth
        self._progress, self._post = transport.progress, transport.post
        self._slots = [HostBuffer(room, transport.terms.pin) for _ in range(depth)]
        self._full = [False] * depth
        self._turn = 0
        self._link: Link | None = None
        self._releases: list[Write] = []

    def attach(self, device: Device, link: Link) -> dict[str, Any]:
        """Register the slots; what the neighbour has to know of them."""
        self._link = link
        places = []
        for turn, slot in enumerate(self._slots):
            region = device.register(slot.memory)
            places.append((region.address, region.rkey))
            link.on(MESSAGE, self._tag, turn, partial(self._arrived, turn))
        return {"room": (self._room.head, self._room.body), "places": places}

    def prepare(self) -> None:
        """After the link was joined."""
        assert self._link is not None
        self._releases = [self._link.release_of(self._tag, turn) for turn in range(len(self._slots))]

    def _arrived(self, turn: int) -> None:
        if self._full[turn]:
            raise Unexpected(f"wrote over a message ({self._label}) that was not taken yet")
        self._full[turn] = True

    def _here(self) -> bool:
        if self._full[self._turn]:
            return True
        self._progress()
        return self._full[self._turn]

    def _parcel(self) -> tuple[np.ndarray, np.ndarray, Any]:
        return self._slots[self._turn].parcel

    def _whole(self, body_bytes: int) -> np.ndarray | None:
        return self._slots[self._turn].whole(body_bytes)

    def release(self) -> None:
        turn = self._turn
        self._full[turn] = False
        self._turn = (turn + 1) % len(self._slots)
        assert self._link is not None
        self._post(self._link, self._releases[turn], False)

    def close(self) -> None:
        """The slots stay registered until the transport is closed: a write may still be on its way."""


class VerbsSender(Sender):
    """Buffers in turn, each for the neighbour's slot of the same number.

    A buffer is free when its message has reached the slot. A message whose slot was not released waits in its buffer.
    """

    def __init__(self, transport: VerbsTransport, peer: int, tag: int, room: Room, depth: int, label: str) -> None:
        super().__init__(transport, peer, tag, room, label)
        self.depth = depth
        self._progress, self._post = transport.progress, transport.post
        self._buffers = [HostBuffer(room, transport.terms.pin) for _ in range(depth)]
        self._before_body = ENVELOPE_BYTES + room.head
        self._regions: list[Region] = []
        self._numbers: list[int] = []
        self._writes: list[Write] = []
        self._slot_full = [False] * depth
        self._busy = [False] * depth
        self._held = [False] * depth
        self._turn = 0
        self._link: Link | None = None

    def attach(self, device: Device, link: Link) -> None:
        """Register the buffers."""
        self._link = link
        for turn, buffer in enumerate(self._buffers):
            self._regions.append(device.register(buffer.memory))
            self._numbers.append(link.number(partial(self._sent, turn)))
            link.on(RELEASED, self._tag, turn, partial(self._released, turn))

    def aim(self, slots: dict[str, Any] | None) -> str:
        """Take the neighbour's places; what does not fit, if something does not."""
        if slots is None:
            return f"has no receiver with tag {self._tag} for {self._label}"
        if tuple(slots["room"]) != (self._room.head, self._room.body) or len(slots["places"]) != len(self._buffers):
            return f"has other sizes for {self._label}: {slots['room']} and {len(slots['places'])} slots"
        assert self._link is not None
        for turn, place in enumerate(slots["places"]):
            announced = immediate(MESSAGE, self._tag, turn)
            write = self._link.write(
                self._regions[turn], 0, self._room.nbytes, tuple(place), self._numbers[turn], announced
            )
            self._writes.append(write)
        return ""

    def _free(self) -> bool:
        return self._has_left(self._turn)

    def _parcel(self) -> tuple[np.ndarray, np.ndarray, Any]:
        return self._buffers[self._turn].parcel

    def _whole(self, body_bytes: int) -> np.ndarray | None:
        return self._buffers[self._turn].whole(body_bytes)

    def _start(self, body_bytes: int) -> None:
        turn = self._turn
        self._turn = (turn + 1) % len(self._buffers)
        self._busy[turn] = True
        self._writes[turn].piece.length = self._before_body + body_bytes
        if self._slot_full[turn]:
            self._progress()  # its release may have come since
        if self._slot_full[turn]:
            self._held[turn] = True
        else:
            self._go(turn)

    def flush(self) -> None:
        for turn in range(len(self._buffers)):
            self.waited_s += self._transport.wait(
                partial(self._has_left, turn), self._peer, f"the end of a message ({self._label})"
            )

    def close(self) -> None:
        """Everything was flushed; the buffers stay registered until the transport is closed."""

    def _go(self, turn: int) -> None:
        assert self._link is not None
        self._slot_full[turn] = True
        self._post(self._link, self._writes[turn], True)

    def _sent(self, turn: int, _completion: Any) -> None:
        assert self._link is not None
        self._busy[turn] = False
        self._link.sent()

    def _released(self, turn: int) -> None:
        if not self._slot_full[turn]:
            raise Unexpected(f"gave a slot back ({self._label}) that held nothing")
        self._slot_full[turn] = False
        if self._held[turn]:
            self._held[turn] = False
            self._go(turn)

    def _has_left(self, turn: int) -> bool:
        if not self._busy[turn]:
            return True
        self._progress()
        return not self._busy[turn]
