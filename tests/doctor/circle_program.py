"""Three ranks for test_doctor_nodes.py: one whose work hangs, one that is lost. Nobody waits for them without end."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rwkvmpi.cluster import mpi
from rwkvmpi.doctor.nodes_circle import Circle

SILENCE_S = 5.0


def main() -> None:
    circle = Circle(mpi.world(), SILENCE_S)
    said: list[Any] = []

    def ask(what: str, work, limit_s: float = 60.0) -> None:
        answers = circle.collect(what, work, limit_s)
        said.append([[answer.value, answer.trouble] for answer in answers])

    ask("large", lambda: len("x" * 1_000_000) + circle.rank)
    said.append(circle.tell({"told": circle.rank}))
    ask("slow", lambda: time.sleep(1.4 * SILENCE_S * (circle.rank == 1)))  # busy, but there
    ask("hung", lambda: time.sleep(3600 * (circle.rank == 1)), 1.0)
    ask("broken", lambda: 1 // (circle.rank - 2))
    said.append([pair[1] > 0 for pair in circle.clocks([1, 2]).values()] if circle.rank == 0 else [])
    said.append(circle.tell(circle.rank + 7))
    said.append(circle.allgather(circle.rank))
    if circle.rank == 2:
        time.sleep(3600)  # as a node that is gone without a word
    ask("lost", lambda: circle.rank)
    circle.tell()
    if circle.rank == 0:
        print(json.dumps([said, circle.lost]), flush=True)
        sys.exit(1)
    circle.tell()


mpi.guard(main)
