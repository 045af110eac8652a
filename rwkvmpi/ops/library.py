"""The compiled CPU operators: which builds there are, which one this processor runs, and how to call into it.

Importing torch first makes both use the one OpenMP runtime, torch's. RWKVMPI_ISA=avx512|avx2|portable forces a build.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from rwkvmpi.errors import UserError

VARIANTS = ("portable", "avx2", "avx512")  # by the level of processor that runs them
_FOLDER = Path(__file__).parent
_REBUILD = "rebuild with `python setup.py build_ext --inplace` or install the package again"
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


def path_of(variant: str) -> Path:
    """Where the shared library of a variant lies or would lie."""
    return _FOLDER / f"_cpu_{variant}.so"


@functools.cache
def open_variant(variant: str) -> ctypes.CDLL:
    """The library of one variant. Raises UserError when it is not built or cannot be loaded."""
    path = path_of(variant)
    if not path.exists():
        raise UserError(f"The compiled operators {path} are missing; {_REBUILD}.")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(f"The compiled operators {path} cannot be loaded ({error}); {_REBUILD}.") from error


def runnable() -> list[str]:
    """The built variants that this processor can run, slowest first."""
    level: int = open_variant("portable").rwkvmpi_processor_level()
    return [variant for variant in VARIANTS[: level + 1] if path_of(variant).exists()]


def _choose() -> str:
    forced = os.environ.get("RWKVMPI_ISA", "")
    if not forced:
        return runnable()[-1]
    if forced not in VARIANTS:
        raise UserError(f"RWKVMPI_ISA is {forced!r}; it can be {', '.join(reversed(VARIANTS))}, or be left out.")
    if forced not in runnable():
        raise UserError(
            f"RWKVMPI_ISA={forced} cannot run here; this processor and build offer {', '.join(runnable())}."
        )
    return forced


_current: str | None = None


def current() -> str:
    """The variant in use; chosen at the first call."""
    global _current
    if _current is None:
        _current = _choose()
    return _current


def load() -> ctypes.CDLL:
    """The library in use."""
    return open_variant(current())


@contextlib.contextmanager
def use(variant: str) -> Iterator[None]:
    """Within the context this process uses another variant (for tests and `doctor`). Not for several threads."""
    global _current
    if variant not in runnable():
        raise UserError(f"The operators' variant {variant} cannot run here; available: {', '.join(runnable())}.")
    before, _current = _current, variant
    try:
        yield
    finally:
        _current = before


def info() -> dict[str, object]:
    """isa, path, vector lanes and compiler of the library in use; threads; the built and the runnable variants."""
    library = load()
    library.rwkvmpi_compiler.restype = ctypes.c_char_p
    return {
        "isa": current(),
        "path": str(path_of(current())),
        "lanes": library.rwkvmpi_lanes(),
        "compiler": library.rwkvmpi_compiler().decode(),
        "threads": torch.get_num_threads(),
        "variants": [variant for variant in VARIANTS if path_of(variant).exists()],
        "runnable": runnable(),
    }


def bind(name: str, signature: str, result: type | None = None) -> Callable[..., int]:
    """The C function `rwkvmpi_<name>` of whatever library is in use.

    signature: one letter per argument; p pointer (a tensor, or None for null), l int64, i int, f float.
    """
    types = [_TYPES[letter] for letter in signature]

    @functools.cache
    def function(variant: str) -> Callable[..., int]:
        pointer = getattr(open_variant(variant), f"rwkvmpi_{name}")
        pointer.argtypes = types
        pointer.restype = result
        return pointer

    def call(*arguments: object) -> int:
        return function(current())(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments))

    return call
