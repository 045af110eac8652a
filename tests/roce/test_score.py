"""Real scores over the ports: the results of one rank, bit for bit, undisturbed and after a fault and a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reference import SETTINGS

pytestmark = pytest.mark.thorough
LIMIT_S = 400.0


def start(transport, reference, run, *grid):
    """`rwkvmpi score` on two ranks, one on each port. With verbs, MPI keeps to shared memory: the packets are ours.

    Over MPI the deadline is shorter than UCX needs to give up, some 8 s, which ends in an abort that says little.
    """
    job = ["score", reference.model, reference.documents, "-o", run, *SETTINGS, "--transport", transport, *grid]
    job += ["--deadline", 5 if transport == "mpi" else 15]
    return subprocess.Popen(
        ["roce-mpirun", sys.executable, "-m", "rwkvmpi", *map(str, job)],
        stdout=subprocess.DEVNULL, stderr=(Path(run).parent / "said").open("w+"), text=True,
        env={**os.environ, "ROCE_MPI": "roce" if transport == "mpi" else "local"},
    )  # fmt: skip


def end_of(process, run):
    """(exit code, what it said)."""
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        code = None
    return code, (run.parent / "said").read_text()


def success(run):
    return json.loads((run / "SUCCESS").read_text())


@pytest.mark.parametrize(
    ("transport", "grid"),
    [
        ("verbs", ("--ring", 2)),
        ("verbs", ("--stages", 2)),
        ("mpi", ("--ring", 2)),
        ("mpi", ("--stages", 2)),
    ],
)
def test_a_score_over_the_ports_is_that_of_one_rank(transport, grid, reference, cable, tmp_path):
    run, before = tmp_path / "run", cable.packets()
    code, said = end_of(start(transport, reference, run, *grid), run)
    assert code == 0, said
    assert success(run)["content_sha256"] == reference.digest
    nbytes = sum(rank["nbytes"] for rank in success(run)["figures"]["hops"])
    assert nbytes > 1_000_000
    assert cable.packets() - before > nbytes / 4096


@pytest.mark.parametrize(
    ("transport", "grid", "fault"),
    [
        ("verbs", ("--ring", 2), "hole"),
        ("verbs", ("--stages", 2), "down"),
        ("verbs", ("--ring", 2), "kill"),
        ("mpi", ("--ring", 2), "hole"),
    ],
)
def test_a_run_that_a_fault_ended_goes_on_to_the_same_bits(transport, grid, fault, reference, cable, tmp_path):
    import psutil

    run = tmp_path / "run"
    process = start(transport, reference, run, *grid)
    end = time.monotonic() + LIMIT_S
    while not list((run / "commits").glob("*.json")):
        assert process.poll() is None, (run.parent / "said").read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    if fault == "kill":
        ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "score" in child.cmdline()]
        ranks[-1].kill()
    else:
        {"hole": cable.hole, "down": cable.down}[fault]()
    struck = time.monotonic()
    code, said = end_of(process, run)
    assert time.monotonic() - struck < 60, said
    if fault == "kill":
        assert code not in (None, 0)
    else:
        assert code == 75, said
        assert "neighbour rank" in said
        assert "goes on from the last commit" in said
    assert not (run / "SUCCESS").exists()
    cable.mend()
    code, said = end_of(start(transport, reference, run, *grid), run)
    assert code == 0, said
    assert "going on from commit" in said
    assert success(run)["content_sha256"] == reference.digest
