"""Whole jobs whose bodies lie in a GPU's memory, the kernels emulated: straight through MPI, and staged in pieces.

The emulation fills what MPI must not read yet with NaN, and writes it as late as a GPU may.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import command, environment

from rwkvmpi.models.random_weights import random_weights, write_pth
from rwkvmpi.ops.cuda import library

pytestmark = pytest.mark.parallel
PIECES = Path(__file__).with_name("pieces_program.py")
WAYS = {"device": "MPI on device memory", "host": "MPI on host memory"}


def test_straight_and_staged_jobs_have_the_same_bits(
    write_documents: Callable[..., Path], emulated_kernels: Path, tmp_path: Path
) -> None:
    weights = random_weights("7", n_layer=3, n_embd=64, vocab_size=256, head_size=64, seed=1)
    model = write_pth(tmp_path / "rwkv7.pth", weights)
    documents = write_documents(tmp_path / "documents", [560, 40])
    digests = {}
    for way, grid in (("device", "--stages"), ("device", "--ring"), ("host", "--stages"), ("host", "--ring")):
        at = tmp_path / f"{way}{grid}"
        start = command(2, "score", model, documents, "-o", at, "--device", "cuda", "--chunk", 256, grid, 2)
        place = start.index("-m")
        start[place : place + 2] = [str(PIECES)]
        extra = {library.EMULATION_VARIABLE: str(emulated_kernels), "RWKVMPI_DEVICE_MPI": str(int(way == "device"))}
        done = subprocess.run(start, capture_output=True, text=True, timeout=300, check=False, env=environment(**extra))
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert f"transport: {WAYS[way]}" in (at / "logs/rank_00000.log").read_text()
        digests[way + grid] = json.loads((at / "SUCCESS").read_text())["content_sha256"]
    assert len(set(digests.values())) == 1, digests
