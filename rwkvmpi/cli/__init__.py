"""The command line. Each verb lives in its own file and is loaded only when it is called."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import click

from rwkvmpi import __version__
from rwkvmpi.errors import NumericalError, UserError

VERBS = {
    "run": "Do the job described by a TOML file.",
    "score": "Log-probability of every token, bits per byte of every document.",
    "embed": "One vector per document or per window of tokens.",
    "read": "The final state of every document.",
    "inspect": "What a model file, a run folder or an HDF5 file of ours is.",
    "export": "Results as JSON lines or Parquet.",
    "merge": "The results of all shards of a corpus as those of one run.",
    "status": "Progress, rate and failures of a run, or of a corpus in shards.",
    "watch": "A run while it goes on: ranks, rates, waits, commits.",
    "plan": "Layout, bytes per rank and hop, predicted time.",
    "doctor": "What is wrong with this machine, and how to mend it.",
    "bench": "How fast this machine computes and sends, for plan and --chunk auto.",
    "random-model": "Random weights of an official or given shape.",
}


class _LazyGroup(click.Group):
    """Shows all verbs without importing them: `--help` answers before torch or MPI would have loaded."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = import_module(f"rwkvmpi.cli.{name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="rwkvmpi")
def group() -> None:
    """Read long documents with RWKV models: alone, with mpirun, or with srun.

    The same command line again resumes; a finished run says so. Exit codes: 0 done, 2 usage or configuration,
    3 done but some documents failed, 75 stopped early and resumable.
    """


def main(arguments: list[str] | None = None) -> Any:
    """The entry point: a user's mistake is one sentence on stderr and exit code 2, never a traceback.

    Under a launcher every rank finds the same mistake on the command line; rank 0 alone speaks of it.
    """
    from rwkvmpi.cluster.launcher import launch_facts

    try:
        code = group.main(args=arguments, prog_name="rwkvmpi", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        if launch_facts().rank == 0:
            error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except (UserError, NumericalError) as error:
        from rwkvmpi.cluster.mpi import fail

        fail(error)
    except BrokenPipeError:  # `rwkvmpi inspect ... | head`: the reader went away, which is no mistake
        sys.stderr.close()
        sys.exit(0)
