"""Connects one rank with its neighbours on the grid: who sends what to whom, and through which channels."""

from __future__ import annotations

from typing import Any

from rwkvmpi.grid.frame import Frame
from rwkvmpi.grid.layout import Grid, Place
from rwkvmpi.grid.relay import Relay
from rwkvmpi.grid.source import LinkSupply
from rwkvmpi.grid.transport import Sender, Transport

FRAME_TAG = 2
SOURCE_TAG = 3
STAGE_DEPTH = 2  # one frame in use, one on its way
SOURCE_DEPTH = 4  # the source runs two rounds of the ring ahead, the end of the stream comes on top


def frame_bytes(chunk_size: int, width: int, with_v_first: bool) -> int:
    """Bytes of one frame between two stages (width C), or from the source to a slot (width 0)."""
    segments = chunk_size // 32
    return 128 + segments * 64 + chunk_size * 8 + chunk_size * width * 4 * (2 if with_v_first else 1)


def supply_from_neighbour(grid: Grid, rank: int, transport: Transport, chunk_size: int, stage: Any) -> LinkSupply:
    """Frames of a rank that is not a source: from the stage above, or from the source of its replica."""
    place = grid.place(rank)
    if place.stage == 0:
        nbytes = frame_bytes(chunk_size, 0, False)
        receiver = transport.receiver(grid.source(place.replica), SOURCE_TAG, nbytes, SOURCE_DEPTH)
        return LinkSupply(receiver, chunk_size, 0, False)
    width, with_v_first = stage.shape.n_embd, stage.passes_v_first
    above = grid.rank(Place(place.stage - 1, place.slot, place.replica))
    receiver = transport.receiver(above, FRAME_TAG, frame_bytes(chunk_size, width, with_v_first), STAGE_DEPTH)
    return LinkSupply(receiver, chunk_size, width, with_v_first)


def slot_senders(grid: Grid, rank: int, transport: Transport | None, chunk_size: int) -> list[Sender | None]:
    """A source's channels to the slots of its ring; None stands for the own slot."""
    place = grid.place(rank)
    senders: list[Sender | None] = [None]
    for slot in range(1, grid.ring):
        assert transport is not None
        dest = grid.rank(Place(0, slot, place.replica))
        senders.append(transport.sender(dest, SOURCE_TAG, frame_bytes(chunk_size, 0, False), SOURCE_DEPTH))
    return senders


def sender_below(grid: Grid, rank: int, transport: Transport | None, chunk_size: int, stage: Any) -> Sender | None:
    """The channel to the stage below, None on the last stage."""
    place = grid.place(rank)
    if place.stage == grid.stages - 1:
        return None
    assert transport is not None
    dest = grid.rank(Place(place.stage + 1, place.slot, place.replica))
    nbytes = Frame(chunk_size, stage.shape.n_embd, stage.passes_v_first).buffer.nbytes
    return transport.sender(dest, FRAME_TAG, nbytes, STAGE_DEPTH)


def relay_on_ring(grid: Grid, rank: int, transport: Transport | None, sizes: list[int], stage: Any) -> Relay:
    """States (and the carry) to and from the ring's neighbours; on a ring of one they stay where the stage computes."""
    if grid.ring == 1:
        return Relay(sizes, allocate=lambda item, nbytes: stage.device.keep(nbytes, item < len(stage.layers)))
    place = grid.place(rank)
    left = grid.rank(Place(place.stage, place.slot - 1, place.replica))
    right = grid.rank(Place(place.stage, place.slot + 1, place.replica))
    return Relay(sizes, transport, left, right)
