"""rwkvmpi export RUN --to jsonl|parquet|trace"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(["jsonl", "parquet", "trace"]), default="jsonl", show_default=True)
@click.option(
    "-o",
    "--output",
    metavar="F",
    help="File to write, - for stdout.  [default: RUN/results.jsonl or .parquet, RUN/trace.json.gz]",
)
@click.option("--tokens", is_flag=True, help="With the id and log-probability of every token (task score).")
def command(run: Path, form: str, output: str | None, tokens: bool) -> None:
    """Write the results of RUN (a run folder or a results.h5) as JSON lines or Parquet, one record per document.

    Values that are not a number become null. States are not exported: read them from results.h5, group /states.
    --to trace writes what --trace has recorded, finished or not, for https://ui.perfetto.dev.
    """
    if form == "trace":
        from rwkvmpi.telemetry.trace_export import export_trace

        if tokens or output == "-":
            raise click.UsageError("a trace has no --tokens, and goes into a file")
        trace = export_trace(run, Path(output) if output else None)
        click.echo(f"{trace}  {trace.stat().st_size:,} bytes; open it at https://ui.perfetto.dev")
        return
    from rwkvmpi.store.export import export_run

    written = export_run(run, form, output, tokens)
    if written is not None:
        click.echo(f"{written}  {written.stat().st_size:,} bytes")
