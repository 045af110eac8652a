"""rwkvmpi embed MODEL INPUT... -o RUN"""

import click

from rwkvmpi.cli.options import task_command

command = task_command(
    "embed",
    "One vector per document of INPUT: the mean of MODEL's output after ln_out over its tokens; with --window N one "
    "vector per N tokens.",
    [
        click.option(
            "--window", type=click.IntRange(0), metavar="N", help="Tokens per vector.  [default: whole documents]"
        )
    ],
)
