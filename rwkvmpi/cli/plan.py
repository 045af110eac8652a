"""rwkvmpi plan MODEL [INPUT...] --ranks N"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from rwkvmpi.cli.options import GRID_OPTIONS, MODEL_OPTIONS, with_options


@click.command("plan")
@click.argument("model")
@click.argument("inputs", nargs=-1, metavar="[INPUT...]")
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Ranks that will be started.")
@click.option("--task", type=click.Choice(["score", "embed", "read"]), default="score", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads per rank.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@with_options(GRID_OPTIONS, MODEL_OPTIONS)
def command(
    model: str, inputs: tuple[str, ...], ranks: int, task: str, threads: int, as_json: bool, **options: Any
) -> None:
    """Layout, layers per stage, bytes per rank and per hop, and the predicted time. Needs no GPU and no MPI.

    With INPUT the documents are tokenised to count their tokens (in constant memory, nothing is written).
    """
    from rwkvmpi.plan_report import describe, make_plan

    progress = None if as_json or not sys.stderr.isatty() else lambda text: click.echo(f"\r{text}", err=True, nl=False)
    plan = make_plan(model, list(inputs), ranks=ranks, task=task, threads=threads, options=options, progress=progress)
    click.echo(json.dumps(plan, indent=1) if as_json else describe(plan))
