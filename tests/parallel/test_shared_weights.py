"""One copy of the weights for the ranks of a node: what it saves, and that no bit and no failure depends on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment, mpirun

from rwkvmpi.store.digest import content_digest

pytestmark = pytest.mark.parallel
PROGRAM = Path(__file__).with_name("sharing_program.py")
ROOT = Path(__file__).resolve().parents[2]
ALL = 3 * (16 << 20)  # bytes that the program places on each rank


@pytest.fixture(scope="module")
def program() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(mpirun()), "-n", "2", sys.executable, str(PROGRAM)],
        env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_ranks_that_share_hold_one_copy(program):
    """blind: a rank that cannot map the memory; own: one that must not; apart: ranks of different stages."""
    found = {line["how"]: line["ranks"] for line in map(json.loads, program.stdout.splitlines())}
    expected = {"shared": ([3, 0], 1), "own": ([3, 3], 2), "blind": ([3, 3], 2), "apart": ([3, 3], 2)}
    assert set(found) == set(expected), program.stderr
    for how, (fills, copies) in expected.items():
        assert [rank["fills"] for rank in found[how]] == fills
        assert all(rank["right"] for rank in found[how])
        used = sum(rank["bytes"] for rank in found[how])
        assert (copies - 0.1) * ALL < used < (copies + 0.2) * ALL, (how, used)


def test_nobody_waits_for_a_rank_that_fails(program):
    assert program.returncode == 2, program.stderr
    assert "rwkvmpi: this model is not sound" in program.stderr
    assert "Traceback" not in program.stderr


def test_results_are_the_same_bits_without_sharing(rwkvmpi, small_model, write_documents, tmp_path, monkeypatch):
    documents = write_documents(tmp_path / "docs", [3000, 700])
    digests = []
    for share in ("1", "0"):
        monkeypatch.setenv("RWKVMPI_SHARE_WEIGHTS", share)
        run = tmp_path / f"run{share}"
        rwkvmpi("score", small_model("7"), documents, "-o", run, "--chunk", 256, "--ring", 2, ranks=2)
        digests.append(content_digest(run / "results.h5"))
        shared = "weights are shared with 1 of 1 ranks" in (run / "logs" / "rank_00000.log").read_text()
        assert shared == (share == "1")
    assert digests[0] == digests[1]
