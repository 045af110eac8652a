"""The compiled CPU operators: which builds there are, which one this processor runs, and how to call into it.

Importing torch first makes both use the one OpenMP runtime, torch's. RWKVMPI_ISA=amx|avx512bf16|avx512|avx2|portable
forces a build.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch

from rwkvmpi.errors import UserError

VARIANTS = ("portable", "avx2", "avx512", "avx512bf16", "amx")  # by the level of processor that runs them
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
    """The built variants that this processor can run, slowest first; amx only if its products are right here."""
    level: int = open_variant("portable").rwkvmpi_processor_level()
    found = [variant for variant in VARIANTS[: level + 1] if path_of(variant).exists()]
    return found if found[-1] != "amx" or _amx_is_right(found[-2]) else found[:-1]


@functools.cache
def _amx_is_right(reference: str) -> bool:
    from rwkvmpi.ops import amx_check  # which needs this module

    wrong = amx_check.disagreement("amx", reference)
    if wrong is not None:
        text = "the operators' build amx is wrong on this processor: %s; %s is used instead"
        logging.getLogger(__name__).warning(text, wrong, reference)
    return wrong is None


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
    if variant not in runnable():
        raise UserError(f"The operators' variant {variant} cannot run here; available: {', '.join(runnable())}.")
    with switched(variant):
        yield


@contextlib.contextmanager
def switched(variant: str) -> Iterator[None]:
    """`use` for those who know that the variant can run here."""
    global _current
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
    """The C function `rwkvmpi_<name>` of whatever library is in use; noted by the `recording` in progress, if any.

    signature: one letter per argument; p pointer (a tensor, or None for null), l int64, i int, f float.
    """
    types = [_TYPES[letter] for letter in signature]

    build, pointer = "", cast(Callable[..., int], None)

    def call(*arguments: object) -> int:
        nonlocal build, pointer
        if _recording is not None:
            _recording.append(Call(name, signature, arguments))
        if build != current():
            build = current()
            pointer = getattr(open_variant(build), f"rwkvmpi_{name}")
            pointer.argtypes, pointer.restype = types, result  # type: ignore[attr-defined]
        return pointer(*[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments])

    return call


class Call(NamedTuple):
    """One call of a bound function: `rwkvmpi_<name>` with these arguments."""

    name: str
    signature: str
    arguments: tuple[object, ...]


_recording: list[Call] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """Notes every call of a bound function made within the context, which is carried out as well."""
    global _recording
    if _recording is not None:
        raise RuntimeError("a recording is in progress already")
    calls: list[Call] = []
    _recording = calls
    try:
        yield calls
    finally:
        _recording = None
