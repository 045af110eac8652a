"""rwkvmpi doctor: what is wrong with this machine, and how to mend it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rwkvmpi.cluster.doctor import Finding

MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


@click.command("doctor")
@click.option("--model", metavar="M", help="Also check this model file ('bundled' for the one that comes along).")
@click.option("--tokenizer", default="auto", metavar="auto|world|bytes|FILE.json", help="The tokenizer to go with it.")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path(), help="Where runs will be written.  [default: .]"
)
@click.option("--fix", is_flag=True, help="Mend what can be mended without harm.")
@click.option("--json", "as_json", is_flag=True, help="Findings as JSON on stdout.")
def command(model: str | None, tokenizer: str, folder: Path, fix: bool, as_json: bool) -> None:
    """Look at Python, torch, MPI, cores, disk, the operators and a model; say what is wrong and how to mend it.

    Under mpirun or srun the world that was started is examined too. Exit code 1 when something is wrong.
    """
    from rwkvmpi.cluster import mpi

    mpi.guard(lambda: _examine(model, tokenizer, folder, fix, as_json))


def _examine(model: str | None, tokenizer: str, folder: Path, fix: bool, as_json: bool) -> int:
    from rwkvmpi.cluster import doctor, mpi_checks
    from rwkvmpi.cluster.launcher import launch_facts

    if launch_facts().rank != 0:  # the others take part in what all ranks do together, and rank 0 reports
        list(doctor.examine("mpi", mpi_checks.mpi_library))
        return 0
    findings = []
    for name, check in doctor.checks(folder, model, tokenizer):
        for finding in doctor.examine(name, check):
            shown = doctor.mend(finding) if fix else finding
            findings.append(shown)
            if not as_json:
                _show(shown, fix)
    if as_json:
        click.echo(json.dumps([finding.as_json() for finding in findings], indent=1))
    bad = sum(finding.status == "fail" for finding in findings)
    warnings = sum(finding.status == "warn" for finding in findings)
    if not as_json:
        click.echo(f"{len(findings)} findings, {bad} wrong, {warnings} to look at")
    sys.stdout.flush()
    return 1 if bad else 0


def _show(finding: Finding, fix: bool) -> None:
    click.echo(f"{MARKS[finding.status]}  {finding.name:16} {finding.value}")
    if finding.status != "ok" and finding.remedy:
        can_fix = "  (--fix does it)" if finding.fix is not None and not fix else ""
        click.echo(f"      {'':16} -> {finding.remedy}{can_fix}")
