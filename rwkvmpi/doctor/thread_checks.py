"""The doctor's checks of the threads: bound as a run binds them, and asked where they are."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

from rwkvmpi.cluster import affinity, pinning
from rwkvmpi.cluster.launcher import launch_facts
from rwkvmpi.doctor.diagnosis import Finding

FEWER = "set OMP_NUM_THREADS to cores / ranks on the node, or leave it out; start at most one rank per core"
SHOWN_RANKS = 16


def of_this_process() -> Iterator[Finding]:
    """Where the threads of a run by one process would be. Ranks are told with the findings of MPI."""
    if launch_facts().size > 1:
        return
    threads = affinity.threads_per_rank()
    here = pinning.neighbours(None, threads)
    crowded = pinning.crowding(here)
    where = pinning.placement(threads, here)
    said = _bound(where) + (f"; {where.remedy}" if where.remedy else "")
    if crowded:
        yield Finding("threads", "warn", f"{crowded}; {said}", FEWER)
    else:
        yield Finding("threads", "ok", said)  # a process started by hand need not have cores of its own


def of_all_ranks(comm: Any) -> Iterator[Finding]:
    """Where the threads of every rank would be, node by node; collective, and the findings are rank 0's."""
    threads = affinity.threads_per_rank()
    here = pinning.neighbours(comm, threads)
    where = pinning.placement(threads, here)
    reports = comm.allgather((platform.node(), pinning.crowding(here), where, _bound(where)))
    for host in sorted({report[0] for report in reports}):
        crowded = next(report[1] for report in reports if report[0] == host)
        if crowded:
            yield Finding("threads", "warn", crowded, FEWER)
        lines = [f"rank {rank}: {report[3]}" for rank, report in enumerate(reports) if report[0] == host]
        if len(lines) > SHOWN_RANKS:
            lines[SHOWN_RANKS:] = [f"and {len(lines) - SHOWN_RANKS} ranks more"]
        unbound = [report[2] for report in reports if report[0] == host and not report[2].cores]
        value = f"{host}: {'; '.join(lines)}"
        yield Finding("threads", "warn" if unbound else "ok", value, unbound[0].remedy if unbound else "")


def _bound(where: pinning.Placement) -> str:
    """Where the threads are once they are bound, or why they are not."""
    if not where.cores:
        return str(where)
    try:
        import torch

        torch.set_num_threads(len(where.cores))
        with pinning.Pinned(where):
            return pinning.described()
    except Exception as error:  # torch or the operators are broken: another check says how, and other ranks wait here
        return f"threads could not be bound ({type(error).__name__}: {error})"
