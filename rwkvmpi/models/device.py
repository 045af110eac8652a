"""Where a stage computes: how arrays come there and go back, and how much of that happens beside the computation.

On a CPU nothing moves and everything is done when a call returns. On a GPU calls return before the work is done: an
array is there or back when its `Ticket` says so, and whoever lent its memory keeps it until then.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch

from rwkvmpi.errors import UserError
from rwkvmpi.models.cost import refusal
from rwkvmpi.models.weight_store import OwnMemory, WeightStore
from rwkvmpi.ops import Workspace


class Ticket(Protocol):
    """Something that was begun."""

    def done(self) -> bool:
        """Whether it is over; never waits."""
        ...

    def wait(self) -> None:
        """Returns when it is over."""
        ...


class _Over:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


OVER = _Over()


class Device:
    """The CPU, and the face of every other device.

    name: "cpu", or "cuda:0"; kind: "cpu" or "cuda", what a job calls it; model: as its maker calls it; target: torch's
    name for it; at_once: every call has done its work when it returns, so that no Ticket ever waits.
    """

    kind = "cpu"
    name = "cpu"
    model = "CPU"
    at_once = True
    target = torch.device("cpu")

    def check_kind(self, dtype: str) -> str:
        """`dtype` if matrices can be held so here; UserError for any other."""
        if why := refusal(self.kind, dtype):
            raise UserError(why)
        return dtype

    def between(self, kind: str) -> torch.dtype:
        """The dtype of results that no product reads, of a model whose matrices are held as `kind`."""
        return torch.float32

    def memory(self) -> WeightStore:
        """New memory for weights."""
        return OwnMemory()

    def workspace(self) -> Workspace:
        """New scratch memory."""
        return Workspace()

    def upload(self, source: torch.Tensor | np.ndarray) -> torch.Tensor:
        """The array as a tensor of this device, which may share its memory; see `ticket` for when it may change."""
        return as_tensor(source)

    def fetch(self, *pairs: tuple[torch.Tensor, torch.Tensor | np.ndarray]) -> Ticket:
        """Begins to copy tensors of this device to the host's memory: (source, target), converted to target's dtype."""
        for source, target in pairs:
            as_tensor(target).copy_(source)
        return OVER

    def copy(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> Ticket:
        """Copies between tensors of this device, (source, target), in order with whatever else is asked of it."""
        for source, target in pairs:
            target.copy_(source)
        return OVER

    def transfer(self, source: torch.Tensor | np.ndarray, target: torch.Tensor | np.ndarray) -> Ticket:
        """Begins to copy bytes from the host's memory to this device's, or back, at once: whatever was asked of the
        device before, nobody touches either meanwhile."""
        as_tensor(target).copy_(as_tensor(source))
        return OVER

    def message_memory(self, nbytes: int) -> torch.Tensor:
        """uint8 memory of this device that messages to and from neighbours lie in, uninitialised."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.target)

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host, uninitialised, for `fetch`."""
        return torch.empty(shape, dtype=dtype)

    def bring(self, source: torch.Tensor) -> tuple[torch.Tensor, Ticket]:
        """A tensor of this device in the host's memory, when the ticket is done."""
        return source, OVER

    def keep(self, nbytes: int, here: bool) -> torch.Tensor | np.ndarray:
        """uint8 memory for what one chunk leaves for the next: of this device, or if not `here` of the host."""
        return np.empty(nbytes, dtype=np.uint8)

    def pin(self, memory: np.ndarray) -> None:
        """Says that this memory of the host will often be copied from and to, as long as the process lives."""

    def ticket(self) -> Ticket:
        """Done when everything asked of the device so far is."""
        return OVER

    def follow(self, ticket: Ticket) -> None:
        """What is asked of the device from now on begins when the ticket is done; this call does not wait for that."""
        ticket.wait()

    def computing(self) -> AbstractContextManager[object]:
        """Everything within belongs to one run of the model on this device."""
        return nullcontext()

    def explaining(self) -> AbstractContextManager[object]:
        """Within, memory that runs out is a UserError that says what can be changed."""
        return nullcontext()

    def peak_bytes(self) -> int:
        """The most memory of its own that this process has held at once; 0 for a CPU, whose memory is the host's."""
        return 0

    def graph(self, body: Callable[[], None]) -> Callable[[], None]:
        """Carries out `body`, and gives what does so again and again, as quickly as the device can be told to.

        `body` only calls operators and copies between tensors of this device, on memory that stays where it is.
        """
        body()
        return body


CPU = Device()


def as_tensor(memory: torch.Tensor | np.ndarray) -> torch.Tensor:
    """An array as the tensor that shares its memory."""
    return torch.from_numpy(memory) if isinstance(memory, np.ndarray) else memory


def open_device(name: str = "cpu", local_rank: int = 0) -> Device:
    """The device called "cpu", "cuda" or "cuda:1" for the process that is number `local_rank` on its machine.

    UserError where it cannot be used, with the reason.
    """
    if name == "cpu":
        return CPU
    if name.partition(":")[0] == "cuda":
        from rwkvmpi.models.cuda_device import open_cuda  # which needs the kernels

        return open_cuda(name, local_rank)
    raise UserError(f"device {name!r} is not known; it can be cpu, cuda or, for the second GPU, cuda:1")
