"""rwkvmpi status RUN"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command("status")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(run: Path, as_json: bool) -> None:
    """Progress, rate and failures of a run: before, during and after it, from its files alone."""
    from rwkvmpi.store.status import status

    facts = status(run)
    click.echo(json.dumps(facts, indent=1) if as_json else "\n".join(lines(facts)))


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts of store.status as text."""
    state = facts["state"] + {
        "crashed": " (its process died; the same command line goes on from the last commit)",
        "stopped": " (the same command line goes on from the last commit)",
    }.get(facts["state"], "")
    shown = [f"{facts['run']}: {state}"]
    if facts["state"] in ("running", "crashed") and facts["holder"]:
        shown.append(f"  by         {facts['holder']}")
    if facts["attempt"]:
        shown.append(f"  attempt    {facts['attempt']}")
    if facts["documents_done"] is not None:
        total = "" if facts["documents_total"] is None else f" of {facts['documents_total']:,}"
        failed = facts["documents_failed"] or 0
        shown.append(f"  documents  {facts['documents_done']:,}{total}, {failed:,} failed")
    if facts["tokens_done"] is not None:
        shown.append(f"  tokens     {facts['tokens_done']:,}")
    live = facts["progress"] or {}
    if isinstance(rate := live.get("tokens_per_second", live.get("rate")), int | float):
        shown.append(f"  rate       {rate:,.0f} tokens/s")
    if facts["commit"] is not None:
        shown.append(f"  commit     {facts['commit']}, {_age(facts['commit_age_s'])} ago")
    shown += [
        f"  failed     {entry['id'] or 'document ' + str(entry['document'])}: {entry['error']}"
        for entry in facts["failures"]
    ]
    if (facts["documents_failed"] or 0) > len(facts["failures"]) > 0:
        shown.append(f"  failed     ... and {facts['documents_failed'] - len(facts['failures']):,} more")
    return shown


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
