"""Memory on huge pages: on small ones the processor would look up an address for every token that it reads."""

from __future__ import annotations

import contextlib
import mmap
import warnings

import torch

ALIGNMENT = 64  # bytes: a cache line, the widest register
HUGE_PAGE = 2 << 20  # bytes, on x86-64 and on most of AArch64
_MAP_NORESERVE = 0x4000  # Linux: more may be asked for than will be used


def anonymous(nbytes: int) -> torch.Tensor:
    """Fresh zeroed private memory of this process, uint8 [nbytes], aligned to and advised to lie on huge pages. Raises
    OSError when there is none."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    pages = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=flags)  # older kernels do not align by themselves
    advise(pages)
    whole = view(pages)
    return whole[-whole.data_ptr() % HUGE_PAGE :][:nbytes]


def advise(pages: mmap.mmap) -> None:
    """Ask for huge pages there, where the system has them."""
    with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages, or not Linux
        pages.madvise(mmap.MADV_HUGEPAGE)


def view(pages: mmap.mmap) -> torch.Tensor:
    """The mapped bytes as a tensor, uint8; the mapping lives as long as it does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.frombuffer(pages, dtype=torch.uint8)
