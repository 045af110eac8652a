"""What layers of every version have in common: how they hold weights; the channel mix of RWKV-4, 5 and 6."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from rwkvmpi import ops

if TYPE_CHECKING:
    from rwkvmpi.models.schema import ModelShape
    from rwkvmpi.models.state import LayerState

# Of the group norm after the WKV, for every head size: the published models divide by 8 and then use 1e-5.
GROUP_NORM_EPS = 64e-5


class LayerBase(ABC):
    """One layer: time mix, then channel mix, each added to the residual stream.

    Matrices are held in `dtype` (float32 or bfloat16) as the file has them, memory-mapped where nothing has to be
    converted; vectors are held in float32. The residual stream, the state and v_first are always float32.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], index: int, shape: ModelShape, dtype: torch.dtype) -> None:
        self.index = index
        self.shape = shape
        self.dtype = dtype
        self.weight_bytes = 0
        self._tensors = tensors
        self.ln1 = self.norm("ln1")
        self.ln2 = self.norm("ln2")
        self.load()
        self._tensors = {}  # let go of what was converted

    @abstractmethod
    def load(self) -> None:
        """Take the version's own tensors."""

    @abstractmethod
    def time_mix(
        self, x: torch.Tensor, v_first: torch.Tensor | None, state: LayerState, rows: torch.Tensor
    ) -> torch.Tensor | None:
        """Add the time mix to x [G, C] in place and advance the state; gives the v_first that later layers need."""

    @abstractmethod
    def channel_mix(self, x: torch.Tensor, state: LayerState, rows: torch.Tensor) -> None:
        """Add the channel mix to x [G, C] in place and advance its shift row."""

    @torch.inference_mode()
    def forward(
        self, x: torch.Tensor, v_first: torch.Tensor | None, state: LayerState, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One chunk through this layer: (x, v_first) for the next one.

        x [G, C] float32 is updated in place; v_first [G, C] float32 for RWKV-7 (None into layer 0, which makes it) and
        None for the others; state: one entry per segment, updated in place; rows int32 [D, 2]: first row and number of
        rows of each segment. Rows outside every segment give meaningless but finite x and touch no state.
        """
        v_first = self.time_mix(x, v_first, state, rows)
        self.channel_mix(x, state, rows)
        return x, v_first

    # ---- for the versions' own load() ----

    def matrix(self, name: str) -> torch.Tensor:
        """A matrix for torch's products, in this layer's dtype."""
        return self._keep(self._tensors[name].to(self.dtype))

    def vector(self, name: str) -> torch.Tensor:
        """A per-channel or [H, N] tensor in float32."""
        return self._keep(self._tensors[name].float())

    def vectors(self, *names: str) -> torch.Tensor:
        """Per-channel tensors [C] stacked to [M, C], float32."""
        return self._keep(torch.stack([self._tensors[name].float() for name in names]))

    def norm(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a normalisation."""
        return self.vector(f"{name}.weight"), self.vector(f"{name}.bias")

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        self.weight_bytes += tensor.numel() * tensor.element_size()
        return tensor

    # ---- for the versions' own mixes ----

    def add_product(self, x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor) -> None:
        """x [G, C] += h [G, K] times weight [C, K] transposed, in place; h has the weight's dtype, x is float32."""
        if h.dtype == torch.float32:
            x.addmm_(h, weight.t())
        else:
            x.add_(linear(h, weight))


class GatedChannelMix(LayerBase):
    """The channel mix of RWKV-4, 5 and 6: sigmoid(R x_r) * V relu(K x_k)^2."""

    def load_channel_mix(self, mixes: torch.Tensor) -> None:
        """`mixes` [2, C]: the share of the previous row in x_k and x_r."""
        self.ffn_mixes = mixes
        self.ffn_key = self.matrix("ffn.key.weight")
        self.ffn_receptance = self.matrix("ffn.receptance.weight")
        self.ffn_value = self.matrix("ffn.value.weight")

    def channel_mix(self, x: torch.Tensor, state: LayerState, rows: torch.Tensor) -> None:
        before = state.shift[:, 1].contiguous()
        (x_k, x_r), after = ops.norm_shift_mix(x, *self.ln2, before, self.ffn_mixes, rows, self.dtype)
        value = linear(ops.relu_squared(linear(x_k, self.ffn_key)), self.ffn_value)
        x.add_(ops.sigmoid_mul(linear(x_r, self.ffn_receptance), value, torch.float32))
        state.shift[:, 1] = after
