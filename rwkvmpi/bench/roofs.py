"""What this machine could do at most: multiply-adds in registers, bytes read from memory; and what machine it is."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import torch

from rwkvmpi.bench.timing import Effort, best
from rwkvmpi.cluster import affinity
from rwkvmpi.doctor.machine_checks import processor_name
from rwkvmpi.models.weight_store import anonymous
from rwkvmpi.ops import library
from rwkvmpi.ops.product import KINDS

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST_COLD, MOST_COLD = 128 << 20, 1 << 30  # bytes
ROOF_EFFORT = Effort(seconds=0.2, repeats=20)
LONG_ENOUGH_S = 2e-3  # beside which a call's own time is nothing

_peak = library.bind("peak", "ili", ctypes.c_int64)
_read_memory = library.bind("read_memory", "pli")


def machine(threads: int) -> dict[str, Any]:
    """Which processor, which build of the operators, how many threads where."""
    facts = library.info()
    return {
        "processor": processor_name(),
        "operators": facts["isa"],
        "compiler": facts["compiler"],
        "torch": torch.__version__,
        "cores": affinity.cores_available(),
        "threads": threads,
        "placement": affinity.describe(threads),
        "last_cache_bytes": last_cache_bytes(),
    }


def peak_flops(dtype: str, threads: int = 1, effort: Effort = ROOF_EFFORT) -> float:
    """Operations per second of the products' multiply-adds (two operations each) for weights of `dtype`, in registers
    alone, on `threads` threads together.

    "float32", "bfloat16" or "int8", in the build of the operators in use: where it has no instruction of its own for
    a dtype, what the products do instead. ValueError for another dtype.
    """
    if dtype not in KINDS:
        raise ValueError(f"peak_flops: dtype must be {', '.join(KINDS)}, but it is {dtype!r}")
    kind, rounds = KINDS[dtype], 1000
    _peak(kind, rounds, threads)  # opens the library and starts the threads, which is not to count
    start = time.perf_counter()
    _peak(kind, rounds, threads)
    while time.perf_counter() - start < LONG_ENOUGH_S:
        rounds *= 2
        start = time.perf_counter()
        _peak(kind, rounds, threads)
    operations = _peak(kind, rounds, threads)
    return operations / best(lambda: _peak(kind, rounds, threads), effort)


def memory_bandwidth(threads: int, effort: Effort = ROOF_EFFORT) -> float:
    """Bytes per second of reading what no cache holds, `threads` threads together."""
    data = anonymous(cold_bytes(threads)).fill_(1)  # fresh pages would all be one page of zeros
    return data.numel() / best(lambda: _read_memory(data, data.numel(), threads), effort)


def cold_bytes(threads: int = 1) -> int:
    """So many bytes, read in turn, find nothing of themselves in a cache."""
    return min(max(LEAST_COLD, 16 * last_cache_bytes()), MOST_COLD)


def last_cache_bytes() -> int:
    """Bytes of the largest cache of the first core; 0 where the system does not tell."""
    sizes = []
    for path in CACHES.glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii").strip()
            sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
        except (OSError, ValueError, IndexError):
            continue
    return max(sizes, default=0)
