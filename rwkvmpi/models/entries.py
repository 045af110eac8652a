"""Where one tensor's bytes lie in a file, and the only way they are read.

Both file formats are reduced to a list of `TensorEntry` by parsing their headers; nothing in a model file is
ever executed. The bytes of a tensor are touched only when that tensor is asked for. No torch at import: a
file can be described without it.
"""

from __future__ import annotations

import math
import mmap
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rwkvmpi.errors import UserError

if TYPE_CHECKING:
    import torch

ITEMSIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "float8_e4m3": 1, "float8_e5m2": 1,
}  # fmt: skip
FLOATING = ("float32", "bfloat16", "float16")  # the dtypes that a model's tensors may have

_COPY_BELOW = 1 << 20  # smaller tensors are read into memory: they come out aligned to 64 bytes
_MAP_NORESERVE = 0x4000  # Linux: a private mapping that is only read must not count as memory promised


@dataclass(frozen=True)
class TensorEntry:
    """One dense tensor (C order, little endian) at `offset` bytes from the start of `file`."""

    name: str
    file: Path
    dtype: str  # a key of ITEMSIZE
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


def show(shape: tuple[int, ...]) -> str:
    """A shape as messages show it: [768, 64]."""
    return "[" + ", ".join(map(str, shape)) + "]"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it becomes `path` when all went well and vanishes when not. Raises UserError when
    the file cannot be written."""
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


class ModelFile:
    """One file of weights, opened at the first read. Tensors of at least 1 MiB share one mapping of the file, which
    lives as long as the last of them; only the pages that are looked at are loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._pages: mmap.mmap | None = None

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """The tensor of `entry`. Writing into it never reaches the file. Raises UserError when the file cannot be read
        or has shrunk since its header was checked."""
        import torch

        dtype: torch.dtype = getattr(torch, entry.dtype)
        try:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            # Reading past the end of a mapped file kills the process, so the size is looked at again.
            if os.fstat(self._fd).st_size < entry.offset + entry.nbytes:
                raise UserError(f"{self.path}: the file became shorter while it was in use; copy it again.")
            if entry.nbytes < _COPY_BELOW or entry.offset % ITEMSIZE[entry.dtype]:
                return self._copy(entry, dtype)
            if self._pages is None:
                self._pages = _map(self._fd)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error}).") from error
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")
            flat = torch.frombuffer(self._pages, dtype=dtype, count=entry.numel, offset=entry.offset)
        return flat.reshape(entry.shape)

    def _copy(self, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
        import torch

        tensor = torch.empty(entry.numel, dtype=dtype)
        if entry.numel:
            view = tensor.view(torch.uint8).numpy().data
            done = 0
            while done < entry.nbytes:
                count = os.preadv(self._fd, [view[done : done + (64 << 20)]], entry.offset + done)
                if count == 0:
                    raise UserError(f"{self.path}: the file became shorter while it was in use; copy it again.")
                done += count
        return tensor.reshape(entry.shape)

    def let_go(self, entry: TensorEntry) -> None:
        """Takes the mapped pages of `entry` out of this process's memory. They stay in the system's cache, and whoever
        looks at the tensor again gets them back; what was written into it is lost."""
        if self._pages is None or not entry.nbytes:
            return
        start = entry.offset - entry.offset % mmap.PAGESIZE
        with suppress(OSError, AttributeError):  # it only saves memory
            self._pages.madvise(mmap.MADV_DONTNEED, start, entry.offset + entry.nbytes - start)

    def close(self) -> None:
        """Closes the file; tensors that were read stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._pages = -1, None


def _map(fd: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError:
        # A machine that forbids overcommitment counts even this against its memory: take the mapping that it does
        # not count, whose tensors must not be written to.
        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
