"""rwkvmpi export RUN --to jsonl|parquet"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(["jsonl", "parquet"]), default="jsonl", show_default=True)
@click.option(
    "-o", "--output", metavar="F", help="File to write, - for stdout.  [default: RUN/results.jsonl or .parquet]"
)
@click.option("--tokens", is_flag=True, help="With the id and log-probability of every token (task score).")
def command(run: Path, form: str, output: str | None, tokens: bool) -> None:
    """Write the results of RUN (a run folder or a results.h5) as JSON lines or Parquet, one record per document.

    Values that are not a number become null. States are not exported: read them from results.h5, group /states.
    """
    from rwkvmpi.store.export import export_run

    written = export_run(run, form, output, tokens)
    if written is not None:
        click.echo(f"{written}  {written.stat().st_size:,} bytes")
