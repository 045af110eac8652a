"""rwkvmpi merge RUN... -o OUT"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

TELL_EVERY_S = 30.0


@click.command("merge")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), required=True, metavar="OUT")
@click.option("--force", is_flag=True, help="Throw away what another job left in OUT.")
def command(runs: tuple[Path, ...], out: Path, force: bool) -> None:
    """Put the results of all parts of a corpus (--shard 1/N to N/N) together in OUT, as if one job had read it.

    RUN: the run folders of the parts, or one folder that holds them. All must be finished; every one is verified. OUT
    becomes a finished run. The same command again goes on when it was interrupted, and says so when all is done.
    """
    from rwkvmpi.store.merge import merge

    told = time.monotonic()

    def tell(said: str) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_EVERY_S:
            told = time.monotonic()
            click.echo(said, err=True)

    merged = merge(runs, out, force, tell)
    failed = f", {merged.failed:,} of them failed" if merged.failed else ""
    if merged.anew:
        click.echo(f"{out}: {merged.documents:,} documents{failed}, merged from {merged.parts:,} parts", err=True)
        click.echo(f"content digest {merged.content_sha256}", err=True)
    else:
        click.echo(f"{out} is merged from these parts: {merged.documents:,} documents{failed}; nothing to do", err=True)
    sys.exit(3 if merged.failed else 0)
