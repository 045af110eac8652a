"""What tests of several folders share: small models, documents, and starting rwkvmpi for real."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import command, environment
from texts import text_of

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))


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


@pytest.fixture(scope="session")
def write_documents() -> Callable[..., Path]:
    """Write one .txt per length into a folder and return it."""

    def write(folder: Path, lengths: list[int], seed: int = 0) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number, length in enumerate(lengths):
            (folder / f"d{number:03d}.txt").write_bytes(text_of(length, 1000 * seed + number))
        return folder

    return write


@pytest.fixture(scope="session")
def emulated_kernels() -> Path:
    """The library of all CUDA kernels compiled for the host, where cuda/emulation plays CUDA: no GPU is needed."""
    import _emulated_kernels

    compiler = _emulated_kernels.compiler()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no compiler {compiler}")
    return _emulated_kernels.build()


@pytest.fixture
def kernels(emulated_kernels: Path) -> Iterator[ctypes.CDLL]:
    """The emulated kernels; during the test the operators use them on CPU tensors."""
    from rwkvmpi.ops.cuda import library

    with library.emulated(emulated_kernels):
        yield library.load()
