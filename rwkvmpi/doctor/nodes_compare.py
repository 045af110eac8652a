"""What nodes and ranks say of themselves, compared: pure functions over plain facts, each yielding findings.

`ranks` is a list of facts, one dict per rank with at least "rank" and "node"; `nodes` is node -> facts of that node.
What is the same everywhere is one line; what differs is a line with each value and the nodes that have it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rwkvmpi.cluster import affinity
from rwkvmpi.doctor import node_limits
from rwkvmpi.doctor.diagnosis import Finding

Facts = Mapping[str, Any]
SHOWN = 6
CLOCK_WARN_S = 1.0
ONE_INSTALLATION = "use one installation on all nodes: results are bit-identical only within one build"
SAME_MODULES = "load the same modules on all nodes, or use one installation that all of them see"
SAME_NODES = "take nodes of one kind: sbatch --constraint, or name them with --nodelist"


def few(names: Iterable[str]) -> str:
    """Some of many names."""
    known = list(names)
    return ", ".join(known[:SHOWN]) + (f" and {len(known) - SHOWN} more" if len(known) > SHOWN else "")


def grouped(values: Mapping[str, Any]) -> list[tuple[Any, list[str]]]:
    """[(value, who has it)], the commonest first; of equals the one that comes first."""
    kinds: dict[str, tuple[Any, list[str]]] = {}
    for who, value in values.items():
        kinds.setdefault(json.dumps(value, sort_keys=True, default=str), (value, []))[1].append(who)
    return sorted(kinds.values(), key=lambda kind: -len(kind[1]))


def differing(
    title: str, key: str, values: Mapping[str, Any], remedy: str, status: Literal["warn", "fail"] = "fail"
) -> Iterator[Finding]:
    """A finding where not all have the same value; its nodes are those that differ from the commonest."""
    kinds = grouped(values)
    if len(kinds) > 1:
        value = f"{key}: " + "; ".join(f"{few(who)}: {_shown(kind)}" for kind, who in kinds)
        odd = tuple(sorted({one.rpartition(" on ")[2] for _, who in kinds[1:] for one in who}))
        yield Finding(title, status, value, remedy, facts={"key": key, "values": dict(values)}, nodes=odd)


def table(
    title: str, rows: Mapping[str, Facts], remedy: str, status: Literal["warn", "fail"], mild: Iterable[str] = ()
) -> Iterator[Finding]:
    """node -> {key: value}: one line for the keys that all agree on, and one for each that differs (`mild`: keys that
    only warn)."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    alike, different = {}, []
    for key in keys:
        found = list(differing(title, key, {n: row.get(key, "none") for n, row in rows.items()}, remedy, status))
        for finding in found:
            if key in mild:
                finding.status = "warn"
        different += found
        if not found:
            alike[key] = next(iter(rows.values())).get(key, "none")
    if alike:
        names = tuple(dict.fromkeys(who.rpartition(" on ")[2] for who in rows))
        where = f"alike on {len(names)} nodes: " if len(names) > 1 else ""
        yield Finding(title, "ok", where + ", ".join(f"{k} {v}" for k, v in alike.items()), facts=alike, nodes=names)
    yield from different


def layout(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Which ranks are where, and that no two machines call themselves alike."""
    where: dict[str, list[int]] = {}
    boots: dict[str, set[str]] = {}
    for fact in ranks:
        where.setdefault(fact["node"], []).append(fact["rank"])
        boots.setdefault(fact["host"], set()).add(fact.get("boot", ""))
    value = f"{len(where)} nodes, {len(ranks)} ranks of {ranks[0].get('mpi') or 'MPI'} started by "
    value += f"{ranks[0].get('launcher', '?')}: " + few(
        f"{node} ({_ranks(numbers)})" for node, numbers in where.items()
    )
    yield Finding("nodes", "ok", value, facts={"ranks": where}, nodes=tuple(where))
    for host, machines in boots.items():
        if len(machines) > 1:
            remedy = "give each machine a name of its own (hostnamectl set-hostname): locks and logs go by it"
            yield Finding("host names", "fail", f"{len(machines)} machines call themselves {host}", remedy)


def installations(nodes: Mapping[str, Facts]) -> Iterator[Finding]:
    """The program's own files: the same on all nodes, or which of them are not."""
    files = {node: facts["files"] for node, facts in nodes.items() if isinstance(facts.get("files"), dict)}
    if not files:
        return
    kinds = grouped(files)
    digest, paths = _digest(kinds[0][0]), sorted({str(facts.get("package", "?")) for facts in nodes.values()})
    if len(kinds) == 1:
        value = f"the same {len(kinds[0][0])} files on all nodes, digest {digest}, in {few(paths)}"
        yield Finding("program", "ok", value, facts={"digest": digest}, nodes=tuple(files))
    for other, who in kinds[1:]:
        names = sorted(name for name in {*kinds[0][0], *other} if kinds[0][0].get(name) != other.get(name))
        value = (
            f"{few(who)}: rwkvmpi in {nodes[who[0]].get('package', '?')} has other files than {few(kinds[0][1])} "
            f"(digest {_digest(other)}, there {digest}): {few(names)}"
        )
        remedy = "a stale copy: install it anew on those nodes, or use one installation that all of them see"
        yield Finding("program", "fail", value, remedy, facts={"files": names}, nodes=tuple(who))


def limits(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """The limits of every rank: alike in one line, and each that differs."""
    rows = per_node(ranks, "limits")
    shown = {who: {k: node_limits.shown(k, v) for k, v in row.items()} for who, row in rows.items()}
    yield from table("limits of ranks", shown, node_limits.RAISE, "warn")


def environments(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Variables that differ between ranks. Paths are told by their first part that differs."""
    rows = per_node(ranks, "environment")
    remedy = "export them where all ranks get them: mpirun -x NAME, srun --export=ALL, or env.sh in the batch script"
    keys = sorted({key for row in rows.values() for key in row})
    count = 0
    for key in keys:
        values = {who: row.get(key, "not set") for who, row in rows.items()}
        if key.endswith("PATH"):
            values = _first_difference(values)
        for finding in differing("environment", key, values, remedy, "warn"):
            count += 1
            yield finding
    if not count:
        named = few(key for key in keys if not key.endswith("PATH")) or "none set"
        yield Finding("environment", "ok", f"the same for all ranks: {named}", nodes=_nodes(ranks))


def affinities(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Ranks of a node that a launcher has bound to the same cores, while others of its cores have no rank."""
    for node in _nodes(ranks):
        here = [fact for fact in ranks if fact["node"] == node and fact.get("cpus")]
        masks = [frozenset(fact["cpus"]) for fact in here]
        cores = max((fact.get("cpus_of_node", 0) for fact in here), default=0)
        used = frozenset[int]().union(*masks)
        crowd = [i for i, mask in enumerate(masks) if sum(not mask.isdisjoint(other) for other in masks) > 1]
        if crowd and len(used) < min(cores, sum(fact.get("threads", 1) for fact in here)):
            value = f"{node}: {_ranks([here[i]['rank'] for i in crowd])} are bound to the same cores, {_span(used)} of "
            value += f"{cores}; each rank waits for the other's turn"
            remedy = "srun --cpu-bind=cores -c T, or mpirun --bind-to core --map-by slot:PE=T, with T threads per rank"
            yield Finding("affinity", "warn", value, remedy, nodes=(node,))


def clocks(offsets: Mapping[str, tuple[float, float]], first: str) -> Iterator[Finding]:
    """node -> (its clock minus that of rank 0's node, seconds of the round trip)."""
    late = {node: offset for node, (offset, _) in offsets.items() if abs(offset) > CLOCK_WARN_S}
    for node, offset in late.items():
        value = f"{node} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} {first}"
        remedy = "let chrony or ntpd set the clocks: times in logs, Slurm's ends of jobs and ages of files mislead"
        yield Finding("clocks", "warn", value, remedy, facts={"seconds": offset}, nodes=(node,))
    fine = {node: pair for node, pair in offsets.items() if node not in late}
    if fine:
        offset, trip = max((abs(offset), trip) for offset, trip in fine.values())
        value = f"{few(fine)} within {1e3 * max(offset, trip / 2):.1f} ms of {first}"
        facts = {"seconds": {node: pair[0] for node, pair in fine.items()}}
        yield Finding("clocks", "ok", value, facts=facts, nodes=tuple(fine))


def files(sizes: Mapping[str, Facts], digests: Mapping[str, Facts]) -> Iterator[Finding]:
    """Model and tokenizer: node -> {name: {"path", "bytes"} or {"path", "error"}}, and node -> {name: SHA-256}."""
    names = list(dict.fromkeys(name for row in sizes.values() for name in row))
    for name in names:
        rows = {node: row.get(name, {"error": "no such part of the model"}) for node, row in sizes.items()}
        missing = {node: row["error"] for node, row in rows.items() if "error" in row}
        for error, who in grouped(missing):
            path = str(rows[who[0]].get("path", name))
            value = f"{few(who)}: {error if path in error else f'{path}: {error}'}"
            yield Finding(
                name, "fail", value, "copy it there, or name it by a path that all nodes see", nodes=tuple(who)
            )
        there = {node: row["bytes"] for node, row in rows.items() if "bytes" in row}
        remedy = "copy the right one there; SHA-256 tells which is right"
        unlike = list(differing(name, "bytes", there, remedy))
        told = {node: digests[node][name] for node in there if name in digests.get(node, {})}
        unlike = unlike or list(differing(name, "SHA-256", told, remedy))
        yield from unlike
        if told and not unlike and not missing:
            value = (
                f"alike on {len(told)} nodes: {next(iter(there.values())):,} bytes, SHA-256 {next(iter(told.values()))}"
            )
            yield Finding(name, "ok", value, nodes=tuple(told))


def per_node(ranks: Sequence[Facts], what: str) -> dict[str, Any]:
    """Who -> that fact: one entry for a node whose ranks agree, and one per rank where they do not."""
    found: dict[str, Any] = {}
    for node in _nodes(ranks):
        values = {
            f"rank {fact['rank']} on {node}": fact[what] for fact in ranks if fact["node"] == node and what in fact
        }
        if not values:
            continue
        found |= {node: next(iter(values.values()))} if len(grouped(values)) == 1 else values
    return found


def _nodes(ranks: Sequence[Facts]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(fact["node"] for fact in ranks))


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value) or "empty"


def _ranks(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"ranks {numbers[0]}-{numbers[-1]}"
    return f"ranks {few(map(str, numbers))}"


def _span(cpus: frozenset[int]) -> str:
    return affinity.shown(cpus)


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]


def _first_difference(values: Mapping[str, str]) -> dict[str, str]:
    """Of search paths only the first part in which they are not alike."""
    lists = {who: value.split(":") for who, value in values.items()}
    longest = max(map(len, lists.values()))
    for index in range(longest):
        parts = {who: parts[index] if index < len(parts) else "nothing more" for who, parts in lists.items()}
        if len(set(parts.values())) > 1:
            return {who: f"part {index + 1} {part}" for who, part in parts.items()}
    return dict.fromkeys(values, "")
