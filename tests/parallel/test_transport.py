"""Neighbours that send what they should not, or nothing at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import command, environment

from rwkvmpi.cluster import rdma
from rwkvmpi.store.digest import content_digest

pytestmark = pytest.mark.parallel


def test_no_message_passes_for_the_one_that_is_due():
    program = Path(__file__).with_name("messages_program.py")
    path = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*command(2)[:3], sys.executable, str(program)],
        capture_output=True, text=True, env=environment(PYTHONPATH=path), check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes.pop("as it should be") == outcomes.pop("without checksums") == "taken"
    expected = {
        "doubled": "came twice",
        "one lost": "number 1 was lost",
        "for another chunk": "the one for chunk 8 was due",
        "of another job": "another job",
        "damaged": "checksum does not fit",
    }
    assert outcomes.keys() == expected.keys()
    for name, words in expected.items():
        assert words in outcomes[name], outcomes[name]
        for part in ("rank 1 on", "its neighbour rank 0 on", "the state of layer 3", "doctor --fabric", "last commit"):
            assert part in outcomes[name], (part, outcomes[name])


def test_ranks_on_several_nodes_choose_and_mix_transports():
    program = Path(__file__).with_name("several_nodes_program.py")
    path = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*command(3)[:3], sys.executable, str(program)],
        capture_output=True, text=True, env=environment(PYTHONPATH=path), check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (auto, mpi, ucx), neighbours = json.loads(done.stdout)
    if rdma.ports():
        assert "RDMA verbs" in auto
    else:
        assert auto.startswith("MPI on host memory (no RDMA verbs: ")
        assert auto.endswith(" on one)")
    assert mpi == "MPI on host memory (--transport mpi)"
    assert "OMPI_MCA_pml=ucx" in ucx
    assert neighbours == [[1, 1], [1, 1], [0, 2]]  # of each rank: on its node, on the other


def test_a_neighbour_that_falls_silent_ends_the_job_in_time_and_nothing_is_lost(
    rwkvmpi, small_model, write_documents, tmp_path
):
    model, documents = small_model("7"), write_documents(tmp_path / "docs", [400_000])
    arguments = ["score", model, documents, "--chunk", 256, "--commit-every", "20c", "--deadline", 3]
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(2, *arguments, "--ring", 2, "-o", run),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    while not list((run / "commits").glob("*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    ranks = [child for child in psutil.Process(process.pid).children() if child.environ().get("OMPI_COMM_WORLD_RANK")]
    [second] = [child for child in ranks if child.environ()["OMPI_COMM_WORLD_RANK"] == "1"]
    second.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert time.monotonic() - begun < 30
    assert "rank 0 on" in said
    assert "its neighbour rank 1 on" in said
    assert "gave no sign of life for" in said
    rwkvmpi(*arguments, "-o", run)
    rwkvmpi(*arguments, "-o", tmp_path / "undisturbed")
    assert content_digest(run / "results.h5") == content_digest(tmp_path / "undisturbed" / "results.h5")
