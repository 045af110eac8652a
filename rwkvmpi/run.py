"""A whole run from top to bottom. Every rank calls `main`; rank 0 prepares, all ranks read, rank 0 closes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rwkvmpi.cluster import affinity, gpu, logs, mpi
from rwkvmpi.cluster.launcher import launch_facts
from rwkvmpi.config import Job

EXIT_DONE, EXIT_SOME_FAILED = 0, 3


def main(make_job: Callable[[], Job], folder: Path, *, force: bool, dry_run: bool) -> NoReturn:
    """Do the job in the run folder, or go on with it; ends the process with the exit code of all ranks."""
    mpi.guard(lambda: _run(make_job, folder, force, dry_run))


def _run(make_job: Callable[[], Job], folder: Path, force: bool, dry_run: bool) -> int:
    job = make_job()
    comm = mpi.world()
    rank, size = (comm.rank, comm.size) if comm is not None else (0, 1)
    threads = job.run.threads or affinity.threads_per_rank()
    affinity.pin(threads)
    logger = logs.setup(None, rank, size)

    preparation: Any = None
    shared: Any = None
    if rank == 0:
        preparation = _prepare(job, folder, size, threads, force, dry_run, logger)
        shared = preparation if isinstance(preparation, int) else preparation.share()
    if comm is not None:
        shared = comm.bcast(shared)
    if isinstance(shared, int):
        return shared  # nothing to compute; rank 0 has said why
    logs.setup(folder, rank, size)

    from rwkvmpi.engine import Engine  # torch is loaded here, after everything cheap has been checked

    engine = Engine(comm, folder, shared, preparation)
    outcome = engine.run()
    return _close(comm, preparation, outcome, logger)


def _prepare(
    job: Job, folder: Path, world: int, threads: int, force: bool, dry_run: bool, logger: logging.Logger
) -> Any:
    """Rank 0's first part: a Preparation, or the exit code when there is nothing to compute."""
    from rwkvmpi.prepare import Finished, examine, prepare, show_plan

    examined = examine(job, folder, threads, force)
    memory = _memory_per_rank(job.model.device)
    if dry_run:
        show_plan(examined, folder, world, threads, memory, force)
        return EXIT_DONE
    found = prepare(examined, folder, world, threads, memory, force)
    if isinstance(found, Finished):
        failed = f", {found.failed:,} of them failed" if found.failed else ""
        logger.info("%s is finished: %s documents%s; nothing to do", folder, f"{found.documents:,}", failed)
        return EXIT_SOME_FAILED if found.failed else EXIT_DONE
    if found.progress is not None:
        logger.info(
            "going on from commit %d: %s of %s documents are done, %d in flight",
            found.progress.commit.number,
            f"{found.progress.documents_done:,}",
            f"{len(found.index):,}",
            len(found.progress.in_flight),
        )
    grid = found.grid
    logger.info(
        "%s documents, %s bytes; RWKV-%s, %d layers x %d; %d stages x %d ring x %d replicas, %d threads per rank",
        f"{len(found.index):,}",
        f"{int(found.index.nbytes.sum()):,}",
        found.shape.version,
        found.shape.n_layer,
        found.shape.n_embd,
        grid.stages,
        grid.ring,
        grid.replicas,
        threads,
    )
    return found


def _close(comm: Any, preparation: Any, outcome: Any, logger: logging.Logger) -> int:
    """Rank 0's last part: results.h5 and SUCCESS, or a word on how to go on; everyone waits for its exit code."""
    code = 0
    if preparation is not None:
        from rwkvmpi.closing import close_run

        code = close_run(preparation, outcome, sys.argv, mpi.library_version(), logger)
    if comm is not None:
        from rwkvmpi.cluster.waiting import quiet_bcast

        code = quiet_bcast(comm, code)
    return code


def _memory_per_rank(device: str) -> float:
    """Bytes of memory that a rank of this node may fill with weights."""
    ranks = max(1, launch_facts().local_size)
    if device == "cuda":
        return gpu.memory_per_rank(ranks)
    import psutil

    return 0.8 * psutil.virtual_memory().available / ranks
