"""Tests that run inside the RoCE laboratory: `scripts/roce_tests.sh` starts it and them. Elsewhere they are skipped."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from reference import Reference

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what lies in this folder on a machine that is not the laboratory's."""
    if "ROCE_LAB" in os.environ:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="runs in the RoCE laboratory: scripts/roce_tests.sh"))


@pytest.fixture
def cable() -> Iterator[ModuleType]:
    """The faults of the cable; whole again after the test."""
    import _roce_faults

    yield _roce_faults
    _roce_faults.mend()


@pytest.fixture
def start_pair() -> Iterator[Callable]:
    """Start two ranks of hop_program.py under roce-mpirun; nothing of them is left after the test."""
    from _roce_mpi_pairs import MpiPair

    pairs = []

    def start(transport: str, **extra: object) -> MpiPair:
        # over MPI less than UCX needs to give up, some 8 s, which ends in an abort that says little
        deadline_s = 5.0 if transport == "mpi" else 8.0
        settings = {"seed": 5, "rounds": 15, "nbytes": 16384, "deadline_s": deadline_s} | extra
        # with the verbs transport only verbs shall be on the cable
        environment = {"ROCE_MPI": "roce" if transport == "mpi" else "local"} | settings.pop("environment", {})
        pairs.append(MpiPair(**settings, environment=environment, transport=transport))
        return pairs[-1]

    yield start
    for pair in pairs:
        pair.end()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A model, documents and the digest of their results by one rank: made outside, or here where nobody did."""
    folder = os.environ.get("RWKVMPI_ROCE_REFERENCE", "")
    return Reference(Path(folder)) if folder else Reference.make(tmp_path_factory.mktemp("reference"))
