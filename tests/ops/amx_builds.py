"""Builds for the tile unit of AMX, and calls of their products: what test_amx.py needs of them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops import library
from rwkvmpi.ops.product import KINDS, OPS, Packed

HERE = Path(__file__).parent
HOST = HERE.parents[1] / "cuda/host"


def compiled(folder: Path, name: str, *arguments: object) -> ctypes.CDLL:
    """The sources and flags `arguments` as a library in `folder`; skips the test where there is no compiler."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no compiler {compiler}")
    path = folder / f"{name}.so"
    flags = ["-O2", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-ffp-contract=off", f"-I{HOST}"]
    done = subprocess.run([compiler, *flags, *map(str, arguments), "-o", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


def processor_level() -> int:
    """The index in library.VARIANTS of the last build for this processor."""
    return library.open_variant("portable").rwkvmpi_processor_level()


def is_the_build(built: ctypes.CDLL) -> bool:
    """Whether this is the package's build for AMX; it may be missing."""
    return built._name == str(library.path_of("amx"))


def is_native(built: ctypes.CDLL) -> bool:
    """Whether this library's products run on a real tile unit."""
    return is_the_build(built) and processor_level() >= library.VARIANTS.index("amx")


class Trap:
    """Emulates the unit's instructions while it is installed; does nothing where the processor has them."""

    def __init__(self, handler: ctypes.CDLL | None) -> None:
        self.handler = handler
        if handler is not None:
            handler.amx_trap_products.restype = ctypes.c_int64

    @property
    def products(self) -> int:
        return self.handler.amx_trap_products() if self.handler is not None else 1

    def configured_units(self) -> int:
        return self.handler.amx_trap_configured_units() if self.handler is not None else 0


def product(
    built: ctypes.CDLL,
    x: Tensor,
    w: Packed,
    out: Tensor | None = None,
    op: str = "none",
    threads: int = 1,
) -> Tensor:
    """`ops.product` of another library."""
    out = torch.full((len(x), w.outputs), torch.nan) if out is None else out
    call(built, x.data_ptr(), x.stride(0), len(x), w, w.data.data_ptr(), out, op, threads)
    return out


def call(
    built: ctypes.CDLL, x: int, stride: int, rows: int, w: Packed, data: int, out: Tensor | int, op: str, threads: int
) -> None:
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    function = built["rwkvmpi_product"]
    function.argtypes, function.restype = [i, p, n, n, p, n, n, i, p, i, p, p, p, p, i], None
    address, narrow = (out, False) if isinstance(out, int) else (out.data_ptr(), out.dtype == torch.bfloat16)
    function(
        *(KINDS[w.kind], x, stride, rows, data, w.outputs, w.inputs, OPS[op], address, narrow),
        *(None, None, None, None, threads),
    )
