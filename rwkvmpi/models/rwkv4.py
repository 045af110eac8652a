"""One layer of RWKV-4: per channel a weighted mean over the past, as numerator, denominator and running maximum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rwkvmpi import ops
from rwkvmpi.models.layer_base import GatedChannelMix

if TYPE_CHECKING:
    from rwkvmpi.models.state import LayerState


class Layer(GatedChannelMix):
    """See `LayerBase`. State: wkv [D, 3, C] = aa, bb, pp."""

    def load(self) -> None:
        # The file has the share of the present row, our mixes are shares of the previous one.
        self.mixes = 1 - self.vectors("att.time_mix_k", "att.time_mix_v", "att.time_mix_r")
        self.key = self.matrix("att.key.weight")
        self.value = self.matrix("att.value.weight")
        self.receptance = self.matrix("att.receptance.weight")
        self.output = self.matrix("att.output.weight")
        self.decay = -torch.exp(self.vector("att.time_decay"))
        self.first = self.vector("att.time_first")
        self.load_channel_mix(1 - self.vectors("ffn.time_mix_k", "ffn.time_mix_r"))

    def time_mix(self, x: torch.Tensor, v_first: torch.Tensor | None, state: LayerState, rows: torch.Tensor) -> None:
        x_k, x_v, x_r = self.shift_mix(x, self.ln1, state.shift[:, 0], self.mixes, rows)
        k = self.product(x_k, self.key)
        v = self.product(x_v, self.value)
        r = self.product(x_r, self.receptance)
        h = self.workspace.take(tuple(x.shape), self.dtype)
        ops.v4_time_mix_into(h, r, k, v, self.decay, self.first, state.wkv, rows)
        ops.product_into(x, h, self.output, "add")
