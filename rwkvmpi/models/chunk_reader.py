"""A stage's layers over chunk after chunk: what a chunk brings, the states it is read with, what it leaves.

On a CPU every call computes. On a GPU the calls only say what is to be done, in buffers that stay where they are for
as long as the reader lives, so that a layer is one CUDA graph; what goes to the host comes with a Ticket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from rwkvmpi.models.device import OVER, Ticket, as_tensor
from rwkvmpi.models.state import LayerState
from rwkvmpi.ops.cuda.finite import mark_not_finite

if TYPE_CHECKING:
    from rwkvmpi.models.model import Stage


class ChunkReader:
    """The layers of one stage for chunks of one size; this one is the CPU's.

    x [G, C] float32, v_first [G, C] or None: the residual stream and RWKV-7's v_first after the last layer read.
    """

    def __init__(self, stage: Stage, chunk_size: int) -> None:
        self._stage = stage
        self.chunk_size = chunk_size
        self.x = torch.empty(0)
        self.v_first: torch.Tensor | None = None
        self._rows = torch.empty(0, 2, dtype=torch.int32)

    def begin_tokens(self, tokens: np.ndarray, rows: np.ndarray) -> Ticket:
        """First stage: a chunk of tokens int32 [G], its segments `rows` int32 [D, 2] (first row, number of rows).

        Whoever lends the arrays keeps them until the ticket is done."""
        self._rows = torch.from_numpy(rows)
        self.x, self.v_first = self._stage.embed(torch.from_numpy(tokens)), None
        return OVER

    def begin_activations(self, body: np.ndarray | torch.Tensor, rows: np.ndarray) -> Ticket:
        """Other stages: the chunk's activations as the stage above wrote them with `send`; `body` may be changed."""
        self._rows = torch.from_numpy(rows)
        self.x, self.v_first = self._activations(body)
        return OVER

    def _activations(self, body: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x and v_first in the body of a message between stages."""
        parts = as_tensor(body).view(torch.float32).view(-1, self.chunk_size, self._stage.shape.n_embd)
        return parts[0], parts[1] if self._stage.passes_v_first else None

    def state(self, item: int, segments: int) -> LayerState:
        """The state for the stage's layer number `item`, at the beginning of `segments` documents."""
        return self._stage.initial_state(item, segments)

    def read(self, item: int, state: LayerState) -> None:
        """The chunk through layer number `item`; `state` from `state` becomes that of the segments' ends."""
        self.x, self.v_first = self._stage.layers[item].forward(self.x, self.v_first, state, self._rows)

    def enter(self, state: LayerState, segment: int, packed: np.ndarray | torch.Tensor) -> Ticket:
        """Set one segment's state from the bytes of `LayerState.pack_into`."""
        state.unpack_from(packed, segment)
        return OVER

    def leave(self, state: LayerState, segment: int, packed: np.ndarray | torch.Tensor) -> Ticket:
        """Begins to write one segment's state into `packed`, on the host or on the stage's device."""
        state.pack_into(packed, segment)
        return OVER

    def send(self, body: np.ndarray | torch.Tensor) -> Ticket:
        """Begins to write the chunk's activations for the stage below into `body`, uint8: x, then v_first, each float32
        [G, C]. It lies on the host or on the stage's device; whoever reads it waits for the ticket."""
        for source, target in self._sent(body):
            target.copy_(source)
        return OVER

    def _sent(self, body: np.ndarray | torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(source, target) of what goes to the stage below."""
        x, v_first = self._activations(body)
        pairs = [(self.x, x)]
        if v_first is not None and self.v_first is not None:
            pairs.append((self.v_first, v_first))
        return pairs

    def look(self, item: int, state: LayerState) -> list[int] | None:
        """The segments with NaN or Inf in the state that layer `item` left; None: `verdict` will say."""
        if self._stage.is_finite(state.wkv, state.shift):
            return []
        broken = (self._stage.is_finite(state.wkv[i], state.shift[i]) for i in range(state.segments))
        return [index for index, finite in enumerate(broken) if not finite]

    def verdict(self) -> tuple[Ticket, Callable[[], list[tuple[int, int]]]]:
        """When its ticket is done the function gives (item, segment) of every broken state of this chunk."""
        return OVER, list


class ReplayingReader(ChunkReader):
    """On a GPU. A chunk's number of segments is rounded up to a power of two: each has its graphs."""

    def __init__(self, stage: Stage, chunk_size: int) -> None:
        super().__init__(stage, chunk_size)
        self._device = device = stage.device
        width, target = stage.shape.n_embd, device.target
        most = _power_of_two(chunk_size // 32)
        self._tokens = torch.empty(chunk_size, dtype=torch.int32, device=target)
        self.x = torch.empty(chunk_size, width, device=target)
        if stage.passes_v_first:
            self.v_first = torch.empty(chunk_size, width, dtype=stage.resources.between, device=target)
        self._rows = torch.zeros(most, 2, dtype=torch.int32, device=target)
        self._broken = torch.zeros(len(stage.layers), most, dtype=torch.int32, device=target)
        self._found = [device.host_tensor(tuple(self._broken.shape), torch.int32) for _ in range(2)]
        # A layer's state leaves while the next layer reads: two in turn.
        self._states: list[LayerState | None] = [None, None]
        self._leaving: list[Ticket] = [OVER, OVER]
        self._sending: Ticket = OVER
        self._capacity = 0
        self._graphs: dict[tuple[int, int], Callable[[], None]] = {}
        self._settle_workspace()

    def _settle_workspace(self) -> None:
        """Let the scratch memory grow to what any layer needs, and keep it: graphs know its addresses."""
        dummy, workspace = LayerState.zeros(self._stage.shape, 1, self._device.target), self._stage.resources.workspace
        self.x.zero_()
        if self.v_first is not None:
            self.v_first.zero_()
        for layer in (self._stage.layers[-1], self._stage.layers[0]):
            layer.advance(self.x, self.v_first, dummy, self._rows[:1])
        workspace.reset()
        workspace.hold()

    def begin_tokens(self, tokens: np.ndarray, rows: np.ndarray) -> Ticket:
        self._begin(rows)
        self._tokens.copy_(torch.from_numpy(tokens), non_blocking=True)
        self._stage.embed_into(self.x, self._tokens)
        return self._device.ticket()

    def begin_activations(self, body: np.ndarray | torch.Tensor, rows: np.ndarray) -> Ticket:
        self._begin(rows)
        x, v_first = self._activations(body)
        self.x.copy_(x, non_blocking=True)
        if v_first is not None and self.v_first is not None:
            self.v_first.copy_(self._device.upload(v_first))
        return self._device.ticket()

    def _begin(self, rows: np.ndarray) -> None:
        self._device.follow(self._sending)
        self._capacity = _power_of_two(len(rows))
        padded = np.zeros((len(self._rows), 2), dtype=np.int32)  # a segment of no rows is none
        padded[: len(rows)] = rows
        self._rows.copy_(self._device.upload(padded))
        self._broken.zero_()

    def state(self, item: int, segments: int) -> LayerState:
        turn = item % 2
        self._device.follow(self._leaving[turn])
        memory = self._states[turn]
        if memory is None or memory.segments < self._capacity:
            memory = self._states[turn] = LayerState.zeros(self._stage.shape, self._capacity, self._device.target)
            self._graphs.clear()  # they know the old memory
        state = LayerState(memory.wkv[: self._capacity], memory.shift[: self._capacity])
        state.begin(self._stage.layers[item].time_state)
        return state

    def read(self, item: int, state: LayerState) -> None:
        key = item, self._capacity
        graph = self._graphs.get(key)
        if graph is not None:
            graph()
            return
        rows, layer = self._rows[: self._capacity], self._stage.layers[item]

        def body() -> None:
            layer.advance(self.x, self.v_first, state, rows)

        self._graphs[key] = self._device.graph(body)

    def enter(self, state: LayerState, segment: int, packed: np.ndarray | torch.Tensor) -> Ticket:
        state.unpack_from(packed, segment)
        return self._device.ticket()

    def leave(self, state: LayerState, segment: int, packed: np.ndarray | torch.Tensor) -> Ticket:
        (to_wkv, wkv), (to_shift, shift) = state.parts(packed, segment)
        turn = 0 if state.wkv.data_ptr() == self._address(0) else 1
        self._leaving[turn] = self._way(packed)((wkv, to_wkv), (shift, to_shift))
        return self._leaving[turn]

    def _way(self, target: np.ndarray | torch.Tensor) -> Callable[..., Ticket]:
        """How bytes get there: in order with the computation on the device, beside it to the host."""
        return self._device.fetch if isinstance(target, np.ndarray) else self._device.copy

    def _address(self, turn: int) -> int:
        memory = self._states[turn]
        return 0 if memory is None else memory.wkv.data_ptr()

    def send(self, body: np.ndarray | torch.Tensor) -> Ticket:
        self._sending = self._way(body)(*self._sent(body))
        return self._sending

    def look(self, item: int, state: LayerState) -> list[int] | None:
        mark_not_finite(self._broken[item, : self._capacity], state.wkv)
        mark_not_finite(self._broken[item, : self._capacity], state.shift)
        return None

    def verdict(self) -> tuple[Ticket, Callable[[], list[tuple[int, int]]]]:
        self._found.reverse()
        found = self._found[0]
        ticket = self._device.fetch((self._broken, found))
        self._device.follow(ticket)
        return ticket, lambda: [(int(item), int(segment)) for item, segment in found.nonzero()]


def _power_of_two(count: int) -> int:
    """The smallest one that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()


def make_reader(stage: Stage, chunk_size: int) -> ChunkReader:
    """The reader for this stage's device."""
    return (ChunkReader if stage.device.at_once else ReplayingReader)(stage, chunk_size)
