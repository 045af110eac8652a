"""What layers of every version have in common: how they hold weights; the channel mix of RWKV-4, 5 and 6."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rwkvmpi import ops
from rwkvmpi.models.checkpoint import check_finite
from rwkvmpi.models.state import LayerState

if TYPE_CHECKING:
    from rwkvmpi.models.checkpoint import Checkpoint
    from rwkvmpi.models.device import Device
    from rwkvmpi.models.schema import ModelShape
    from rwkvmpi.models.weight_store import WeightStore

# Of the group norm after the WKV, for every head size: the published models divide by 8 and then use 1e-5.
GROUP_NORM_EPS = 64e-5
# A layer reads a chunk in blocks of so many rows, so that what it computes in between stays in the processor's caches.
# No row's bits depend on it.
BLOCK_ROWS = 1024
MOST_ROWS = 1 << 30  # a GPU takes a whole chunk at once: it needs the rows to fill its processors


@dataclass(slots=True)
class Resources:
    """What the layers of a stage share: where they compute, where weights go, scratch memory, how matrices are held.

    kind: "float32", "bfloat16", "float16" or "int8", of the large matrices; the low-rank ones are bfloat16 where that
    is "int8".
    """

    kind: str
    device: Device
    store: WeightStore
    workspace: ops.Workspace

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs of matrix products."""
        return torch.bfloat16 if self.kind == "int8" else getattr(torch, self.kind)

    @property
    def between(self) -> torch.dtype:
        """Of the results of products that no other product reads."""
        return self.device.between(self.kind)

    @property
    def block_rows(self) -> int:
        """The number of rows that go through a layer together."""
        return BLOCK_ROWS if self.device.kind == "cpu" else MOST_ROWS

    def exchange_workspace(self, other: ops.Workspace) -> ops.Workspace:
        """Use `other` from now on; gives the one used so far."""
        before, self.workspace = self.workspace, other
        return before

    def pack(self, load: Callable[[], torch.Tensor], shape: Sequence[int], kind: str) -> ops.Packed:
        """Lay out for products, in the store's memory, the matrix of `shape` [outputs, inputs] that `load` reads; it is
        not read where another process has done so already."""

        outputs, inputs = shape
        on_gpu = self.device.kind != "cpu"

        def fill(memory: torch.Tensor) -> None:
            ops.pack(load(), kind, memory, on_gpu)

        nbytes = ops.packed_bytes(kind, outputs, inputs, on_gpu)
        return ops.Packed(kind, outputs, inputs, self.store.place(nbytes, fill))


class LayerBase(ABC):
    """One layer: time mix, then channel mix, each added to the residual stream.

    Matrices are packed for our products; vectors are held in float32. The residual stream and the state are always
    float32, v_first and the outputs of products that no other product reads are float32 on a CPU.
    """

    def __init__(self, checkpoint: Checkpoint, index: int, resources: Resources) -> None:
        """Reads layer `index` of the file; UserError that names a tensor with NaN or Inf in it."""
        self.index = index
        self.shape: ModelShape = checkpoint.shape
        self.resources = resources
        self.dtype = resources.dtype
        self.weight_bytes = 0
        self._checkpoint: Checkpoint | None = checkpoint
        self.ln1 = self.norm("ln1")
        self.ln2 = self.norm("ln2")
        self.load()
        self.time_state = self.vector("att.time_state") if self.shape.has_time_state else None
        checkpoint.let_go(name for name in checkpoint.names() if name.startswith(f"blocks.{index}."))
        self._checkpoint = None

    @property
    def workspace(self) -> ops.Workspace:
        """Scratch memory within a mix."""
        return self.resources.workspace

    @abstractmethod
    def load(self) -> None:
        """Take the version's own tensors."""

    @abstractmethod
    def time_mix(self, x: torch.Tensor, v_first: torch.Tensor | None, state: LayerState, rows: torch.Tensor) -> None:
        """Add the time mix to x [G, C] in place and advance the state."""

    @abstractmethod
    def channel_mix(self, x: torch.Tensor, state: LayerState, rows: torch.Tensor) -> None:
        """Add the channel mix to x [G, C] in place and advance its shift row."""

    @torch.inference_mode()
    def forward(
        self, x: torch.Tensor, v_first: torch.Tensor | None, state: LayerState, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One chunk through this layer: (x, v_first) for the next one.

        x [G, C] float32 is updated in place; v_first [G, C] (`Resources.between`) for RWKV-7 (None into layer 0, which
        makes it) and None for the others; state: one entry per segment, updated in place; rows int32 [D, 2]: first row
        and number of rows of each segment (on a GPU a count of 0 is a segment that is not there). Rows outside every
        segment give meaningless but finite x and touch no state.
        """
        v_first = self.first_value(x, v_first)
        self.advance(x, v_first, state, rows)
        return x, v_first

    def advance(self, x: torch.Tensor, v_first: torch.Tensor | None, state: LayerState, rows: torch.Tensor) -> None:
        """`forward` with all memory given: v_first [G, C] for RWKV-7 in layer 0 too, which fills it."""
        for block in row_blocks(rows, x.shape[0], self.resources.block_rows):
            part = slice(block.first, block.end)
            own = LayerState(state.wkv[block.segments], state.shift[block.segments])
            self.workspace.reset()
            self.time_mix(x[part], None if v_first is None else v_first[part], own, block.rows)
            self.workspace.reset()
            self.channel_mix(x[part], own, block.rows)

    def first_value(self, x: torch.Tensor, v_first: torch.Tensor | None) -> torch.Tensor | None:
        """The v_first that the time mix fills (in layer 0) or reads; None for versions without one."""
        return None

    # ---- for the versions' own load() ----

    def matrix(self, name: str) -> ops.Packed:
        """A large matrix [outputs, inputs]."""
        return self._pack(lambda: self._read(name), self._shape(name), self.resources.kind)

    def low_rank(self, name: str, part: int | None = None) -> ops.Packed:
        """One of a low-rank pair, as the files have them: [inputs, outputs], or part `part` of several."""
        *_, inputs, outputs = self._shape(name)
        kind = "bfloat16" if self.resources.kind == "int8" else self.resources.kind
        return self._pack(lambda: self._read(name, part).t(), (outputs, inputs), kind)

    def vector(self, name: str) -> torch.Tensor:
        """A per-channel or [H, N] tensor in float32."""
        return self._keep(self._read(name).float())

    def vectors(self, *names: str) -> torch.Tensor:
        """Per-channel tensors [C] stacked to [M, C], float32."""
        return self._keep(torch.stack([self._read(name).float() for name in names]))

    def norm(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a normalisation."""
        return self.vector(f"{name}.weight"), self.vector(f"{name}.bias")

    def _pack(self, load: Callable[[], torch.Tensor], shape: Sequence[int], kind: str) -> ops.Packed:
        packed = self.resources.pack(load, shape, kind)
        self.weight_bytes += packed.data.numel()
        return packed

    def _shape(self, name: str) -> Sequence[int]:
        assert self._checkpoint is not None
        return self._checkpoint.tensor_shape(f"blocks.{self.index}.{name}")

    def _read(self, name: str, part: int | None = None) -> torch.Tensor:
        assert self._checkpoint is not None
        name = f"blocks.{self.index}.{name}"
        check_finite(self._checkpoint, [name])
        tensor = self._checkpoint.tensor(name)
        return tensor if part is None else tensor[part]

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        # never a view that keeps the file's pages
        tensor = self.resources.device.upload(tensor.clone(memory_format=torch.contiguous_format))
        self.weight_bytes += tensor.numel() * tensor.element_size()
        return tensor

    # ---- for the versions' own mixes ----

    def product(
        self, x: torch.Tensor, weight: ops.Packed, op: str = "none", dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """x [G, K] times weight transposed, after it the function `op`: [G, N], valid within this mix.

        dtype: `self.dtype` where another product reads it; None stands for `Resources.between`."""
        out = self.workspace.take((x.shape[0], weight.outputs), dtype or self.resources.between)
        ops.product_into(out, x, weight, op)
        return out

    def hidden_key(self, x: torch.Tensor, weight: ops.Packed) -> torch.Tensor:
        """The channel mix's relu(K x)^2, by `ops.relu_squared_scale` too small."""
        out = self.workspace.take((x.shape[0], weight.outputs), self.dtype)
        ops.product_into(out, x, weight, "relu_squared", scale=ops.relu_squared_scale(self.dtype))
        return out

    def add_value(
        self, x: torch.Tensor, key: torch.Tensor, weight: ops.Packed, gate: torch.Tensor | None = None
    ) -> None:
        """x += V key, for RWKV-4 to 6 times sigmoid(gate), of a key from `hidden_key`."""
        scale = ops.relu_squared_scale(self.dtype) ** -2
        ops.product_into(x, key, weight, "add" if gate is None else "gated_add", gate, scale=scale)

    def shift_mix(
        self,
        x: torch.Tensor,
        norm: tuple[torch.Tensor, torch.Tensor],
        shift: torch.Tensor,
        mixes: torch.Tensor,
        rows: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """The normalised x mixed with the row before it, once for each of `mixes` [M, C]: M of [G, C]."""
        mixed = self.workspace.take((mixes.shape[0], *x.shape), self.dtype)
        ops.shift_mix_into(mixed, x, *norm, shift, mixes, rows)
        return mixed.unbind(0)


class GatedChannelMix(LayerBase):
    """The channel mix of RWKV-4, 5 and 6: sigmoid(R x_r) * V relu(K x_k)^2."""

    def load_channel_mix(self, mixes: torch.Tensor) -> None:
        """`mixes` [2, C]: the share of the previous row in x_k and x_r."""
        self.ffn_mixes = mixes
        self.ffn_key = self.matrix("ffn.key.weight")
        self.ffn_receptance = self.matrix("ffn.receptance.weight")
        self.ffn_value = self.matrix("ffn.value.weight")

    def channel_mix(self, x: torch.Tensor, state: LayerState, rows: torch.Tensor) -> None:
        x_k, x_r = self.shift_mix(x, self.ln2, state.shift[:, 1], self.ffn_mixes, rows)
        key = self.hidden_key(x_k, self.ffn_key)
        self.add_value(x, key, self.ffn_value, self.product(x_r, self.ffn_receptance))


@dataclass(slots=True)
class RowBlock:
    """Rows first..end-1 of a chunk; the segments with rows there, and where, counted from the block's first row."""

    first: int
    end: int
    segments: slice
    rows: torch.Tensor


def row_blocks(rows: torch.Tensor, total: int, size: int = BLOCK_ROWS) -> Iterator[RowBlock]:
    """Cut a chunk of `total` rows with segments `rows` (int32 [D, 2]) into blocks of at most `size` rows, in order."""
    if total <= size:
        yield RowBlock(0, total, slice(0, rows.shape[0]), rows)
        return
    bounds = [(first, first + count) for first, count in rows.tolist()]
    for first in range(0, total, size):
        end = min(first + size, total)
        here = [d for d, (lo, hi) in enumerate(bounds) if lo < end and hi > first]
        local = [(max(bounds[d][0], first) - first, min(bounds[d][1], end) - max(bounds[d][0], first)) for d in here]
        segments = slice(here[0], here[-1] + 1) if here else slice(0, 0)
        yield RowBlock(first, end, segments, torch.tensor(local, dtype=torch.int32).view(-1, 2))
