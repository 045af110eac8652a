"""What one chunk leaves for the next: the state of every layer, and the task's carry.

On a ring of one slot it stays where it is; on a longer ring it travels to the right neighbour, layer by layer, as
soon as the layer is done. `arrive` and `leave` hide the difference from the wavefront.

A message is sent for every chunk, with no bytes where no document crosses the boundary, so that both sides always
agree on what comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rwkvmpi.grid.transport import Hops, Receiver, Room, Sender, Transport

STATE_TAG = 16  # + item: one channel per layer of the stage, one more for the carry


class Relay:
    """The items of one rank: its layers in order, then the carry (0 bytes except on the last stage).

    `rooms`: of each item's messages; labels: what they are. `left` and `right` are ranks, or None on a ring of one
    slot. `allocate(item, nbytes)` gives memory for what stays here: uint8, an array or a tensor of a GPU.
    """

    def __init__(
        self,
        rooms: list[Room],
        labels: list[str],
        transport: Transport | None = None,
        left: int | None = None,
        right: int | None = None,
        allocate: Callable[[int, int], Any] = lambda item, nbytes: np.empty(nbytes, dtype=np.uint8),
    ) -> None:
        self.items = len(rooms)
        self._allocate = allocate
        self._kept: list[Any] = [None] * len(rooms)
        self._receivers: list[Receiver] = []
        self._senders: list[Sender] = []
        if transport is not None and left is not None and right is not None:
            for item, (room, label) in enumerate(zip(rooms, labels, strict=True)):
                self._receivers.append(transport.receiver(left, STATE_TAG + item, room, 1, label))
                self._senders.append(transport.sender(right, STATE_TAG + item, room, 1, label))

    @property
    def on_ring(self) -> bool:
        return bool(self._receivers)

    def arrive(self, index: int, item: int) -> Any:
        """What chunk `index` - 1 left of this item (uint8), or None when no document crosses the boundary.

        Call it exactly once per chunk and item, except for chunk 0. Valid until `taken`.
        """
        if not self.on_ring:
            return self._kept[item]
        body = self._receivers[item].wait(index).body
        return body if len(body) else None

    def taken(self, item: int) -> None:
        """The bytes of the last `arrive` have been copied."""
        if self.on_ring:
            self._receivers[item].release()

    def outbox(self, item: int, nbytes: int) -> Any:
        """Where to put what the next chunk needs of this item: uint8 [nbytes]. Follow it with `leave`."""
        if not self.on_ring:
            kept = self._kept[item]
            if kept is None or len(kept) != nbytes:
                kept = self._kept[item] = self._allocate(item, nbytes)
            return kept
        return self._senders[item].buffer().body[:nbytes]

    def leave(self, index: int, item: int, nbytes: int) -> None:
        """Hand the outbox's content to chunk `index` + 1; `nbytes` 0 when no document crosses the boundary."""
        if not self.on_ring:
            if nbytes == 0:
                self._kept[item] = None
            return
        sender = self._senders[item]
        sender.buffer()  # where nothing was put there it may still be on its way
        sender.send(index + 1, nbytes)

    def close(self) -> None:
        """Everything sent has left; what is still posted is withdrawn."""
        for sender in self._senders:
            sender.flush()
            sender.close()
        for receiver in self._receivers:
            receiver.close()

    @property
    def waited_s(self) -> float:
        received = sum(receiver.waited_s for receiver in self._receivers)
        return received + sum(sender.waited_s for sender in self._senders)

    @property
    def hops(self) -> Hops:
        """What the messages from the left cost."""
        total = Hops()
        for receiver in self._receivers:
            total.add(receiver.hops)
        return total
