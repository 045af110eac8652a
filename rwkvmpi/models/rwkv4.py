"""One layer of RWKV-4: per channel a weighted mean over the past, as numerator, denominator and running maximum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

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

    def time_mix(
        self, x: torch.Tensor, v_first: torch.Tensor | None, state: LayerState, rows: torch.Tensor
    ) -> torch.Tensor | None:
        before = state.shift[:, 0].contiguous()
        (x_k, x_v, x_r), after = ops.norm_shift_mix(x, *self.ln1, before, self.mixes, rows, self.dtype)
        k = linear(x_k, self.key).float()
        v = linear(x_v, self.value).float()
        y, wkv = ops.wkv4(k, v, self.decay, self.first, state.wkv, rows)
        r = linear(x_r, self.receptance)
        self.add_product(x, ops.sigmoid_mul(r, y, self.dtype), self.output)
        state.wkv.copy_(wkv)
        state.shift[:, 0] = after
        return None
