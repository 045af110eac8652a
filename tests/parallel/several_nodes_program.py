"""Three ranks that take themselves for two nodes, for test_transport.py: what is chosen, a ring over two transports."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import numpy as np
from mpi4py import MPI

from rwkvmpi.grid.choose import MixedTransport, choose_transport
from rwkvmpi.grid.layout import Grid
from rwkvmpi.grid.mpi_transport import MpiTransport
from rwkvmpi.grid.transport import Room, Terms
from rwkvmpi.models.device import CPU

NODES = ["one", "one", "two"]
ROUNDS = 50


def main() -> None:
    comm = MPI.COMM_WORLD
    platform.node = lambda: NODES[comm.rank]
    terms = Terms(job=5)

    def chosen(wanted: str) -> str:
        return choose_transport(comm.Dup(), Grid(1, 3, 1), wanted, "auto", CPU, terms, Path())[1]

    said = [chosen("auto"), chosen("mpi")]
    os.environ["OMPI_MCA_pml"] = "ucx"  # noqa: SIM112 - Open MPI's own spelling
    said.append(chosen("auto"))

    parts = [MpiTransport(comm.Dup(), terms) for _ in range(2)]
    mixed = MixedTransport(comm.rank, NODES, *parts)
    left, right, room = (comm.rank - 1) % 3, (comm.rank + 1) % 3, Room(64, 4096)
    receiver = mixed.receiver(left, 7, room, 2, "numbers")
    sender = mixed.sender(right, 7, room, 2, "numbers")
    mixed.connect()
    for number in range(ROUNDS):
        parcel = sender.buffer()
        parcel.head[:], parcel.body[:] = comm.rank, number
        sender.send(number, 64 * number)
        mixed.tick()
        came = receiver.wait(number)
        assert (came.head == left).all()
        assert len(came.body) == 64 * number
        assert (came.body == np.uint8(number)).all()
        receiver.release()
    sender.flush()
    sender.close()
    receiver.close()
    mixed.close()
    messages = [len(part._peers) for part in parts]
    gathered = comm.gather(messages)
    if comm.rank == 0:
        print(json.dumps([said, gathered]))


main()
