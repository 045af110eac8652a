"""What the tests of emulated kernels need beside `kernels`."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator

import _emulated_kernels
import pytest
import torch
from scheduling_orders import ORDERS


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips what needs a C++ compiler where there is none."""
    if shutil.which(_emulated_kernels.compiler()[0]) is None:
        pytest.skip(f"no compiler {_emulated_kernels.compiler()[0]}")


@pytest.fixture
def orders(kernels: ctypes.CDLL) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Runs a check once for each order of threads and blocks: what is right must be right in all of them."""

    def run(check: Callable[[], None]) -> None:
        for order in ORDERS:
            kernels.rwkvmpi_cuda_emulation_order(ctypes.c_uint(order))
            check()

    yield run
    kernels.rwkvmpi_cuda_emulation_order(ctypes.c_uint(0))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
