"""Two ranks, for test_transport.py: rank 0 sends rank 1 messages as no sender of ours would, and rank 1 says, as JSON,
what it made of them."""

from __future__ import annotations

import json

import numpy as np
from mpi4py import MPI

from rwkvmpi.errors import FabricError
from rwkvmpi.grid.envelope import ENVELOPE_BYTES, Envelope, seal
from rwkvmpi.grid.mpi_transport import MpiTransport
from rwkvmpi.grid.transport import Room, Terms

ROOM = Room(64, 256)
HEAD, BODY = np.arange(64, dtype=np.uint8), np.arange(256, dtype=np.uint8)
# name: (fields of the second message that differ from what is due, whether a byte is changed on the way, checksums)
CASES = {
    "as it should be": ({}, False, True),
    "without checksums": ({}, False, False),
    "doubled": ({"sequence": 0, "position": 7}, False, False),
    "one lost": ({"sequence": 2, "position": 9}, False, True),
    "for another chunk": ({"position": 9}, False, True),
    "of another job": ({"job": 6}, False, False),
    "damaged": ({}, True, True),
}


def message(summed: bool, damaged: bool = False, **fields: int) -> np.ndarray:
    words = {"magic": 0, "sent_ns": 0, "checksum": 0, "body_bytes": len(BODY), **fields}
    made = np.concatenate([np.zeros(ENVELOPE_BYTES, dtype=np.uint8), HEAD, BODY])
    seal(made[:ENVELOPE_BYTES], Envelope(**words), made[ENVELOPE_BYTES:] if summed else None)
    made[-1] ^= damaged
    return made


def main() -> None:
    comm = MPI.COMM_WORLD
    outcomes = {}
    for tag, (name, (differs, damaged, summed)) in enumerate(CASES.items()):
        due = {"job": 5, "channel": tag, "sequence": 0, "position": 7}
        if comm.rank == 0:
            comm.Send(message(summed, **due), dest=1, tag=tag)
            comm.Send(message(summed, damaged, **(due | {"sequence": 1, "position": 8} | differs)), dest=1, tag=tag)
            continue
        transport = MpiTransport(comm, Terms(job=5, summed=summed))
        receiver = transport.receiver(0, tag, ROOM, 2, "the state of layer 3")
        first = receiver.wait(7)
        assert (first.head == HEAD).all()
        receiver.release()
        try:
            second = receiver.wait(8)
            outcomes[name] = "taken" if (second.body == BODY).all() else "wrong bytes"
        except FabricError as error:
            outcomes[name] = str(error)
    if comm.rank == 1:
        print(json.dumps(outcomes))


main()
