"""The builds of the operators that this machine can run, and torch's thread count kept from one test to the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rwkvmpi.ops import library


@pytest.fixture(params=library.runnable())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per build."""
    with library.use(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Makes torch fill fresh memory with NaN, so that an output that is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
