"""rwkvmpi doctor: what is wrong with this machine, and how to mend it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rwkvmpi.doctor.diagnosis import Finding

FEW = 3  # a report of no more needs no sum below it
MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


@click.command("doctor")
@click.option("--model", metavar="M", help="Also check this model file ('bundled' for the one that comes along).")
@click.option("--tokenizer", default="auto", metavar="auto|world|bytes|FILE.json", help="The tokenizer to go with it.")
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path(), help="Where runs will be written.  [default: .]"
)
@click.option("--fix", is_flag=True, help="Mend what can be mended without harm.")
@click.option("--all-ranks", is_flag=True, help="Examine and compare all nodes that mpirun or srun started ranks on.")
@click.option("--fabric", is_flag=True, help="Look at RDMA, GPUs beside it, MPI's way there, and between ranks, only.")
@click.option("--emit", type=click.Choice(["env"]), help="Print the env.sh of jobs/ that fits this machine's fabric.")
@click.option("--json", "as_json", is_flag=True, help="Findings as JSON on stdout.")
def command(
    model: str | None,
    tokenizer: str,
    folder: Path,
    fix: bool,
    all_ranks: bool,
    fabric: bool,
    emit: str | None,
    as_json: bool,
) -> None:
    """Look at Python, torch, MPI, cores, disk, the operators and a model; say what is wrong and how to mend it.

    Under mpirun or srun the world that was started is examined too: with --all-ranks every node, what differs between
    them, and the folder as all of them see it; with --fabric, messages to the next rank are timed. Exit code 1 when
    something is wrong.
    """
    given = click.get_current_context().get_parameter_source
    for name in ("model", "tokenizer", "folder", "fix", "all_ranks") if fabric or emit else ():
        if given(name) is click.core.ParameterSource.COMMANDLINE:
            word = name.replace("_", "-")
            raise click.UsageError(f"--fabric and --emit look at the fabric only; leave --{word} out")
    if emit and as_json:
        raise click.UsageError("--emit env prints a script, no JSON; leave --json out")
    from rwkvmpi.cluster import mpi

    if emit:
        mpi.guard(_emit)
    elif fabric:
        mpi.guard(lambda: _report(_of_the_fabric(), False, as_json))
    elif all_ranks:
        mpi.guard(lambda: _of_all_ranks(model, tokenizer, folder, fix, as_json))
    else:
        mpi.guard(lambda: _report(_of_the_machine(model, tokenizer, folder), fix, as_json))


def _emit() -> int:
    from rwkvmpi.cluster.launcher import launch_facts
    from rwkvmpi.doctor import fabric_env

    if launch_facts().rank == 0:
        click.echo(fabric_env.script(), nl=False)
    return 0


def _of_the_machine(model: str | None, tokenizer: str, folder: Path) -> Iterator[Finding]:
    from rwkvmpi.cluster.launcher import launch_facts
    from rwkvmpi.doctor import diagnosis, mpi_checks

    if launch_facts().rank != 0:  # the others take part in what all ranks do together, and rank 0 reports
        list(diagnosis.examine("mpi", mpi_checks.mpi_library))
        return
    for name, check in diagnosis.checks(folder, model, tokenizer):
        for finding in diagnosis.examine(name, check):
            finding.nodes = (launch_facts().node,)
            yield finding


def _of_all_ranks(model: str | None, tokenizer: str, folder: Path, fix: bool, as_json: bool) -> int:
    from rwkvmpi.cluster import mpi
    from rwkvmpi.cluster.launcher import launch_facts
    from rwkvmpi.doctor import all_ranks
    from rwkvmpi.doctor.nodes_circle import SilenceError

    if launch_facts().size == 1:
        return _report(chain(all_ranks.started_alone(), _of_the_machine(model, tokenizer, folder)), fix, as_json)
    if trouble := list(all_ranks.wrong_world()):  # on all ranks alike
        return _report(iter(trouble), False, as_json)
    examination = all_ranks.AllRanks(mpi.world(), folder, model, tokenizer, fix)
    try:
        code = _report(examination.findings(), fix, as_json, mended=True)
    except SilenceError as error:  # this rank alone may know: it ends the others
        click.echo(f"rwkvmpi: {error}", err=True)
        sys.exit(1)
    if examination.lost:  # nobody may wait for it
        sys.exit(1)
    return code


def _of_the_fabric() -> Iterator[Finding]:
    from rwkvmpi.cluster import mpi
    from rwkvmpi.cluster.launcher import launch_facts
    from rwkvmpi.doctor import diagnosis, fabric_checks, fabric_pairs
    from rwkvmpi.errors import FabricError

    comm = mpi.world()
    if launch_facts().rank == 0:
        if fabric_checks.nothing_here():
            yield from fabric_checks.of_a_bare_machine()
        else:
            for name, check in fabric_checks.checks():
                yield from diagnosis.examine(name, check)
    if comm is not None:
        try:
            yield from fabric_pairs.between_ranks(comm)
        except FabricError as error:  # this rank alone may know: it ends the others
            click.echo(f"rwkvmpi: {error}", err=True)
            sys.exit(1)


def _report(findings: Iterator[Finding], fix: bool, as_json: bool, mended: bool = False) -> int:
    """Show the findings on rank 0; `mended`: every node has applied its own fixes already. The exit code."""
    from rwkvmpi.cluster.launcher import launch_facts
    from rwkvmpi.doctor import diagnosis

    if launch_facts().rank != 0:
        list(findings)
        return 0
    shown: list[Finding] = []
    for finding in findings:
        shown.append(diagnosis.mend(finding) if fix and not mended else finding)
        if not as_json:
            _show(shown[-1], fix)
    bad = sum(finding.status == "fail" for finding in shown)
    warnings = sum(finding.status == "warn" for finding in shown)
    if as_json:
        click.echo(json.dumps([finding.as_json() for finding in shown], indent=1))
    elif len(shown) > FEW:
        click.echo(f"{len(shown)} findings, {bad} wrong, {warnings} to look at")
    sys.stdout.flush()
    return 1 if bad else 0


def _show(finding: Finding, fix: bool) -> None:
    click.echo(f"{MARKS[finding.status]}  {finding.name:16} {finding.value}")
    if finding.status != "ok" and finding.remedy:
        can_fix = "  (--fix does it)" if finding.fix is not None and not fix else ""
        click.echo(f"      {'':16} -> {finding.remedy}{can_fix}")
