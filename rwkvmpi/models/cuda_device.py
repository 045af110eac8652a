"""A GPU as a stage's device: streams, page-locked memory, CUDA graphs.

Computation runs on one stream; copies to the host run on another, so that they overlap with what comes after. Copies
from the host go the computation's way: they are small, and whatever follows needs them. Messages that pass through the
host have a stream for each direction (`transfer`), which waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import numpy as np
import torch

from rwkvmpi import ops
from rwkvmpi.errors import UserError
from rwkvmpi.models.device import OVER, Device, Ticket, as_tensor
from rwkvmpi.models.weight_store import Fill
from rwkvmpi.ops.cuda import library

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALLEST_SPAN = 16 << 20  # bytes that weights are allocated in, at least


def open_cuda(name: str, local_rank: int) -> Device:
    """GPU `name` ("cuda:1"), or for "cuda" the one that this process gets among those it sees. UserError if none."""
    if library.emulating():
        return EmulatedDevice()
    if why := library.reason():
        raise UserError(f"--device {name}: {why}")
    count = torch.cuda.device_count()
    _, _, number = name.partition(":")
    if number and not (number.isdecimal() and int(number) < count):
        raise UserError(f"--device {name}: this process sees {count} GPU{'s' * (count > 1)}, numbered from cuda:0")
    return CudaDevice(int(number) if number else local_rank % count)


class DeviceMemory:
    """Memory of a device for weights, in large allocations. See `weight_store.WeightStore`."""

    fills = True

    def __init__(self, target: torch.device) -> None:
        self._target = target
        self._span = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def place(self, nbytes: int, fill: Fill) -> torch.Tensor:
        """See WeightStore."""
        if self._used + nbytes > self._span.numel():
            self._span = torch.zeros(max(nbytes, SMALLEST_SPAN), dtype=torch.uint8, device=self._target)
            self._used = 0
        piece = self._span[self._used :][:nbytes]
        self._used += -(-nbytes // 256) * 256
        fill(piece)
        return piece


class _Event:
    """Done when a stream has come so far."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream)

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


class _OnDevice(Device):
    """What a GPU and its emulation have in common."""

    kind = "cuda"
    at_once = False

    def between(self, kind: str) -> torch.dtype:
        # Twice the bytes would cost more than the rounding: the next operator reads them once, into float32.
        return _DTYPES[kind]

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self.target)

    def bring(self, source: torch.Tensor) -> tuple[torch.Tensor, Ticket]:
        host = self.host_tensor(tuple(source.shape), source.dtype)
        return host, self.fetch((source, host))

    def keep(self, nbytes: int, here: bool) -> torch.Tensor | np.ndarray:
        if not here:
            return super().keep(nbytes, here)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.target)

    def workspace(self) -> ops.Workspace:
        return ops.Workspace(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=self.target))


class CudaDevice(_OnDevice):
    """GPU number `index` of those this process sees."""

    def __init__(self, index: int) -> None:
        self.target = torch.device("cuda", index)
        self.name = str(self.target)
        torch.cuda.set_device(index)
        self._compute = torch.cuda.Stream(self.target)
        self._out = torch.cuda.Stream(self.target)
        self._arriving, self._departing = torch.cuda.Stream(self.target), torch.cuda.Stream(self.target)
        self._pool: Any = None
        self.model = torch.cuda.get_device_name(index)

    def upload(self, source: torch.Tensor | np.ndarray) -> torch.Tensor:
        return as_tensor(source).to(self.target, non_blocking=True)

    def fetch(self, *pairs: tuple[torch.Tensor, torch.Tensor | np.ndarray]) -> Ticket:
        self._out.wait_stream(torch.cuda.current_stream(self.target))
        with torch.cuda.stream(self._out):
            for source, target in pairs:
                host = as_tensor(target)
                source.record_stream(self._out)
                host.copy_(source.to(host.dtype), non_blocking=True)
        return _Event(self._out)

    def copy(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> Ticket:
        for source, target in pairs:
            target.copy_(source, non_blocking=True)
        return self.ticket()

    def transfer(self, source: torch.Tensor | np.ndarray, target: torch.Tensor | np.ndarray) -> Ticket:
        there = as_tensor(target)
        stream = self._arriving if there.is_cuda else self._departing
        with torch.cuda.stream(stream):
            there.copy_(as_tensor(source), non_blocking=True)
        return _Event(stream)

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def pin(self, memory: np.ndarray) -> None:
        if int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0:
            return
        # It cannot be page-locked (a limit of the system's): copies then wait. CUDA keeps the error for whoever asks
        # next, which would be an innocent operator.
        with suppress(RuntimeError):
            torch.zeros(1, device=self.target).add_(1)

    def ticket(self) -> Ticket:
        return _Event(torch.cuda.current_stream(self.target))

    def follow(self, ticket: Ticket) -> None:
        if isinstance(ticket, _Event):
            torch.cuda.current_stream(self.target).wait_event(ticket.event)
        else:
            ticket.wait()

    def computing(self) -> AbstractContextManager[object]:
        return self._on_stream()

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        self._compute.wait_stream(torch.cuda.current_stream(self.target))
        with torch.cuda.stream(self._compute):
            yield
        torch.cuda.current_stream(self.target).wait_stream(self._compute)

    def explaining(self) -> AbstractContextManager[object]:
        return self._explaining()

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.target)
            raise UserError(
                f"{self.name} ({self.model}, {total / 2**30:.0f} GiB) has no memory left: this process holds "
                f"{torch.cuda.memory_allocated(self.target) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free "
                f"({str(error).partition('.')[0]}). Split the weights over more GPUs (--stages), read smaller chunks "
                "(--chunk), or start fewer ranks per GPU"
            ) from error

    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated(self.target))

    def graph(self, body: Callable[[], None]) -> Callable[[], None]:
        body()  # settles what is chosen at a first call: product algorithms, workspaces
        torch.cuda.current_stream(self.target).synchronize()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, pool=self._pool):  # on a stream of its own; it is replayed on the current one
            body()
        self._pool = recorded.pool()
        return recorded.replay


class _Late:
    """A copy that is made as late as it may be: when somebody waits for it, or asks for the second time."""

    def __init__(self, copy: Callable[[], object]) -> None:
        self._copy: Callable[[], object] | None = copy
        self._asked = False

    def done(self) -> bool:
        if self._asked:
            self.wait()
        self._asked = True
        return self._copy is None

    def wait(self) -> None:
        if self._copy is not None:
            self._copy()
            self._copy = None


class EmulatedDevice(_OnDevice):
    """The kernels' own sources on the host, for tests. Copies come late, as they may on a GPU."""

    name = "cuda:0"
    model = "emulated"

    def __init__(self) -> None:
        self._messages: set[int] = set()  # where the memory begins that MPI reads: it must wait for the tickets

    def upload(self, source: torch.Tensor | np.ndarray) -> torch.Tensor:
        return super().upload(source).clone()

    def ticket(self) -> Ticket:
        return OVER

    def fetch(self, *pairs: tuple[torch.Tensor, torch.Tensor | np.ndarray]) -> Ticket:
        hosts = [as_tensor(target) for _, target in pairs]
        for host in hosts:
            _poison(host)

        def copy() -> None:  # what stands there then, for whoever writes too early
            for (source, _), host in zip(pairs, hosts, strict=True):
                host.copy_(source)

        return _Late(copy)

    def copy(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> Ticket:
        if pairs[0][1].untyped_storage().data_ptr() not in self._messages:
            return super().copy(*pairs)
        values = [source.clone() for source, _ in pairs]  # what comes later on the stream may write the source
        for _, target in pairs:
            _poison(target)

        def copy() -> None:
            for value, (_, target) in zip(values, pairs, strict=True):
                target.copy_(value)

        return _Late(copy)

    def transfer(self, source: torch.Tensor | np.ndarray, target: torch.Tensor | np.ndarray) -> Ticket:
        return self.fetch((as_tensor(source), target))

    def message_memory(self, nbytes: int) -> torch.Tensor:
        memory = super().message_memory(nbytes)
        self._messages.add(memory.untyped_storage().data_ptr())
        return memory

    def follow(self, ticket: Ticket) -> None:
        ticket.wait()


def _poison(memory: torch.Tensor) -> None:
    """NaN, for whoever reads too early."""
    memory.view(-1).view(torch.uint8).fill_(0xFF)
