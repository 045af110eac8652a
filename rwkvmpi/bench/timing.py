"""Medians of what is done again and again, in turns: so that a slow moment of the machine strikes all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Effort:
    """How often something is done: so many seconds and so many times at least; but after `patience` seconds for all
    that are compared, three times must do."""

    seconds: float = 0.3
    repeats: int = 5
    patience: float = 15.0


FULL = Effort()
QUICK = Effort(seconds=0.05, repeats=3, patience=3.0)
FEWEST = 3


def medians(bodies: Mapping[Key, Callable[[], object]], effort: Effort) -> dict[Key, float]:
    """Median seconds of each of `bodies`, which are done in turns after one round that does not count."""
    for body in bodies.values():
        body()
    taken: dict[Key, list[float]] = {key: [] for key in bodies}
    begun = time.perf_counter()
    while open_ends := [key for key, times in taken.items() if not _enough(times, effort, begun)]:
        for key in open_ends:
            start = time.perf_counter()
            bodies[key]()
            taken[key].append(time.perf_counter() - start)
    return {key: statistics.median(times) for key, times in taken.items()}


def median(body: Callable[[], object], effort: Effort) -> float:
    """Median seconds of `body`."""
    return medians({"": body}, effort)[""]


def best(body: Callable[[], object], effort: Effort) -> float:
    """The fewest seconds that `body` took: for a roof, which nothing but a disturbance can lower."""
    body()
    taken: list[float] = []
    begun = time.perf_counter()
    while not _enough(taken, effort, begun):
        start = time.perf_counter()
        body()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _enough(times: list[float], effort: Effort, begun: float) -> bool:
    if len(times) >= FEWEST and time.perf_counter() - begun > effort.patience:
        return True
    return len(times) >= effort.repeats and sum(times) >= effort.seconds
