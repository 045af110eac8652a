"""One copy of the weights for all ranks of a node that hold the same layers.

The first of them builds into a memory file; when it is done, or has failed, it tells the others, who map what it
filled. Whoever cannot map it builds a copy of its own. RWKVMPI_SHARE_WEIGHTS=0 turns all of this off.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from rwkvmpi.cluster import logs
from rwkvmpi.cluster.waiting import LOOK_EVERY_S
from rwkvmpi.errors import UserError
from rwkvmpi.models.weight_store import MappedMemory, OwnMemory, Published, SharedMemory, WeightStore

Built = TypeVar("Built")
SWITCH = "RWKVMPI_SHARE_WEIGHTS"
_NEWS, _MAPPED = 1, 2  # tags


def build(comm: Any, part: int, make: Callable[[WeightStore], Built]) -> Built:
    """`make(store)` on every rank, with stores that share memory among the ranks of a node with the same `part`.

    Collective over `comm` (None: this process alone). `make` asks its store for pieces whose sizes and order follow
    from `part` alone. A UserError of the rank that fills is raised by all who wait for it.
    """
    team = None if comm is None else _team(comm, part)
    if team is None:
        return make(OwnMemory())
    built = _lead(team, make) if team.rank == 0 else _follow(team, make)
    team.Free()
    return built


def _team(comm: Any, part: int) -> Any | None:
    """The ranks that share with this one, or None. Collective even where sharing is off: ranks need not agree on it."""
    from mpi4py import MPI

    wanted = os.environ.get(SWITCH, "") != "0" and hasattr(os, "memfd_create")
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    team = node.Split(part if wanted else MPI.UNDEFINED, node.rank)
    node.Free()
    if team == MPI.COMM_NULL:
        return None
    if team.size == 1:
        team.Free()
        return None
    return team


def _lead(team: Any, make: Callable[[WeightStore], Built]) -> Built:
    try:
        memory = SharedMemory()
    except OSError as error:
        _log().debug("weights are not shared: no memory file can be made (%s)", error)
        _tell(team, None)
        return make(OwnMemory())
    try:
        built = make(memory)
        news: Published | str = memory.publish()
    except BaseException as error:
        _tell(team, str(error) if isinstance(error, UserError) else f"rank {team.rank} of the node crashed: {error!r}")
        raise
    _tell(team, news)
    mapped = sum(team.recv(source=rank, tag=_MAPPED) for rank in range(1, team.size))
    memory.close()
    _log().debug("weights are shared with %d of %d ranks", mapped, team.size - 1)
    return built


def _follow(team: Any, make: Callable[[WeightStore], Built]) -> Built:
    while not team.iprobe(source=0, tag=_NEWS):  # sleeping: the other one needs the cores
        time.sleep(LOOK_EVERY_S)
    news: Published | str | None = team.recv(source=0, tag=_NEWS)
    if isinstance(news, str):
        raise UserError(news)
    if news is None:
        return make(OwnMemory())
    memory: WeightStore
    try:
        memory = MappedMemory(news)
    except OSError as error:
        _log().info("weights of process %d cannot be shared (%s): this rank holds a copy", news.pid, error)
        memory = OwnMemory()
    team.send(not memory.fills, dest=0, tag=_MAPPED)
    return make(memory)


def _tell(team: Any, news: Published | str | None) -> None:
    for rank in range(1, team.size):
        team.send(news, dest=rank, tag=_NEWS)


def _log() -> logging.Logger:
    return logging.getLogger(logs.LOGGER)
