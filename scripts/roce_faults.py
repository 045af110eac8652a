"""Random faults on the cable between two ranks, many times: each must end in the right result or in an error in time.

    python scripts/roce_faults.py --runs 200 --seed 1 --json scripts/figures/roce-faults.json

Starts the RoCE laboratory (scripts/roce_lab.sh) and in it one pair of ranks after the other, which send each other
parcels of random sizes and look at every byte (tests/roce/hop_program.py). At a random moment something happens to the
cable, a port or a rank. A run is

    right   every byte arrived on both sides
    error   at least one rank ended with a sentence that names rank, neighbour, port and remedy, and no rank was left
            waiting; a rank that was killed or stopped itself need not say anything
    other   the same of the MPI transport where MPI or mpirun was quicker: it ended all ranks in its own words
    WRONG   a wrong byte was handed over              HANG   a rank was still waiting after the limit
    POOR    it ended with something else than such a sentence

The verbs transport's ranks are forked and joined by a socket (scripts/_roce_pairs.py), so nobody ends a rank but the
rank itself; those of the MPI transport (one run in --mpi-every) are started with mpirun on UCX's rc_verbs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# What the transports are given. Over MPI less than UCX needs to give up, which takes some 8 s and ends in an abort.
DEADLINES_S = {"verbs": 8.0, "mpi": 5.0}
LIMIT_S = 120.0  # of a whole run
BYTES = 16384
OUTCOMES = ("right", "error", "other", "WRONG", "HANG", "POOR")
GOOD = ("right", "error", "other")
KEPT = ("kind", "transport", "seed", "after_s", "outcome", "seconds", "packets")  # of each run, in the figures
SENTENCES = [
    re.compile(r"rank \d.*rank \d.*rxe\d:1.*; .*(look|set|see|use)", re.DOTALL),
    re.compile(r"rank \d.* RDMA port rxe\d:1 is DOWN; .*(name|use)"),  # its own, before there is a neighbour
    re.compile(r"rank \d.* did not come to the wire-up .*; look"),  # nobody knows a port of the other side yet
]


class Kind(NamedTuple):
    """One kind of fault: how often it is drawn, and how many rounds the ranks play (lossy cables are slow)."""

    weight: int
    rounds: int


KINDS = {
    "loss 1%": Kind(10, 60),
    "loss 10%": Kind(10, 15),
    "delay 20 ms": Kind(10, 15),
    "black hole": Kind(12, 150),
    "black hole, one way": Kind(10, 150),
    "link down 1 s": Kind(8, 150),
    "link down 5 s": Kind(6, 150),
    "link down 30 s": Kind(2, 150),
    "peer killed": Kind(10, 150),
    "peer stopped for 2 s": Kind(5, 150),
    "peer stopped for good": Kind(5, 150),
    "GID index that is not there": Kind(2, 20),
    "GID index of a link-local address": Kind(2, 20),
    "MTU of one port 1024 from the start": Kind(3, 20),
    "switches pass 1500 bytes only": Kind(6, 150),
}
FROM_THE_START = ("GID", "MTU of one port")


def main() -> int:
    """In the laboratory: the runs. Outside: start it as often as asked for, and put the figures together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mpi-every", type=int, default=10, help="one run in so many is of the MPI transport; 0: none")
    parser.add_argument("--labs", type=int, default=1, help="laboratories side by side")
    parser.add_argument("--engine", choices=["uml", "qemu"], default="uml")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if "ROCE_LAB" in os.environ:
        runs: list[dict[str, Any]] = []
        for number in itertools.count():
            facts = report(run(options, number), number)
            runs += [facts] if facts["struck"] else []
            if len(runs) == options.runs:
                break
        if options.json:
            options.json.write_text(json.dumps(runs))
        return 0
    return outside(options)


# --- one run


def run(options: argparse.Namespace, number: int) -> dict[str, Any]:
    """Play one random fault; what was done and what became of it."""
    import _roce_faults as cable

    draw = random.Random(f"{options.seed} {number}")
    kind = draw.choices(list(KINDS), [kind.weight for kind in KINDS.values()])[0]
    transport = "mpi" if options.mpi_every and number % options.mpi_every == 0 else "verbs"
    rank, end = draw.randrange(2), draw.choice(cable.ENDS)
    facts: dict[str, Any] = {"kind": kind, "transport": transport, "seed": draw.randrange(1 << 30)}
    # while ranks wire up, too; but what MPI's own start makes of it is MPI's affair
    early = draw.random() < 0.15 and transport == "verbs"
    moment = draw.uniform(0.0, 1.0 if early else 1.5 if KINDS[kind].rounds > 20 else 0.4)
    environment = before_the_start(kind, rank, end)
    packets = cable.packets()
    begun = time.monotonic()
    pair = start(transport, facts["seed"], KINDS[kind].rounds, environment)
    while not (early or pair.ready() or not pair.alive() or time.monotonic() > begun + LIMIT_S):
        time.sleep(0.01)
    at = time.monotonic() + moment
    heal_at = float("inf")
    facts["struck"] = kind.startswith(FROM_THE_START)  # it may come too late
    while (alive := pair.alive()) and time.monotonic() < begun + LIMIT_S:
        if time.monotonic() >= at:
            facts |= {"struck": True, "after_s": round(time.monotonic() - begun, 2)}
            heal_at = time.monotonic() + strike(kind, pair, rank, end)
            at = float("inf")
        if time.monotonic() >= heal_at:
            heal(kind, pair, rank, end)
            heal_at = float("inf")
        if kind == "peer stopped for good" and at == float("inf") and alive == [rank]:
            pair.signal(rank, signal.SIGKILL)  # its neighbour has ended, which is what was to be seen
        time.sleep(0.02)
    facts["seconds"] = round(time.monotonic() - begun, 2)
    facts["hanging"] = pair.alive()
    pair.end()
    facts["ranks"] = pair.ended()
    cable.mend()
    facts["packets"] = cable.packets() - packets
    facts["outcome"] = outcome(facts, {rank} if kind.startswith("peer") else set())
    return facts


def start(transport: str, seed: int, rounds: int, environment: dict[str, str]) -> Any:
    """The pair of ranks."""
    if transport == "mpi":
        from _roce_mpi_pairs import MpiPair

        return MpiPair(seed, rounds, BYTES, DEADLINES_S[transport], environment)
    from _roce_pairs import Pair

    return Pair(seed, rounds, BYTES, DEADLINES_S[transport], environment)


def before_the_start(kind: str, rank: int, end: str) -> dict[str, str]:
    """Do what has to be there when the ranks start; their environment for it."""
    import _roce_faults as cable

    if kind == "MTU of one port 1024 from the start":
        cable.mtu(1500, end)
    index = {"GID index that is not there": "200", "GID index of a link-local address": "0"}.get(kind)
    return {"RWKVMPI_RDMA_GID_INDEX": index, "UCX_IB_GID_INDEX": index} if index else {}


def strike(kind: str, pair: Any, rank: int, end: str) -> float:
    """Bring the fault about; after how many seconds it is to be healed again (infinity: not while the ranks run)."""
    import _roce_faults as cable

    if kind.startswith("loss"):
        cable.loss(float(kind.split()[1].rstrip("%")))
    elif kind.startswith("delay"):
        cable.delay(20)
    elif kind == "black hole":
        cable.hole()
    elif kind == "black hole, one way":
        cable.hole(end)
    elif kind.startswith("link down"):
        cable.down(end)
        return float(kind.split()[2])
    elif kind == "peer killed":
        pair.signal(rank, signal.SIGKILL)
    elif kind.startswith("peer stopped"):
        pair.signal(rank, signal.SIGSTOP)
        return 2.0 if "2 s" in kind else float("inf")
    elif kind.startswith("switches pass"):
        cable.narrow(1500)
    return float("inf")


def heal(kind: str, pair: Any, rank: int, end: str) -> None:
    """Take the fault away while the ranks run."""
    import _roce_faults as cable

    if kind.startswith("link down"):
        cable.up(end)
    else:
        pair.signal(rank, signal.SIGCONT)


def outcome(facts: dict[str, Any], excused: set[int]) -> str:
    """One of OUTCOMES; `excused`: ranks to which something was done, that need not say anything."""
    told = facts["ranks"]
    if any("WRONG BYTES" in rank["error"] for rank in told):
        return "WRONG"
    if facts["hanging"]:
        return "HANG"
    if all(rank["outcome"] == "ok" for rank in told):
        return "right"
    errors = [rank for rank in told if rank["outcome"] in ("FabricError", "UserError")]
    if facts["transport"] == "mpi" and not errors and all(rank["outcome"] in ("ok", "killed") for rank in told):
        return "other"
    at_start = facts["kind"].startswith(FROM_THE_START)
    good = [rank for rank in errors if at_start or any(p.search(rank["error"]) for p in SENTENCES)]
    silent = [
        number
        for number, rank in enumerate(told)
        # mpirun ends the other rank as soon as one has ended with an error
        if rank["outcome"] == "killed" and number not in excused and facts["transport"] == "verbs"
    ]
    crashed = [rank for rank in told if rank["outcome"] not in ("ok", "killed", "FabricError", "UserError")]
    return "error" if good and len(good) == len(errors) and not silent and not crashed else "POOR"


def report(facts: dict[str, Any], number: int) -> dict[str, Any]:
    """Say how one run went; returns it."""
    said = next((rank["error"] for rank in facts["ranks"] if rank["outcome"] != "ok" and rank["error"]), "")
    short = said if facts["outcome"] not in GOOD else said[:100]
    print(
        f"{number:4} {facts['transport']:6} {facts['kind']:36} {facts['outcome']:6} {facts['seconds']:6.1f} s "
        f"{[rank['rounds'] for rank in facts['ranks']]} {short}",
        flush=True,
    )
    return facts


# --- outside the laboratory


def outside(options: argparse.Namespace) -> int:
    """Start the laboratories, put together what they found, print the table."""
    with tempfile.TemporaryDirectory(prefix="roce-faults-") as name:
        folders = [Path(name) / str(number) for number in range(options.labs)]
        share = -(-options.runs // options.labs)
        limit, every = str(int(share * LIMIT_S)), str(options.mpi_every)
        labs = [
            subprocess.Popen(
                [str(ROOT / "scripts/roce_lab.sh"), "-e", options.engine, "-t", limit, "-o", str(folder), "--",
                 sys.executable, "-u", __file__, "--seed", str(options.seed + number), "--mpi-every", every,
                 "--runs", str(min(share, options.runs - number * share)), "--json", "/run/lab/out/runs.json"],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            for number, folder in enumerate(folders)
        ]  # fmt: skip
        codes = [lab.wait() for lab in labs]
        if any(codes):
            return max(codes)
        runs = [facts for folder in folders for facts in json.loads((folder / "runs.json").read_text())]
    kinds = table(runs)
    if options.json:
        figures = {
            "command": shlex.join(["python", "scripts/roce_faults.py", *sys.argv[1:]]),
            "engine": options.engine,
            "deadline_s": DEADLINES_S,
            "outcomes": {word: sum(facts["outcome"] == word for facts in runs) for word in OUTCOMES},
            "kinds": kinds,
            "runs": [{key: facts.get(key) for key in KEPT} for facts in runs],
        }  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if any(facts["outcome"] not in GOOD for facts in runs) else 0


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print outcomes by transport and kind; returns the rows."""
    rows: list[dict[str, Any]] = []
    for transport in ("verbs", "mpi"):
        for kind in KINDS:
            found = [facts for facts in runs if (facts["transport"], facts["kind"]) == (transport, kind)]
            if found:
                counts = {word: sum(facts["outcome"] == word for facts in found) for word in OUTCOMES}
                slowest = max(facts["seconds"] for facts in found)
                rows.append({"transport": transport, "kind": kind, "runs": len(found), **counts, "slowest_s": slowest})
    print(f"\n{'transport':9} {'fault':36} {'runs':>5}" + "".join(f"{word:>7}" for word in OUTCOMES) + "  slowest")
    for row in rows:
        counted = "".join(f"{row[word]:7}" for word in OUTCOMES)
        print(f"{row['transport']:9} {row['kind']:36} {row['runs']:5}{counted} {row['slowest_s']:7.1f} s")
    return rows


if __name__ == "__main__":
    sys.exit(main())
