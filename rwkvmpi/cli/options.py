"""The options that score, embed, read and run share, and how they become a job."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# option -> (section, key) of the job; options left out keep the job file's value or the default
KEYS = {
    "stages": ("grid", "stages"),
    "ring": ("grid", "ring"),
    "replicas": ("grid", "replicas"),
    "transport": ("grid", "transport"),
    "checksum": ("grid", "checksum"),
    "deadline": ("grid", "deadline"),
    "chunk": ("model", "chunk"),
    "device": ("model", "device"),
    "dtype": ("model", "dtype"),
    "tokenizer": ("model", "tokenizer"),
    "commit_every": ("run", "commit_every"),
    "max_time": ("run", "max_time"),
    "on_error": ("run", "on_error"),
    "threads": ("run", "threads"),
    "text_key": ("input", "text_key"),
    "id_key": ("input", "id_key"),
    "from_run": ("input", "from_run"),
    "shard": ("input", "shard"),
    "telemetry": ("run", "telemetry"),
    "trace": ("run", "trace"),
    "window": ("task", "window"),
}

GRID_OPTIONS: list[Decorator] = [
    click.option("--stages", type=click.IntRange(0), metavar="P", help="Stages: the layers are split over P ranks."),
    click.option("--ring", type=click.IntRange(0), metavar="S", help="Ring slots: S ranks read one document in turn."),
    click.option(
        "--replicas", type=click.IntRange(0), metavar="D", help="Independent groups, each with its documents."
    ),
]

DTYPES = ["auto", "float32", "bfloat16", "float16", "int8"]

MODEL_OPTIONS: list[Decorator] = [
    click.option(
        "--chunk",
        metavar="G|auto",
        help="Tokens per chunk. Part of a result's identity and written into RUN/job.toml. auto: the one that `rwkvmpi "
        "bench` found fastest here, for any grid; a run that was begun keeps its own.  [default: 1024]",
    ),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="[default: auto]"),
    click.option(
        "--dtype", type=click.Choice(DTYPES), help="How the matrices are held.  [default: auto, float32 on CPUs]"
    ),
    click.option("--tokenizer", metavar="auto|world|bytes|FILE.json", help="[default: auto, by the vocabulary's size]"),
    click.option("--text-key", metavar="KEY", help="Key or column of a record's text.  [default: text]"),
    click.option("--id-key", metavar="KEY", help="Key or column of a record's id.  [default: id]"),
    click.option(
        "--from",
        "from_run",
        metavar="RUN",
        help="Go on from the states of RUN, a finished `rwkvmpi read` with the same model, tokenizer, device and "
        "dtype, on whatever ranks: a document with the id of one there must begin with the text that was read there, "
        "and only what it has grown by is read; its tokens, bytes, nll and windows count from there. Others are read "
        "from their start.",
    ),
    click.option(
        "--shard",
        metavar="I/N",
        help="Read only the I-th of N parts of the documents (1/N to N/N), which `rwkvmpi merge` puts together again.",
    ),
]

RUN_OPTIONS: list[Decorator] = [
    click.option(
        "--transport",
        type=click.Choice(["auto", "mpi", "verbs"]),
        help="How messages travel between ranks: through MPI, or by RDMA verbs.  [default: auto]",
    ),
    click.option(
        "--checksum",
        type=click.Choice(["auto", "on", "off"]),
        help="Whether messages between ranks carry one.  [default: auto, on for verbs]",
    ),
    click.option(
        "--deadline",
        type=click.FloatRange(1.0),
        metavar="SECONDS",
        help="How long a neighbour may be silent before the rank gives up.  [default: 300]",
    ),
    click.option("--threads", type=click.IntRange(0), help="Threads per rank.  [default: cores / ranks on the node]"),
    click.option("--commit-every", metavar="SECONDS", help="Or a number of chunks: 500c.  [default: 60]"),
    click.option(
        "--max-time", metavar="TIME", help="Stop in time: 90s, 30m, 12h, D-HH:MM:SS.  [default: Slurm's limit]"
    ),
    click.option(
        "--on-error", type=click.Choice(["record", "stop"]), help="What a bad document does.  [default: record]"
    ),
    click.option(
        "--telemetry",
        type=click.Choice(["on", "files", "off"]),
        help="What `rwkvmpi watch` shows: over the network and in files, in files only, or not at all.  [default: on]",
    ),
    click.option(
        "--trace", is_flag=True, default=None, help="Record what every rank does when, for ui.perfetto.dev, in RUN."
    ),
    click.option("--force", is_flag=True, help="Throw away what another job left in RUN, and start anew."),
    click.option("--dry-run", is_flag=True, help="Check everything, show the plan, read nothing."),
    click.option("-o", "--output", "run_folder", type=click.Path(path_type=Path), required=True, metavar="RUN"),
]


def with_options(*groups: list[Decorator]) -> Decorator:
    """A decorator that adds all options of the groups, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


def job_values(options: dict[str, Any]) -> dict[str, Any]:
    """The given options as the sections of a job; those left out are absent."""
    values: dict[str, Any] = {}
    for name, (section, key) in KEYS.items():
        if options.get(name) is not None:
            values.setdefault(section, {})[key] = options[name]
    return values


def start(values: dict[str, Any], where: str, run_folder: Path, force: bool, dry_run: bool) -> None:
    """Make the job and run it; ends the process with the run's exit code."""
    from rwkvmpi.config import make_job
    from rwkvmpi.run import main

    sys.exit(main(lambda: make_job(values, where), run_folder, force=force, dry_run=dry_run))


def task_command(name: str, help_text: str, extra: list[Decorator]) -> click.Command:
    """The command of one task: rwkvmpi NAME MODEL INPUT... -o RUN."""

    @click.command(name, help=help_text)
    @click.argument("model")
    @click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
    @with_options(extra, GRID_OPTIONS, MODEL_OPTIONS, RUN_OPTIONS)
    def command(
        model: str, inputs: tuple[str, ...], run_folder: Path, force: bool, dry_run: bool, **options: Any
    ) -> None:
        values = job_values(options)
        values.setdefault("model", {})["path"] = model
        values.setdefault("input", {})["paths"] = list(inputs)
        values.setdefault("task", {})["name"] = name
        start(values, f"rwkvmpi {name}", run_folder, force, dry_run)

    return command
