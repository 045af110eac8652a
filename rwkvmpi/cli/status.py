"""rwkvmpi status RUN ..."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

MOST_AGAIN = 10
OLD_AFTER_S = 15.0  # rank 0 writes down how far the job is every 5 s, the lock's holder beats every 4


@click.command("status")
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RUN...")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(runs: tuple[Path, ...], as_json: bool) -> None:
    """Progress, rate and failures of a run: before, during and after it, from its files alone, on any machine that sees
    them. Several RUNs, or a folder that holds run folders (the shards of a corpus): a table, with what failed and how
    to run it again."""
    from rwkvmpi.store.parts import parts_status
    from rwkvmpi.store.status import status
    from rwkvmpi.telemetry.sample import printable

    single = len(runs) == 1 and not _holds_runs(runs[0])
    facts = status(runs[0]) if single else parts_status(list(runs))
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for line in lines(facts) if single else part_lines(facts):
        click.echo(printable(line))  # ids and errors of documents may be any text


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts of store.status as text."""
    from rwkvmpi.cluster.logs import duration

    state = facts["state"]
    known = {
        "crashed": " (its process died; the same command line goes on from the last commit)",
        "stopped": " (the same command line goes on from the last commit)",
    }
    if state == "finished" and facts["finished_age_s"] is not None:
        known["finished"] = f" {duration(facts['finished_age_s'])} ago"
    shown = [f"{facts['run']}: {state}{known.get(state, '')}"]
    what = ", ".join(filter(None, [facts["task"], facts["shard"] and f"shard {facts['shard']}"]))
    if what:
        shown.append(f"  task       {what}")
    if state in ("running", "crashed") and facts["holder"]:
        silent = facts["holder_silent_s"]
        old = f"; its last sign of life is {duration(silent)} old" if silent and silent > OLD_AFTER_S else ""
        shown.append(f"  by         {facts['holder']}{old}")
    elif state == "stopped" and facts["slurm_job"]:
        shown.append(f"  by         Slurm job {facts['slurm_job']}, the last time")
    if facts["attempt"]:
        restarts = (facts["progress"] or {}).get("slurm_restarts")
        again = f", the Slurm job's restart {restarts}" if isinstance(restarts, int) and restarts else ""
        shown.append(f"  attempt    {facts['attempt']}{again}")
    if facts["grid"]:
        stages, ring, replicas = facts["grid"]
        ranks = stages * ring * replicas
        shown.append(f"  grid       {stages} x {ring} x {replicas}, {ranks:,} rank{'s' if ranks > 1 else ''}")
    return shown + _how_far(facts) + _how_fast(facts) + _ranks(facts) + _why(facts) + _failures(facts)


def _how_far(facts: dict[str, Any]) -> list[str]:
    from rwkvmpi.cluster.logs import duration

    shown = []
    committed = ", as of the last commit" if facts["state"] in ("stopped", "crashed") else ""
    if facts["documents_done"] is not None:
        total = "" if facts["documents_total"] is None else f" of {facts['documents_total']:,}"
        failed = facts["documents_failed"] or 0
        shown.append(f"  documents  {facts['documents_done']:,}{total}, {failed:,} failed{committed}")
    if facts["tokens_done"] is not None:
        shown.append(f"  tokens     {facts['tokens_done']:,}{committed}")
    if facts["commit"] is not None:
        every = facts["commit_every_s"]
        often = f", {duration(every)} after the one before" if every is not None else ""
        shown.append(f"  commit     {facts['commit']}, {duration(facts['commit_age_s'])} ago{often}")
    return shown


def _how_fast(facts: dict[str, Any]) -> list[str]:
    from rwkvmpi.cluster.logs import duration
    from rwkvmpi.telemetry.ranks import ENDED

    shown = []
    now, average = facts["rate_now"], facts["rate_average"]
    rates = [f"{now:,.0f} tokens/s {duration(facts['rate_now_age_s'])} ago"] if now is not None else []
    rates += [f"{average:,.0f} tokens/s on average of the last start"] if average is not None else []
    if rates:
        shown.append(f"  rate       {', '.join(rates)}")
    if facts["state"] != "running":
        return shown
    age, ranks = facts["progress_age_s"], facts["ranks"]
    if facts["seconds_left"] is not None:
        at = " at the average rate" if ranks and ranks["stalls"] else ""
        shown.append(f"  left       about {duration(facts['seconds_left'])}{at}")
    if ranks is not None and ranks["ended"] == ranks["ranks"]:
        shown.append(f"  data       {ENDED}")
    elif facts["progress"] is None:
        shown.append("  data       none yet from this start: it still looks at the model and the input")
    elif age > OLD_AFTER_S:
        shown.append(f"  data       {duration(age)} old: rank 0 has written nothing since")
    return shown


def _ranks(facts: dict[str, Any]) -> list[str]:
    from rwkvmpi.cluster.logs import duration

    ranks = facts["ranks"]
    if ranks is None:
        return []
    if facts["state"] == "crashed":
        first = ranks["silent"][:1] if ranks["age_s"] - ranks["newest_age_s"] > OLD_AFTER_S else []
        return [f"  silent     rank {r['rank']} ({r['host']}) first, for {duration(r['age_s'])}" for r in first]
    shown = []
    if ranks["known"] < ranks["ranks"]:
        shown.append(f"  ranks      of {ranks['known']:,} of {ranks['ranks']:,} there is a sample")
    if slow := ranks["slowest"]:
        rate = slow["tokens_per_second"]
        shown.append(f"  slowest    rank {slow['rank']} ({slow['host']}), {rate:,.0f} tokens/s")
    if waiting := ranks["most_waiting"]:
        shown.append(
            f"  waited     rank {waiting['rank']} ({waiting['host']}) longest, {duration(waiting['waited_s'])}"
        )
    stalled = [f"  stalled    {sentence}" for sentence in ranks["stalls"][:5]]
    if ranks["silent"]:
        stalled.insert(1, f"             its log: {ranks['silent'][0]['log']}")
    return shown + stalled


def _why(facts: dict[str, Any]) -> list[str]:
    if facts["state"] == "crashed" and not facts["words"]:
        return ["  why        no rank left a word in its log, as when ranks are killed or their node is lost"]
    if facts["state"] not in ("crashed", "stopped"):
        return []
    shown = []
    for words in facts["words"]:
        when = f"{words['time']}, " if words["time"] else ""
        shown += [f"  why        rank {words['rank']}: {words['text']}", f"             ({when}{words['log']})"]
    return shown


def _failures(facts: dict[str, Any]) -> list[str]:
    shown = [
        f"  failed     {entry['id'] or 'document ' + str(entry['document'])}: {entry['error']}"
        for entry in facts["failures"]
    ]
    if (facts["documents_failed"] or 0) > len(facts["failures"]) > 0:
        shown.append(f"  failed     ... and {facts['documents_failed'] - len(facts['failures']):,} more")
    return shown


def part_lines(parts: dict[str, Any]) -> list[str]:
    """The facts of store.parts as text: a table by part, and how to go on with what failed."""
    counts = ", ".join(f"{count:,} {state}" for state, count in sorted(parts["counts"].items()))
    total = parts["parts_total"]
    shown = [f"{len(parts['parts']):,} runs: {counts}" if total is None else f"{total:,} parts: {counts}"]
    totals = parts["totals"]
    if totals["documents_done"] is not None:
        of = f" of {totals['documents_total']:,}" if totals["documents_total"] is not None else ""
        unknown = " where it is known" if parts["missing"] or _silent_parts(parts) else ""
        shown.append(
            f"  documents  {totals['documents_done']:,}{of}, {totals['documents_failed'] or 0:,} failed{unknown}"
        )
    if totals["tokens_done"] is not None:
        shown.append(f"  tokens     {totals['tokens_done']:,}")
    running = [row["status"] for row in parts["parts"] if row["state"] == "running"]
    rates = [facts["rate_average"] for facts in running if facts["rate_average"] is not None]
    if rates:
        parts_of = f"{len(rates):,} of {len(running):,} running parts"
        shown.append(f"  rate       {sum(rates):,.0f} tokens/s on average of their last starts in {parts_of}")
    table = [("part", "state", "documents", "failed", "tokens", "run")]
    table += [_part_cells(row) for row in parts["parts"]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells[2:5], widths[2:5], strict=True)]
        shown.append("  " + "  ".join([*left, *right, cells[5]]))
    rows = {row["run"]: row for row in parts["parts"]}
    for entry in parts["again"][:MOST_AGAIN]:
        name = f"part {'/'.join(map(str, entry['shard']))}" if entry["shard"] else entry["run"]
        facts = rows[entry["run"]]["status"] if entry["run"] in rows else {}
        why = [f"rank {words['rank']}: {words['text']}" for words in facts.get("words", [])[:1]]
        why += [facts["error"]] if "error" in facts else []
        command = entry["command"] or "the command line that began it: it has no job.toml yet"
        shown += ["", f"  {name} is {entry['state']}{': ' if why else ''}{''.join(why)}", f"    again: {command}"]
    if (more := len(parts["again"]) - MOST_AGAIN) > 0:
        shown += ["", f"  and {more:,} more that are not finished (all of them with --json)"]
    if parts["array"] and len(parts["again"]) > 1:
        shown += ["", f"  all of these as a job array: sbatch --array={parts['array']}"]
    if parts["merged"]:
        shown.append(f"  merged     {parts['merged']['run']}: {parts['merged']['state']}")
    shown += [f"  other      {other['run']}: {other['why']}" for other in parts["others"]]
    return shown


def _part_cells(row: dict[str, Any]) -> tuple[str, str, str, str, str, str]:
    def number(value: int | None) -> str:
        return "" if value is None else f"{value:,}"

    part = "/".join(map(str, row["shard"])) if row["shard"] else "-"
    done = number(row["documents_done"])
    if done and row["documents_total"] is not None:
        done = f"{done} of {row['documents_total']:,}"
    return part, row["state"], done, number(row["documents_failed"]), number(row["tokens_done"]), row["run"]


def _silent_parts(parts: dict[str, Any]) -> bool:
    return any(row["documents_total"] is None for row in parts["parts"])


def _holds_runs(path: Path) -> bool:
    """Whether it is no run folder itself but holds some."""
    from rwkvmpi.store.run_folder import RunFolder
    from rwkvmpi.store.status import holds_a_run

    if holds_a_run(RunFolder(path)) or not path.is_dir():
        return False
    try:
        return any(entry.is_dir() and RunFolder(entry).exists for entry in path.iterdir())
    except OSError:
        return False
