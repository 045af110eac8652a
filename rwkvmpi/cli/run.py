"""rwkvmpi run JOB.toml -o RUN"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rwkvmpi.cli.options import GRID_OPTIONS, MODEL_OPTIONS, RUN_OPTIONS, job_values, start, with_options


@click.command("run")
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key of the job file.")
@with_options(GRID_OPTIONS, MODEL_OPTIONS, RUN_OPTIONS)
def command(job: Path, settings: tuple[str, ...], run_folder: Path, force: bool, dry_run: bool, **options: Any) -> None:
    """Do the job that the TOML file JOB describes; options and --set override its keys."""
    from rwkvmpi.config import load_job, override

    values = load_job(job)
    for section, keys in job_values(options).items():
        values.setdefault(section, {}).update(keys)
    override(values, settings)
    start(values, str(job), run_folder, force, dry_run)
