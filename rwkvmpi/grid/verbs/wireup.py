"""How ranks come to terms over MPI before there are queue pairs: nobody waits for ever, and all fail together."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rwkvmpi.errors import FabricError, UserError

CARD_TAG, QUIET_TAG = 4093, 4092
SENTENCE_BYTES = 768
LOOK_EVERY_S = 1e-3


def agree(comm: Any, sentence: str, deadline_s: float) -> None:
    """Collective. UserError on all ranks if any has come with a `sentence` that says why it cannot go on; the lowest
    rank's is told. FabricError if a rank does not come at all."""
    mine = np.zeros(SENTENCE_BYTES, dtype=np.uint8)
    # a character cut in two is dropped
    text = sentence.encode()[:SENTENCE_BYTES].decode(errors="ignore").encode()
    mine[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    everybodys = np.zeros((comm.size, SENTENCE_BYTES), dtype=np.uint8)
    request = comm.Iallgather(mine, everybodys)
    _until(request.Test, comm.rank, "a rank", deadline_s)
    for rank, row in enumerate(everybodys):
        if row[0]:
            told = sentence if rank == comm.rank else row.tobytes().rstrip(b"\0").decode()
            raise UserError(told)


def swap(comm: Any, cards: dict[int, dict[str, Any]], deadline_s: float) -> dict[int, dict[str, Any]]:
    """Give every neighbour its card, and get theirs: neighbour -> card. Neighbours are so of each other."""
    sends = [comm.isend(card, dest=peer, tag=CARD_TAG) for peer, card in cards.items()]
    theirs = {}
    for peer in cards:
        found: list[Any] = []

        def arrived(peer: int = peer, found: list[Any] = found) -> bool:
            message = comm.improbe(source=peer, tag=CARD_TAG)
            if message is not None:
                found.append(message.recv())
            return bool(found)

        _until(arrived, comm.rank, f"rank {peer}", deadline_s)
        theirs[peer] = found[0]
    for send in sends:
        _until(lambda send=send: send.test()[0], comm.rank, "a rank", deadline_s)  # type: ignore[misc]
    return theirs


def _until(ready: Callable[[], Any], rank: int, who: str, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while not ready():
        if time.monotonic() > end:
            raise FabricError(
                f"rank {rank} on {platform.node()}: {who} did not come to the wire-up of the verbs transport within "
                f"{deadline_s:.0f} s; look whether all nodes are up. The same command goes on from the last commit"
            )
        time.sleep(LOOK_EVERY_S)
