"""Connects one rank with its neighbours on the grid: who sends what to whom, and through which channels."""

from __future__ import annotations

from typing import Any

from rwkvmpi.grid.frame import frame_room
from rwkvmpi.grid.layout import Grid, Place
from rwkvmpi.grid.relay import Relay
from rwkvmpi.grid.source import LinkSupply
from rwkvmpi.grid.transport import Room, Sender, Transport

FRAME_TAG = 2
SOURCE_TAG = 3
STAGE_DEPTH = 2  # one frame in use, one on its way
SOURCE_DEPTH = 4  # the source runs two rounds of the ring ahead, the end of the stream comes on top


def supply_from_neighbour(grid: Grid, rank: int, transport: Transport, chunk_size: int, stage: Any) -> LinkSupply:
    """Frames of a rank that is not a source: from the stage above, or from the source of its replica."""
    place = grid.place(rank)
    if place.stage == 0:
        source = grid.source(place.replica)
        return LinkSupply(
            transport.receiver(source, SOURCE_TAG, frame_room(chunk_size), SOURCE_DEPTH, "tokens"), chunk_size
        )
    above = grid.rank(Place(place.stage - 1, place.slot, place.replica))
    room = frame_room(chunk_size, stage.shape.n_embd, stage.passes_v_first)
    return LinkSupply(transport.receiver(above, FRAME_TAG, room, STAGE_DEPTH, "activations"), chunk_size)


def slot_senders(grid: Grid, rank: int, transport: Transport | None, chunk_size: int) -> list[Sender | None]:
    """A source's channels to the slots of its ring; None stands for the own slot."""
    place = grid.place(rank)
    senders: list[Sender | None] = [None]
    for slot in range(1, grid.ring):
        assert transport is not None
        dest = grid.rank(Place(0, slot, place.replica))
        senders.append(transport.sender(dest, SOURCE_TAG, frame_room(chunk_size), SOURCE_DEPTH, "tokens"))
    return senders


def sender_below(grid: Grid, rank: int, transport: Transport | None, chunk_size: int, stage: Any) -> Sender | None:
    """The channel to the stage below, None on the last stage."""
    place = grid.place(rank)
    if place.stage == grid.stages - 1:
        return None
    assert transport is not None
    dest = grid.rank(Place(place.stage + 1, place.slot, place.replica))
    room = frame_room(chunk_size, stage.shape.n_embd, stage.passes_v_first)
    return transport.sender(dest, FRAME_TAG, room, STAGE_DEPTH, "activations")


def relay_on_ring(
    grid: Grid, rank: int, transport: Transport | None, state_bytes: int, carry_bytes: int, stage: Any
) -> Relay:
    """States (and on the last stage the carry) to and from the ring's neighbours; on a ring of one they stay where the
    stage computes."""
    rooms = [Room(0, state_bytes, on_device=True) for _ in stage.layers]
    labels = [f"the state of layer {stage.lo + item}" for item in range(len(stage.layers))]
    if stage.last:
        rooms.append(Room(0, carry_bytes))
        labels.append("what the task carries")
    if grid.ring == 1:
        return Relay(rooms, labels, allocate=lambda item, nbytes: stage.device.keep(nbytes, item < len(stage.layers)))
    place = grid.place(rank)
    left = grid.rank(Place(place.stage, place.slot - 1, place.replica))
    right = grid.rank(Place(place.stage, place.slot + 1, place.replica))
    return Relay(rooms, labels, transport, left, right)
