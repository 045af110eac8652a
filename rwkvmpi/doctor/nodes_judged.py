"""What several nodes found together, judged: a shared folder, the way to rank 0, and each node's own findings."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from rwkvmpi.doctor.diagnosis import Finding
from rwkvmpi.doctor.nodes_compare import CLOCK_WARN_S, Facts, few, grouped
from rwkvmpi.doctor.nodes_folder import SLOW_S

CACHES = (
    "the file system keeps what it knows for a while (NFS: actimeo, acdirmax): STOP files and `status` are seen that "
    "late; mount it with actimeo=3 or lookupcache=positive"
)
TOLD_BEFORE = ("python", "packages", "limits")  # in the lines that compare them
LOCKS = (
    "mount it so that locks reach all nodes (NFS without nolock and local_lock, with lockd or NFSv4; Lustre with flock)"
)


def shared_folder(folder: str, reports: Mapping[str, Facts], first: str) -> Iterator[Finding]:
    """node -> what it saw of the folder while `first` wrote there (see nodes_folder), and "mount", where it lies."""
    others = {node: report for node, report in reports.items() if node != first}
    for trouble, who in grouped({n: r["trouble"] for n, r in reports.items() if r.get("trouble")}):
        remedy = "look at that node's mounts (df, dmesg); a dead file server lets every look at it hang"
        yield Finding("shared folder", "fail", f"{few(who)}: {folder}: {trouble}", remedy, nodes=tuple(who))
    yield from _same(folder, reports, others, first)
    seeing = {node: report for node, report in others.items() if report.get("seen")}
    if seeing:
        yield from _delays(folder, seeing, first)
        yield from _replaced(folder, seeing, first)
        yield from _locks(folder, seeing, first)
    if reports.get(first, {}).get("lock") == "not given":
        value = f"{folder}: {first} could not take the lock of a run there"
        yield Finding("locks", "fail", value, LOCKS, nodes=(first,))
    age = reports.get(first, {}).get("file_clock", 0.0)
    if abs(age) > CLOCK_WARN_S:
        value = f"the file server of {folder} is {abs(age):.1f} s {'ahead of' if age > 0 else 'behind'} {first}"
        remedy = "let chrony set both clocks: ages of files mislead, and with them whoever looks for a job's last sign"
        yield Finding("file server's clock", "warn", value, remedy, facts={"seconds": age}, nodes=(first,))


def reachable(reports: Mapping[str, Facts], host: str) -> Iterator[Finding]:
    """The way to rank 0's host, which only live telemetry takes. node -> {"name": "" or why it cannot be reached by its
    name, "address": the address by which it can be reached then, or ""}."""
    remedy = (
        f"names: /etc/hosts or DNS for {host} on all nodes; connections: open the ports between the nodes. Messages "
        "between ranks go MPI's own way; only `rwkvmpi watch` needs this, and reads files instead"
    )
    failed = {}
    for node, report in reports.items():
        if report.get("name"):
            by = f"; by address {report['address']} it works" if report.get("address") else ", nor by an address"
            failed[node] = f"{report['name']}{by}"
    for what, who in grouped(failed):
        yield Finding("way to rank 0", "warn", f"{few(who)}: {host}: {what}", remedy, nodes=tuple(who))
    fine = tuple(node for node in reports if node not in failed)
    if fine:
        yield Finding("way to rank 0", "ok", f"{few(fine)} can resolve and reach {host}", nodes=fine)


def of_each_node(told: Mapping[str, list[Finding]], first: str) -> Iterator[Finding]:
    """node -> its own findings: what is fine on all is told once, as on rank 0's node; the rest by node and value."""
    told = {node: [f for f in found if f.status != "ok" or f.name not in TOLD_BEFORE] for node, found in told.items()}
    names = list(dict.fromkeys(finding.name for findings in told.values() for finding in findings))
    for name in names:
        fine = {node: found for node, all_ in told.items() if (found := [f for f in all_ if f.name == name])}
        bad = {n: [f for f in found if f.status != "ok" or f.fixed] for n, found in fine.items()}
        good = tuple(node for node, found in bad.items() if not found)
        if good:
            example = first if first in good else good[0]
            every = "" if len(good) == 1 else f" ({example}; fine on {_counted(good, told)})"
            for finding in fine[example]:
                if len(grouped({node: [f.value for f in fine[node]] for node in good})) == 1:
                    every = f" ({_counted(good, told)})"
                value = f"{finding.value}{every if len(told) > 1 else ''}"
                yield Finding(name, "ok", value, facts=finding.facts, nodes=good)
        kinds: dict[tuple[Any, ...], list[str]] = {}
        for node, found in bad.items():
            for f in found:
                kinds.setdefault((f.status, f.value, f.remedy, f.fixed, f.fix is not None), []).append(node)
        for (status, value, remedy, fixed, fixable), who in kinds.items():
            facts = next(f.facts for f in bad[who[0]] if f.value == value)
            fix = elsewhere if fixable else None
            yield Finding(name, status, f"{few(who)}: {value}", remedy, fix, fixed, facts, tuple(who))


def elsewhere() -> None:
    """A node mends what is its own, before it tells."""


def _counted(some: tuple[str, ...], told: Mapping[str, Any]) -> str:
    if len(some) < len(told):
        return few(some)
    return "both nodes" if len(told) == 2 else f"all {len(told)} nodes"


def _same(folder: str, reports: Mapping[str, Facts], others: Mapping[str, Facts], first: str) -> Iterator[Finding]:
    blind = [node for node, report in others.items() if not report.get("seen") and not report.get("trouble")]
    kinds = {node: report.get("mount", "?") for node, report in reports.items()}
    if blind:
        for mount, who in grouped({node: kinds[node] for node in blind}):
            value = f"{few(who)} do{'es' * (len(who) == 1)} not see what {first} writes to {folder}: there it is "
            value += f"{kinds[first]}, here {mount}"
            remedy = "give --folder (and later -o) on a file system that all nodes share, by a path that all have"
            yield Finding("shared folder", "fail", value, remedy, nodes=tuple(who))
        return
    if others and all(report.get("seen") for report in others.values()):
        alike = grouped(kinds)
        words = kinds[first] if len(alike) == 1 else "; ".join(f"{few(who)}: {kind}" for kind, who in alike)
        value = f"{folder} is the same on {len(reports)} nodes: {words}"
        yield Finding("shared folder", "ok", value, nodes=tuple(reports))


def _delays(folder: str, seeing: Mapping[str, Facts], first: str) -> Iterator[Finding]:
    """How long after `first` has written them other nodes see a new file and a replaced one."""
    worst = {node: max([0.0, *report.get("new", []), *report.get("replaced", [])]) for node, report in seeing.items()}
    every = [seconds for report in seeing.values() for seconds in [*report.get("new", []), *report.get("replaced", [])]]
    if not every:
        return
    slow = [node for node, seconds in worst.items() if seconds > SLOW_S]
    value = f"{folder}: others see what {first} writes after {_seconds(statistics.median(every))} in the median, "
    value += f"{_seconds(max(every))} at worst"
    facts = {"worst": worst, "median": statistics.median(every)}
    if slow:
        yield Finding("visibility", "warn", f"{value} ({few(slow)})", CACHES, facts=facts, nodes=tuple(slow))
    else:
        yield Finding("visibility", "ok", value, facts=facts, nodes=tuple(seeing))


def _replaced(folder: str, seeing: Mapping[str, Facts], first: str) -> Iterator[Finding]:
    """Reads of a file that is being replaced."""
    torn = tuple(node for node, report in seeing.items() if report.get("torn"))
    gone = tuple(node for node, report in seeing.items() if report.get("missing"))
    if torn:
        value = f"{few(torn)}: a file in {folder} was read in part while {first} replaced it"
        remedy = "rename is not atomic here: commits may be lost; use another file system for runs"
        yield Finding("rename", "fail", value, remedy, nodes=torn)
    if gone:
        value = f"{few(gone)}: a file in {folder} was missing for a moment while {first} replaced it"
        yield Finding("rename", "warn", value, "harmless for a run; `status` may miss a file now and then", nodes=gone)
    reads = sum(report.get("reads", 0) for report in seeing.values())
    if reads and not torn and not gone:
        value = f"{reads} reads of a file that was being replaced gave a whole one each"
        yield Finding("rename", "ok", value, nodes=tuple(seeing))


def _locks(folder: str, seeing: Mapping[str, Facts], first: str) -> Iterator[Finding]:
    """Whether a lock held by `first` keeps the others off, and is free once given back."""
    double = tuple(node for node, report in seeing.items() if report.get("run_lock") == "taken")
    local = tuple(n for n, report in seeing.items() if report.get("lock") in ("taken", "none") and n not in double)
    stuck = tuple(node for node, report in seeing.items() if report.get("freed") is False)
    if double:
        value = f"{few(double)} got the lock of a run in {folder} while {first} held it: two jobs could write one run"
        yield Finding("locks", "fail", value, LOCKS, nodes=double)
    if local:
        value = f"{folder}: locks do not reach {few(local)}; a run is kept for one job by its holder's signs alone"
        yield Finding("locks", "warn", value, LOCKS, nodes=local)
    if stuck:
        value = f"{few(stuck)} could not get a lock in {folder} after {first} had given it back"
        yield Finding("locks", "fail", value, "look at lockd of that node and of the file server", nodes=stuck)
    refused = tuple(node for node, report in seeing.items() if report.get("run_lock") == "refused")
    if refused and not double and not local and not stuck:
        value = f"{folder}: a lock of {first} was refused to {few(refused)}, and free when it was given back"
        yield Finding("locks", "ok", value, nodes=refused)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
