"""What the ranks of test_device_transport do: `python device_ranks.py NAME`, under mpirun -n 2."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rwkvmpi.cluster import mpi
from rwkvmpi.cluster.device_probe import MARKER, probe_between_neighbours
from rwkvmpi.errors import FabricError
from rwkvmpi.grid.device_transport import DeviceTransport
from rwkvmpi.grid.transport import Parcel, Room, Terms
from rwkvmpi.models.cuda_device import EmulatedDevice

ROOM = Room(64, 10_000, on_device=True)
SIZES = (10_000, 0, 10_000, 4_096, 1, 8_192, 9_999)


def content(number: int, nbytes: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(number).integers(0, 255, nbytes, dtype=np.uint8))


def there_and_back(staged: bool, depth: int = 2) -> None:
    """Bodies of many sizes from rank 0 to rank 1 and back: right, in order, and in the device's memory."""
    comm = mpi.world()
    assert comm is not None
    device, peer = EmulatedDevice(), 1 - comm.rank
    transport = DeviceTransport(comm, device, Terms(job=5), staged, piece_bytes=4096)
    transport.terms.idle = transport.tick
    receiver = transport.receiver(peer, 7, ROOM, depth, "test")
    sender = transport.sender(peer, 7, ROOM, depth, "test")
    small = transport.sender(peer, 8, Room(0, 8), 1, "carry"), transport.receiver(peer, 8, Room(0, 8), 1, "carry")
    transport.connect()
    for position in range(4 * len(SIZES)):
        nbytes = SIZES[position % len(SIZES)]
        if comm.rank == 0:
            parcel = sender.buffer()
            parcel.head[:] = position
            device.copy((content(position, nbytes), parcel.body[:nbytes])).wait()
            sender.send(position, nbytes)
        parcel = receiver.wait(position)
        assert isinstance(parcel.body, torch.Tensor)
        assert (parcel.head == position).all()
        assert torch.equal(parcel.body, content(position, nbytes)), (position, nbytes)
        if comm.rank == 1:
            answer = sender.buffer()
            answer.head[:] = parcel.head
            device.copy((parcel.body, answer.body[:nbytes])).wait()
            sender.send(position, nbytes)
        receiver.release()
    small[0].buffer().body[:] = 3
    small[0].send(0, 8)
    assert small[1].wait(0).body.tolist() == [3] * 8
    for channel in (sender, small[0]):
        channel.flush()
    transport.close()
    for channel in (receiver, small[1], sender, small[0]):
        channel.close()
    assert receiver.hops.messages == 4 * len(SIZES)


def too_early() -> None:
    """Who sends before the device has written the body sends what a GPU may not have written yet."""
    comm = mpi.world()
    assert comm is not None
    device, peer = EmulatedDevice(), 1 - comm.rank
    transport = DeviceTransport(comm, device, Terms(job=5))
    receiver, sender = transport.receiver(peer, 7, ROOM, 1, "test"), transport.sender(peer, 7, ROOM, 1, "test")
    transport.connect()
    parcel: Parcel = sender.buffer()
    device.copy((content(0, 10_000), parcel.body))  # its ticket is not waited for
    sender.send(0, 10_000)
    assert (receiver.wait(0).body == 255).all()
    sender.flush()


def foreign() -> None:
    """A message of another job, and one for another chunk, are errors with a sentence."""
    comm = mpi.world()
    assert comm is not None
    peer = 1 - comm.rank
    for job, position, words in ((comm.rank, 0, "belongs to another job"), (5, comm.rank, "is for chunk")):
        transport = DeviceTransport(comm.Dup(), EmulatedDevice(), Terms(job=job))
        receiver, sender = transport.receiver(peer, 7, ROOM, 1, "test"), transport.sender(peer, 7, ROOM, 1, "test")
        transport.connect()
        sender.buffer()
        sender.send(position, 100)
        with pytest.raises(FabricError, match=f"neighbour rank {peer} on .* {words}"):
            receiver.wait(position)
        sender.flush()


class Crashing:
    """A communicator whose rank 1 dies in the middle of a send."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def Isend(self, *arguments: Any, **options: Any) -> Any:
        return self._comm.Isend(*arguments, **options) if self.rank == 0 else ctypes.string_at(8)


def trial(folder: str, crash: str) -> None:
    """Device memory travels between neighbours, or the trial ends the job; then it is not repeated."""
    comm = mpi.world()
    assert comm is not None
    marker, peers = Path(folder) / MARKER, [1 - comm.rank]
    if crash == "yes":
        probe_between_neighbours(Crashing(comm), EmulatedDevice(), peers, Path(folder))
        raise AssertionError("it lives")
    for words, others in (("the last start ended while", ""), ("", "with other settings"), ("", "")):
        comm.Barrier()
        if comm.rank == 0 and others:
            assert marker.exists()
            marker.write_text(others)
        comm.Barrier()
        found = probe_between_neighbours(comm, EmulatedDevice(), peers, Path(folder))
        assert found.startswith(words), found
        assert bool(found) == bool(words), found
    comm.Barrier()
    assert not marker.exists()


def main() -> None:
    name, *arguments = sys.argv[1:]
    if name == "channels":
        there_and_back(staged=False)
        there_and_back(staged=True)
        there_and_back(staged=True, depth=1)
    elif name == "errors":
        too_early()
        foreign()
    else:
        trial(*arguments)


if __name__ == "__main__":
    mpi.guard(main)
