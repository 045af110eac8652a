"""Whole jobs with --device cuda, the kernels emulated: copies come late, as on a GPU, and the bits stay the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rwkvmpi.models.random_weights import random_weights, write_pth
from rwkvmpi.ops.cuda import library

pytestmark = pytest.mark.parallel
LENGTHS = [700, 40, 300]  # bytes: three chunks of 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "rwkv7.pth"
    return write_pth(path, random_weights("7", n_layer=3, n_embd=64, vocab_size=256, head_size=64, seed=1))


def test_grids_and_restarts_give_the_same_bits(
    model: Path,
    rwkvmpi: Callable[..., object],
    write_documents: Callable[..., Path],
    emulated_kernels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(library.EMULATION_VARIABLE, str(emulated_kernels))
    documents = write_documents(tmp_path / "documents", LENGTHS)
    digests = {}

    def run(name: str, ranks: int, *options: object, code: int = 0) -> None:
        command = ("score", model, documents, "-o", tmp_path / name, "--device", "cuda", "--chunk", 256)
        rwkvmpi(*command, *options, ranks=ranks, code=code)
        if code == 0:
            digests[name] = json.loads((tmp_path / name / "SUCCESS").read_text())["content_sha256"]

    run("one", 1)
    run("ring", 2, "--ring", 2)
    run("stages", 2, "--stages", 2)
    run("stopped", 2, "--ring", 2, "--commit-every", "1c", "--max-time", "1s", code=75)
    run("stopped", 2, "--stages", 2)
    assert len(set(digests.values())) == 1, digests
    job = (tmp_path / "one/job.toml").read_text()
    assert 'device = "cuda"' in job
    assert 'dtype = "bfloat16"' in job


@pytest.mark.parametrize("task", ["embed", pytest.param("read", marks=pytest.mark.thorough)])
def test_other_tasks(
    task: str,
    model: Path,
    rwkvmpi: Callable[..., object],
    write_documents: Callable[..., Path],
    emulated_kernels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(library.EMULATION_VARIABLE, str(emulated_kernels))
    documents = write_documents(tmp_path / "documents", LENGTHS)
    digests = set()
    for ranks, grid in ((1, "--ring"), (2, "--stages")):
        run = tmp_path / f"{ranks}{grid}"
        rwkvmpi(task, model, documents, "-o", run, "--device", "cuda", "--chunk", 256, grid, ranks, ranks=ranks)
        digests.add(json.loads((run / "SUCCESS").read_text())["content_sha256"])
    assert len(digests) == 1
