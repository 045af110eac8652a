"""One layer of RWKV-5 (5.0 and 5.2): matrix-valued states with a fixed decay per channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rwkvmpi import ops
from rwkvmpi.models.layer_base import GROUP_NORM_EPS, GatedChannelMix

if TYPE_CHECKING:
    from rwkvmpi.models.state import LayerState


class Layer(GatedChannelMix):
    """See `LayerBase`. State: wkv [D, H, N value, N key]. 5.0 has no gate, and its bonus is stored as a logarithm."""

    def load(self) -> None:
        self.gated = self.shape.version == "5.2"
        names = "rkvg" if self.gated else "rkv"
        # The file has the share of the present row, our mixes are shares of the previous one.
        self.mixes = 1 - self.vectors(*(f"att.time_mix_{n}" for n in names))
        self.receptance = self.matrix("att.receptance.weight")
        self.key = self.matrix("att.key.weight")
        self.value = self.matrix("att.value.weight")
        self.gate = self.matrix("att.gate.weight") if self.gated else None
        self.output = self.matrix("att.output.weight")
        self.decay = torch.exp(-torch.exp(self.vector("att.time_decay")))
        bonus = self.vector("att.time_faaaa")
        self.bonus = bonus if self.gated else torch.exp(bonus)
        self.ln_x = self.norm("att.ln_x")
        self.load_channel_mix(1 - self.vectors("ffn.time_mix_k", "ffn.time_mix_r"))

    def time_mix(self, x: torch.Tensor, v_first: torch.Tensor | None, state: LayerState, rows: torch.Tensor) -> None:
        mixed = self.shift_mix(x, self.ln1, state.shift[:, 0], self.mixes, rows)
        r = self.product(mixed[0], self.receptance)
        k = self.product(mixed[1], self.key)
        v = self.product(mixed[2], self.value)
        gate = None if self.gate is None else self.product(mixed[3], self.gate)
        h = self.workspace.take(tuple(x.shape), self.dtype)
        ops.v5_time_mix_into(h, r, k, v, self.decay, self.bonus, gate, *self.ln_x, state.wkv, rows, GROUP_NORM_EPS)
        ops.product_into(x, h, self.output, "add")
