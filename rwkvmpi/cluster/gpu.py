"""The GPUs of this machine, asked for without loading torch where there are none."""

from __future__ import annotations

import ctypes
import logging

from rwkvmpi.cluster.logs import LOGGER

# Of a GPU's memory: the rest is for CUDA itself, for what lies between the layers, and for the states of a chunk.
SHARE_FOR_WEIGHTS = 0.8


def usable() -> bool:
    """Whether this process can compute on a GPU; where there is a driver and yet it cannot, the log says why."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    from rwkvmpi.ops.cuda import library

    if why := library.reason():
        logging.getLogger(LOGGER).warning("this run computes on the CPU: %s", why)
    return not why


def require() -> None:
    """UserError with the reason and the remedy where this process cannot compute on a GPU."""
    from rwkvmpi.ops.cuda import library

    if not library.emulating():
        library.require()


def memory_per_rank(local_size: int) -> float:
    """Bytes of a GPU's memory that each of `local_size` ranks of this machine may fill with weights."""
    import torch

    from rwkvmpi.ops.cuda import library

    if library.emulating():
        return float(1 << 30)
    ranks_per_gpu = -(-local_size // torch.cuda.device_count())
    return SHARE_FOR_WEIGHTS * torch.cuda.mem_get_info()[1] / max(1, ranks_per_gpu)
