"""Where packed weights lie in memory: a process's own, or one copy that the processes of a machine share.

A stage asks its store for memory piece by piece and gives each piece a function that fills it. Processes that hold
the same weights ask for the same sizes in the same order, so the n-th piece of one is the n-th piece of all: one of
them fills a memory file without a name (memfd), the others map it read-only and never call the functions. How they
find each other is none of this module's business; it knows nothing of MPI.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from rwkvmpi.ops.huge_pages import ALIGNMENT, HUGE_PAGE, advise, anonymous, view

EXTENT = 64 << 20  # bytes mapped at a time; what is not written to takes no memory

Fill = Callable[[torch.Tensor], None]


class WeightStore(Protocol):
    """Memory for weights. `fills`: whether `place` calls its functions in this process (where it does not, another
    process has filled, and checked, the same weights)."""

    fills: bool

    def place(self, nbytes: int, fill: Fill) -> torch.Tensor:
        """`nbytes` of memory, uint8 [nbytes], aligned to 64 bytes, for as long as the tensor lives. `fill` is called
        with it, once, and finds zeros in it; nobody writes to it afterwards."""
        ...


@dataclass
class Extents:
    """Where pieces go: one after the other in extents, which follow one another. Depends on the sizes alone."""

    next: int = 0  # the first free byte
    end: int = 0  # of the last extent

    def add(self, nbytes: int) -> tuple[int, int]:
        """(position of a new piece, bytes of the new extent that begins there or 0)."""
        start = -(-self.next // ALIGNMENT) * ALIGNMENT
        added = 0
        if start + nbytes > self.end:
            start = self.end
            added = max(EXTENT, -(-nbytes // HUGE_PAGE) * HUGE_PAGE)
            self.end += added
        self.next = start + nbytes
        return start, added


class OwnMemory:
    """Memory of this process alone, on huge pages where the kernel allows them (transparent_hugepage: always, madvise).

    Nothing is zeroed but by the kernel, and only what is written to counts as used.
    """

    fills = True

    def __init__(self) -> None:
        self._extents = Extents()
        self._begin = 0
        self._extent = torch.empty(0, dtype=torch.uint8)

    def place(self, nbytes: int, fill: Fill) -> torch.Tensor:
        """See WeightStore. Raises OSError when there is no memory to be had."""
        start, added = self._extents.add(nbytes)
        if added:
            self._begin, self._extent = start, anonymous(added)
        piece = self._extent[start - self._begin :][:nbytes]
        fill(piece)
        return piece


class SharedMemory:
    """Memory that other processes may map: the side that fills. `publish` says where it is when all is placed."""

    fills = True

    def __init__(self) -> None:
        """Raises OSError where the kernel has no memory files (or a sandbox forbids them)."""
        self._fd = os.memfd_create("rwkvmpi-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._extents = Extents()
        self._begin = 0
        self._extent = torch.empty(0, dtype=torch.uint8)
        self._sizes: list[int] = []

    def place(self, nbytes: int, fill: Fill) -> torch.Tensor:
        """See WeightStore. Raises OSError when the file cannot grow."""
        start, added = self._extents.add(nbytes)
        if added:
            os.ftruncate(self._fd, self._extents.end)
            self._begin, self._extent = start, view(_map_shared(self._fd, added, start, write=True))
        piece = self._extent[start - self._begin :][:nbytes]
        fill(piece)
        self._sizes.append(nbytes)
        return piece

    def publish(self) -> Published:
        """Where the memory is, for other processes of this machine; no more `place` afterwards. The file is theirs to
        open until `close`, and its size is fixed from now on: a mapping of a file that shrinks would kill them."""
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return Published(os.getpid(), self._fd, _identity(self._fd), tuple(self._sizes))

    def close(self) -> None:
        """Close the file; the memory stays as long as a process has it mapped, and ends with the last of them."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.close()


@dataclass(frozen=True)
class Published:
    """What a process must know to map another's SharedMemory; plain numbers, to be sent."""

    pid: int
    fd: int
    identity: tuple[int, int, int]  # device, inode and size of the file
    sizes: tuple[int, ...]  # bytes of the pieces in order


class MappedMemory:
    """Memory that another process has filled, mapped read-only: writing to a piece ends this process."""

    fills = False

    def __init__(self, published: Published) -> None:
        """Raises OSError when the file cannot be opened from here: another user's process, or a process with another
        view of the process ids (a container of its own), where the same number is somebody else."""
        fd = os.open(f"/proc/{published.pid}/fd/{published.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if _identity(fd) != published.identity:
                raise OSError(f"process {published.pid} is another one here")
            size = published.identity[2]
            self._bytes = view(_map_shared(fd, size, 0, write=False)) if size else torch.empty(0, dtype=torch.uint8)
        finally:
            os.close(fd)
        self._extents = Extents()
        self._sizes = list(reversed(published.sizes))

    def place(self, nbytes: int, fill: Fill) -> torch.Tensor:
        """See WeightStore; `fill` is not called. Raises RuntimeError when the pieces asked for are not those that were
        filled: then the two processes do not hold the same weights."""
        expected = self._sizes.pop() if self._sizes else None
        if nbytes != expected:
            raise RuntimeError(f"shared weights: a piece of {nbytes} bytes is wanted where {expected} were placed")
        start, _ = self._extents.add(nbytes)
        return self._bytes[start : start + nbytes]


def _map_shared(fd: int, nbytes: int, offset: int, write: bool) -> mmap.mmap:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
    pages = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=protection, offset=offset)
    advise(pages)
    return pages


def _identity(fd: int) -> tuple[int, int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size
