"""rwkvmpi watch RUN"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from rwkvmpi.errors import UserError

KEYS_EVERY_S = 0.2  # how soon a key or a new size of the terminal is noticed
FIRST_WORD_WITHIN_S = 3.0  # --once waits so long for samples over the network and for Slurm's answer
LEAVE = ("q", "Q", "\x04")
PLAIN_WIDTH = 160
MAX_RANK = 1 << 20


@click.command("watch")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--once", is_flag=True, help="Show it once and end; that is the rule where stdout is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line and update, until the run ends.")
@click.option(
    "--every",
    type=click.FloatRange(0.2, 3600.0),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two updates.",
)
@click.option(
    "--sort",
    type=click.Choice(["rank", "rate", "wait"]),
    default="rank",
    show_default=True,
    help="Order of the ranks: by number, the slowest first, or who waits longest first.",
)
@click.option("--ranks", "only", metavar="LIST", help="Only these ranks: 0,3,8-15.")
def command(run: Path, once: bool, as_json: bool, every: float, sort: Any, only: str | None) -> None:
    """A run while it goes on: its ranks, rates, waits and commits, and what holds it up.

    From the ranks over the network where they can be reached, else from their files in RUN. Waits for a run that has
    not begun, stays when it is stopped and queued again, and ends with it: 0 finished, 75 stopped, 1 crashed. The view
    ends with q or Ctrl-C; the run takes no notice.

    place: stage/slot/replica. busy: share of its reading that the rank computed. waited: for which rank how long so
    far. heard: age of what is shown. Yellow: waits for 10 s or more; red: nothing was heard of it lately.
    """
    from rwkvmpi.watching import Watching

    chosen = parse_ranks(only) if only is not None else None
    once = once or not (as_json or sys.stdout.isatty())
    with Watching(run, must_exist=once) as watching:
        try:
            code = (
                _lines(watching, every, once, sort, chosen) if as_json else _view(watching, every, once, sort, chosen)
            )
        except KeyboardInterrupt:
            code = 130
    sys.exit(code)


def parse_ranks(text: str) -> frozenset[int]:
    """'0,3,8-15' as numbers; UserError for anything else."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--ranks {text!r} is no list of ranks; write it as 0,3,8-15")
        bounds = int(first), int(last or first)
        if not bounds[0] <= bounds[1] < MAX_RANK:
            raise UserError(f"--ranks {text!r}: {part.strip()} is no range of ranks; write it as 0,3,8-15")
        numbers.update(range(bounds[0], bounds[1] + 1))
    return frozenset(numbers)


def _lines(watching: Any, every: float, once: bool, sort: Any, only: frozenset[int] | None) -> int:
    from rwkvmpi.telemetry.screen import arranged

    while True:
        moment = _first_moment(watching) if once else watching.look()
        order = arranged(moment.ranks, sort, only)
        click.echo(json.dumps(moment.to_json(order), separators=(",", ":")))
        sys.stdout.flush()
        if moment.ending is not None:
            return int(moment.ending.code)
        if once:
            return 0
        time.sleep(every)


def _view(watching: Any, every: float, once: bool, sort: Any, only: frozenset[int] | None) -> int:
    from rich.console import Console

    from rwkvmpi.telemetry.screen import arranged, draw

    # In a pipe nobody knows the width: what is narrower than the table would only be cut off.
    console = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else _plain_width())

    def drawn(moment: Any, height: int | None, footer: str) -> Any:
        order = arranged(moment.ranks, sort, only)
        return draw(moment.facts, moment.ranks, moment.ages, order, console.width, height, footer)

    if once:
        moment = _first_moment(watching)
        console.print(drawn(moment, None, moment.ending.sentence if moment.ending else ""))
        return 0
    moment = _live(watching, every, console, drawn)
    sentence = moment.ending.sentence if moment.ending else f"{moment.facts['state']}; the run takes no notice"
    console.print(drawn(moment, None if only else console.height - 2, ""))
    console.print(f"{moment.facts['run']}: {sentence}", markup=False)
    return int(moment.ending.code) if moment.ending else 0


def _live(watching: Any, every: float, console: Any, drawn: Any) -> Any:
    """Draw until the run ends or somebody leaves; the last moment."""
    from rich.live import Live

    keys = "q leaves; the run takes no notice" if sys.stdin.isatty() else "Ctrl-C leaves; the run takes no notice"
    moment = watching.look()
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                until = time.monotonic() + every
                size = None
                while moment.ending is None:
                    if size != console.size:
                        size = console.size
                        live.update(drawn(moment, console.height, keys), refresh=True)
                    left = until - time.monotonic()
                    if left <= 0:
                        break
                    if pressed(min(left, KEYS_EVERY_S)) in LEAVE:
                        return moment
                if moment.ending is not None:
                    return moment
                moment = watching.look()
        except KeyboardInterrupt:
            return moment


def _first_moment(watching: Any) -> Any:
    """What is known now, or within a moment."""
    until = time.monotonic() + FIRST_WORD_WITHIN_S
    while True:
        moment = watching.look()
        if not watching.may_know_more_soon or time.monotonic() >= until:
            return moment
        time.sleep(KEYS_EVERY_S)


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds for a key and gives it, or '' for none; the terminal neither shows it nor
    waits for the end of the line."""
    if not sys.stdin.isatty():

        def sleep(wait: float) -> str:
            time.sleep(wait)
            return ""

        yield sleep
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed(wait: float) -> str:
        if not select.select([terminal], [], [], wait)[0]:
            return ""
        return os.read(terminal, 1).decode("latin-1") or "q"  # the terminal is gone

    try:
        tty.setcbreak(terminal)
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _plain_width() -> int:
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) > 0 else PLAIN_WIDTH
