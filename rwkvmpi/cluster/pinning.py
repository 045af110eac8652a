"""Every OpenMP thread of a rank on a core of its own, where the cores are the rank's own.

Only there: on a machine shared with strangers a fixed choice of cores would pile all programs onto the first ones.
The calling thread is one of the OpenMP threads, and threads and processes that it starts inherit where it may run;
so background threads are started before `Pinned` is entered, or begin with `free_this_thread`.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rwkvmpi.cluster import affinity, logs

BIND_RANKS = "mpirun --bind-to core --map-by slot:PE=T, or srun --cpu-bind=cores -c T, with T threads per rank"
_WORDS = 128  # of 64 bits: masks for 8,192 hardware threads


@dataclass(frozen=True)
class Placement:
    """The hardware threads of a core for each thread; none where they are not bound, because of `reason`."""

    cores: tuple[frozenset[int], ...]
    reason: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        if not self.cores:
            return f"threads are not bound: {self.reason}"
        return "threads on cores " + " ".join(affinity.shown(core) for core in self.cores)


@dataclass(frozen=True)
class Neighbour:
    """A rank of this node, or this process itself: the hardware threads it may use, and how many threads it starts."""

    rank: int
    cpus: frozenset[int]
    threads: int


def neighbours(comm: Any, threads: int) -> list[Neighbour]:
    """All ranks of this node, in their order; collective. `comm` None: this process alone."""
    node = platform.node()
    own = Neighbour(0 if comm is None else comm.rank, frozenset(affinity.rank_mask()), threads)
    everyone = [(node, own)] if comm is None else comm.allgather((node, own))
    return [neighbour for place, neighbour in everyone if place == node]


def placement(threads: int, here: Sequence[Neighbour], environ: Mapping[str, str] | None = None) -> Placement:
    """Where the threads of this rank belong; `here`: all ranks of its node, as `neighbours` gives them."""
    mask = affinity.rank_mask()
    groups = affinity.core_groups(sorted(mask))
    sharers = sum(not mask.isdisjoint(other.cpus) for other in here)
    if sharers > 1:
        return Placement((), f"{sharers} ranks share the cores {affinity.shown(mask)}", BIND_RANKS)
    if threads > len(groups):
        remedy = f"--threads {len(groups)}, or leave --threads and OMP_NUM_THREADS out"
        return Placement((), f"{threads} threads on {len(groups)} cores ({affinity.shown(mask)})", remedy)
    if not affinity.is_own_mask(environ):
        remedy = f"{affinity.PIN_SWITCH}=1 if they are, or taskset -c CORES rwkvmpi ..."
        return Placement((), f"nobody has set the cores {affinity.shown(mask)} aside for this process", remedy)
    return Placement(tuple(frozenset(group) for group in groups[:threads]))


def crowding(here: Sequence[Neighbour]) -> str:
    """A sentence where the ranks of a node start more threads than the cores that they may use; else ''."""
    cpus = frozenset().union(*(rank.cpus for rank in here))
    cores, quota = affinity.physical_cores(cpus), affinity.cgroup_quota()
    if quota is not None:
        cores = min(cores, max(1, int(quota)))
    threads = sum(rank.threads for rank in here)
    if threads <= cores:
        return ""
    each = "1 rank" if len(here) == 1 else f"{len(here)} ranks"
    return f"{each} with {threads} threads in all on {cores} cores of {platform.node()}: correct, but slower than fewer"


_current: Placement | None = None


class Pinned:
    """Within the context the OpenMP threads of this (the main) thread run each on its core, if `placement` says so.

    Every parallel region must have `threads` threads: the runtime ends those that a smaller region leaves out, and new
    ones would start on the first core.
    """

    def __init__(self, where: Placement) -> None:
        self.placement = where
        self._mask: set[int] | None = None

    def __enter__(self) -> Pinned:
        global _current
        _current = self.placement
        if self.placement.cores:
            self._mask = affinity.rank_mask()
            affinity.remember_mask(self._mask)
            _set(self.placement.cores)
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        if self._mask is not None:
            _set([self._mask] * len(self.placement.cores))
            affinity.remember_mask(None)


def described() -> str:
    """Where the threads of this process are bound at this moment, asked of the threads themselves."""
    if _current is None:
        return "threads are not bound: no work has begun"
    if not _current.cores:
        return f"{_current}; {_current.remedy}"
    return str(Placement(tuple(map(frozenset, where(len(_current.cores))))))


def settle(comm: Any, threads: int) -> Pinned:
    """Where this rank's threads belong, to be entered before the work; collective. A node with more threads than cores
    gets a warning, of its first rank; the own placement goes to the log file."""
    here = neighbours(comm, threads)
    logger = logging.getLogger(logs.LOGGER)
    crowded = crowding(here)
    if crowded and (comm is None or here[0].rank == comm.rank):
        logger.warning("%s", crowded)
    pinned = Pinned(placement(threads, here))
    logger.debug("%s", pinned.placement)
    return pinned


def where(threads: int) -> list[set[int]]:
    """The hardware threads that each OpenMP thread may use now. An empty set for one that cannot tell."""
    import torch

    masks = torch.zeros(threads, _WORDS, dtype=torch.int64)
    _bound("get_thread_cores")(masks, _WORDS, threads)
    return [_cpus(row) for row in masks.tolist()]


def free_this_thread() -> None:
    """For the beginning of a background thread: let it run on all the rank's cores, whoever started it."""
    if affinity.rank_mask() != os.sched_getaffinity(0):
        os.sched_setaffinity(0, affinity.rank_mask())


def _set(cores: Sequence[Collection[int]]) -> None:
    import torch

    masks = torch.tensor([_words(cpus) for cpus in cores], dtype=torch.int64)
    failed = _bound("set_thread_cores")(masks, _WORDS, len(cores))
    if failed:
        logging.getLogger(logs.LOGGER).debug("%d of %d threads could not be bound", failed, len(cores))


def _bound(name: str) -> Any:
    from ctypes import c_int

    from rwkvmpi.ops import library

    return library.bind(name, "pli", c_int if name.startswith("set") else None)


def _words(cpus: Collection[int]) -> list[int]:
    bits = sum(1 << cpu for cpu in cpus)
    words = [(bits >> (64 * i)) & (2**64 - 1) for i in range(_WORDS)]
    return [word - 2**64 if word >> 63 else word for word in words]  # torch's integers are signed


def _cpus(words: Sequence[int]) -> set[int]:
    return {64 * i + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1}
