"""rwkvmpi bench [MODEL]"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from rwkvmpi.config import DEFAULT_CHUNK, MAX_CHUNK, MIN_CHUNK, ROW_ALIGNMENT
from rwkvmpi.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = ("float32", "bfloat16", "int8")
WIDTH = 120  # of the tables where there is no terminal


def _chunks(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    sizes = []
    for text in value.split(","):
        if not text.strip().isdecimal() or int(text) % ROW_ALIGNMENT or not MIN_CHUNK <= int(text) <= MAX_CHUNK:
            raise click.BadParameter(
                f"{text!r} is not a multiple of {ROW_ALIGNMENT} between {MIN_CHUNK} and {MAX_CHUNK}", context, parameter
            )
        sizes.append(int(text))
    return tuple(sizes)


@click.command("bench")
@click.argument("model", required=False)
@click.option(
    "--shape",
    metavar="[VERSION:]SIZE",
    help="A released model's size, such as 0.1B or 6:1.6B, or CHANNELSxLAYERS.  [default: 0.1B of RWKV-7]",
)
@click.option("--dtype", type=click.Choice([*DTYPES, "all"]), help="[default: bfloat16, and beside it float32's rates]")
@click.option("--threads", type=click.IntRange(1), help="Threads per rank.  [default: cores / ranks on the node]")
@click.option(
    "--chunks",
    default=f"256,512,{DEFAULT_CHUNK},2048",
    show_default=True,
    callback=_chunks,
    metavar="G,G,...",
    help=f"Tokens per chunk to compare; {DEFAULT_CHUNK} is always among them.",
)
@click.option(
    "--fabric",
    is_flag=True,
    help="Under mpirun or srun: only the hops between neighbours, by size and for each transport, beside raw verbs "
    "(perftest).",
)
@click.option("--quick", is_flag=True, help="A few seconds instead of a minute, with coarser figures.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON on stdout.")
def command(
    model: str | None,
    shape: str | None,
    dtype: str | None,
    threads: int | None,
    chunks: tuple[int, ...],
    fabric: bool,
    quick: bool,
    as_json: bool,
) -> None:
    """Measure how fast this machine multiplies, reads memory, runs a model's operators, layers, chunks and single
    steps, and, under mpirun or srun, sends to a neighbour; beside it what it could do at most.

    The weights are random; of MODEL only the shape is used. `plan` predicts with what was measured last, by this or by
    a finished run, and --chunk auto takes the fastest chunk (if it is 2% faster than 1024).
    """
    if model is not None and shape is not None:
        raise click.UsageError("give MODEL or --shape, not both")
    from rwkvmpi.cluster import mpi

    if fabric:
        mpi.guard(lambda: _bench_fabric(model, shape, quick, as_json))
    dtypes = DTYPES if dtype == "all" else (dtype,) if dtype else ()
    mpi.guard(lambda: _bench(model, shape, dtypes, threads, chunks, quick, as_json))


def _bench(
    model: str | None,
    shape: str | None,
    dtypes: tuple[str, ...],
    threads: int | None,
    chunks: tuple[int, ...],
    quick: bool,
    as_json: bool,
) -> int:
    from rwkvmpi.cluster import affinity, logs, mpi

    comm = mpi.world()
    logger = logs.setup(None, *((comm.rank, comm.size) if comm is not None else ()))
    threads = threads or affinity.threads_per_rank()
    affinity.pin(threads)

    from rwkvmpi.bench.measure import DISTURBED, Request, run

    result = run(Request(model, shape, dtypes, threads, chunks, quick), comm, _say)
    if result is None:
        return 0
    _say("")
    if (taken := result["machine"]["taken_by_others"]) > DISTURBED:
        logger.warning(
            "other programs took %.0f%% of the processor's time: the figures are too low, and no chunk was chosen by "
            "them; measure again when the machine is quiet",
            100 * taken,
        )
    from rwkvmpi.bench.report import show

    _print(result, show, as_json)
    return 0


def _bench_fabric(model: str | None, shape: str | None, quick: bool, as_json: bool) -> int:
    from rwkvmpi.cluster import logs, mpi

    comm = mpi.world()
    logs.setup(None, *((comm.rank, comm.size) if comm is not None else ()))
    if comm is None:
        raise UserError(
            "bench --fabric measures messages between ranks, and this is one rank; start it under mpirun or srun: "
            "mpirun -n 2 rwkvmpi bench --fabric"
        )
    from rwkvmpi.bench import fabric
    from rwkvmpi.bench.report import show_fabric
    from rwkvmpi.bench.shapes import shape_of

    result = fabric.run(comm, shape_of(model, shape), quick, _say)
    if result is not None:
        _say("")
        _print(result, show_fabric, as_json)
    return 0


def _say(what: str) -> None:
    """What is being measured, in a line of its own on a terminal; "": nothing any more."""
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{'measuring ' if what else ''}{what}", err=True, nl=False)


def _print(result: dict[str, Any], show: Callable[[dict[str, Any], Console], None], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        from rich.console import Console

        show(result, Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False))
    sys.stdout.flush()
