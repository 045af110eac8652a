"""The doctor for all nodes of a job: each examines itself, rank 0 compares, nobody waits for a lost one for ever."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rwkvmpi.cluster import mpi
from rwkvmpi.cluster.launcher import launch_facts
from rwkvmpi.doctor import machine_checks, nodes_compare, nodes_facts, nodes_folder, nodes_judged, nodes_network
from rwkvmpi.doctor.diagnosis import Finding, examine, mend
from rwkvmpi.doctor.node_bounded import bounded
from rwkvmpi.doctor.nodes_circle import SILENCE_S, Answer, Circle

LONG_S = 1800.0  # of work that says by itself when it does not go on
LOOK_AT = "look at that node: is it up, does `df` return, what does dmesg say?"


class AllRanks:
    """One examination. Every rank iterates over `findings` to its end; only rank 0 gets any."""

    def __init__(
        self, comm: Any, folder: Path, model: str | None, tokenizer: str, fix: bool, silence_s: float = SILENCE_S
    ) -> None:
        self._circle = Circle(comm, silence_s)
        self._folder, self._model, self._tokenizer, self._fix = folder.absolute(), model, tokenizer, fix
        self._nodes: dict[int, str] = {}  # rank -> node
        self._leaders: dict[int, str] = {}  # the first rank of every node -> node
        self._facts: dict[str, Any] = {}  # node -> what its leader says of it
        self._mended: list[Finding] = []

    @property
    def lost(self) -> bool:
        """Whether a rank is so silent that the others cannot leave together with it (known on rank 0)."""
        return bool(self._circle.lost)

    def findings(self) -> Iterator[Finding]:
        """The report. SilenceError on the other ranks when rank 0 is lost."""
        for finding in self._findings():
            finding.nodes = finding.nodes or (self._nodes[0],)  # what only rank 0 has looked at
            yield finding

    def _findings(self) -> Iterator[Finding]:
        ranks = self._roles()
        if self._rank == 0:
            yield from nodes_compare.layout(ranks)
        yield from self._of_nodes()
        if self._rank == 0:
            yield from nodes_compare.limits(ranks)
            yield from nodes_compare.environments(ranks)
            yield from nodes_compare.affinities(ranks)
        yield from self._threads(ranks)
        yield from self._clocks()
        yield from self._network()
        yield from self._shared_folder()
        yield from self._files()
        if self._rank == 0:
            for rank, what in sorted(self._circle.lost.items()):
                node = self._nodes.get(rank, "a node that has not said its name")
                value = f"rank {rank} on {node} has been silent since: {what}"
                yield Finding("lost", "fail", value, LOOK_AT, nodes=(node,))

    @property
    def _rank(self) -> int:
        return int(self._circle.rank)

    def _roles(self) -> list[dict[str, Any]]:
        """Who is where; the facts of all ranks that answer, on rank 0, whose `node` is unique for each machine."""

        def first() -> dict[str, Any]:
            if self._fix and self._rank == 0:  # before other nodes look for the folder
                found = [mend(one) for one in examine("folder", lambda: machine_checks.run_folder(self._folder))]
                self._mended = [finding for finding in found if finding.fixed]
            return nodes_facts.of_this_rank()

        answers = self._circle.collect("their places", first)
        ranks = [{**answer.value} for answer in answers if answer.value]
        machines: dict[str, list[str]] = {}
        for fact in ranks:
            same_name = machines.setdefault(fact["node"], [])
            if fact["boot"] not in same_name:
                same_name.append(fact["boot"])
            number = same_name.index(fact["boot"])
            fact["node"] += f" ({number + 1})" if number else ""
        self._nodes = self._circle.tell({fact["rank"]: fact["node"] for fact in ranks})
        for rank, node in sorted(self._nodes.items()):
            if node not in self._leaders.values():
                self._leaders[rank] = node
        return ranks

    def _of_nodes(self) -> Iterator[Finding]:
        """Every node's own checks, and what has to be the same on all of them."""
        leads = self._rank in self._leaders

        def work() -> Any:
            if not leads:
                return None
            found = nodes_facts.own_findings(self._folder, self._fix, self._rank == 0)
            return nodes_facts.of_this_node(self._folder, self._model, self._tokenizer), found

        answers = self._circle.collect("its own checks", work, LONG_S)
        if self._rank != 0:
            return
        yield from self._mended
        told = {}
        for rank, node in self._leaders.items():
            if answers[rank].value is None:
                yield _unanswered(node, answers[rank])
                continue
            self._facts[node], told[node] = answers[rank].value
            for what, why in self._facts[node]["trouble"].items():
                yield Finding(what, "fail", f"{node}: {why}", LOOK_AT, nodes=(node,))
        yield from examine("slurm", machine_checks.slurm)
        yield from nodes_compare.installations(self._facts)
        one, modules, kind = nodes_compare.ONE_INSTALLATION, nodes_compare.SAME_MODULES, nodes_compare.SAME_NODES
        isa = f"set RWKVMPI_ISA to the least of them everywhere, or {kind}"
        yield from nodes_compare.table("versions", self._rows("versions"), one, "fail", ("rich", "click", "pyzmq"))
        libraries = self._rows("libraries")
        mild = {key for row in libraries.values() for key in row} - {"MPI"}  # paths may differ, the rest works often
        yield from nodes_compare.table("libraries", libraries, modules, "fail", mild)
        yield from nodes_compare.table("kernels", self._rows("operators"), isa, "warn")
        yield from nodes_compare.table("GPUs", self._rows("gpus"), kind, "warn")
        yield from nodes_judged.of_each_node(told, self._nodes[0])

    def _rows(self, what: str) -> dict[str, Any]:
        return {node: facts[what] for node, facts in self._facts.items() if what in facts}

    def _threads(self, ranks: list[dict[str, Any]]) -> Iterator[Finding]:
        """Where every rank's threads are; torch is imported before, while signs of life go on."""
        answers = self._circle.collect("importing torch", lambda: __import__("torch") and None)
        whole = self._circle.tell(not any(answer.trouble for answer in answers))
        if whole:
            from rwkvmpi.doctor import thread_checks

            found = list(thread_checks.of_all_ranks(self._circle))
            for finding in found if self._rank == 0 else ():
                about = {fact["node"]: fact["host"] for fact in ranks}.items()
                finding.nodes = tuple(node for node, host in about if f" {host}:" in f" {finding.value}")
                yield finding
        for rank, answer in enumerate(answers):
            if answer.trouble and rank not in self._circle.lost:
                value = f"rank {rank} on {self._nodes[rank]} cannot import torch: {answer.trouble}"
                yield Finding("threads", "fail", value, LOOK_AT, nodes=(self._nodes[rank],))

    def _clocks(self) -> Iterator[Finding]:
        offsets = self._circle.clocks([rank for rank in self._leaders if rank]) if self._rank == 0 else {}
        self._circle.tell()
        if offsets:
            told = {self._leaders[rank]: pair for rank, pair in offsets.items()}
            yield from nodes_compare.clocks(told, self._nodes[0])

    def _network(self) -> Iterator[Finding]:
        door = nodes_network.Door() if self._rank == 0 else None
        told = self._circle.tell(door.address if door else None)
        looks = self._rank in self._leaders and self._rank != 0
        answers = self._circle.collect("the way to rank 0", (lambda: nodes_network.reach(told)) if looks else dict)
        if door:
            door.close()
            reports = {self._leaders[r]: answer.value for r, answer in enumerate(answers) if r and r in self._leaders}
            yield from nodes_judged.reachable(
                {node: report for node, report in reports.items() if report}, told["host"]
            )

    def _shared_folder(self) -> Iterator[Finding]:
        if len(self._leaders) < 2:
            return
        reports = nodes_folder.examine(self._circle, self._folder, self._leaders)
        for node, report in reports.items():
            report["mount"] = self._facts.get(node, {}).get("mount", "?")
        yield from nodes_judged.shared_folder(str(self._folder), reports, self._nodes[0])

    def _files(self) -> Iterator[Finding]:
        """Sizes first: what differs in them need not be read."""
        sizes = self._rows("sizes") if self._rank == 0 else {}
        unlike = any(len(nodes_compare.grouped(_bytes(sizes, name))) > 1 for row in sizes.values() for name in row)
        if not self._circle.tell(bool(any(sizes.values()) and not unlike)):
            if any(sizes.values()):
                yield from nodes_compare.files(sizes, {})
            return
        from rwkvmpi.doctor import node_files

        def work() -> Any:
            return node_files.digests(node_files.sizes(self._model, self._tokenizer))

        leads = self._rank in self._leaders
        answers = self._circle.collect("reading the model", work if leads else dict, LONG_S)
        if self._rank != 0:
            return
        for rank, node in self._leaders.items():
            if answers[rank].trouble:
                yield _unanswered(node, answers[rank])
        yield from nodes_compare.files(sizes, {node: answers[rank].value or {} for rank, node in self._leaders.items()})
        if self._model is not None:
            from rwkvmpi.doctor import number_checks

            if "error" in sizes.get(self._nodes[0], {}).get("model", {}):
                return  # told already
            check = partial(number_checks.model_and_tokenizer, self._model, self._tokenizer)
            yield from bounded(lambda: list(examine("model", check)), LONG_S)


def started_alone() -> Iterator[Finding]:
    """For one process that was asked about all ranks."""
    if launch_facts().launcher != "none":
        yield Finding("nodes", "ok", "one rank was started: this report is about its machine")
        return
    remedy = "srun --mpi=pmix --ntasks-per-node=1 rwkvmpi doctor --all-ranks, or mpirun -n NODES --map-by node ..."
    yield Finding("nodes", "warn", "only one process was started: this report is about this machine alone", remedy)


def wrong_world() -> Iterator[Finding]:
    """A finding where MPI does not start, or not with the world that the launcher promised; else nothing."""
    from rwkvmpi.errors import UserError

    try:
        mpi.world()
    except UserError as error:
        yield Finding("mpi", "fail", str(error))


def _bytes(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    return {node: row.get(name, {}).get("bytes") for node, row in sizes.items()}


def _unanswered(node: str, answer: Answer) -> Finding:
    return Finding("no answer", "fail", f"{node}: {answer.trouble}", LOOK_AT, nodes=(node,))
