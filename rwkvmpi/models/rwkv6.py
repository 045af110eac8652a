"""One layer of RWKV-6: as RWKV-5, but token shift and decay depend on the token through low-rank products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from rwkvmpi import ops
from rwkvmpi.models.layer_base import GROUP_NORM_EPS, GatedChannelMix

if TYPE_CHECKING:
    from rwkvmpi.models.state import LayerState

MIXES = "wkvrg"  # the order in which time_maa_w1 and time_maa_w2 hold the five


class Layer(GatedChannelMix):
    """See `LayerBase`. State: wkv [D, H, N value, N key]."""

    def load(self) -> None:
        self.first_mix = self.vectors("att.time_maa_x")
        self.mixes = self.vectors(*(f"att.time_maa_{n}" for n in MIXES))
        self.maa_w1 = self.matrix("att.time_maa_w1")
        self.maa_w2 = self.matrix("att.time_maa_w2")
        self.decay_w1 = self.matrix("att.time_decay_w1")
        self.decay_w2 = self.matrix("att.time_decay_w2")
        self.receptance = self.matrix("att.receptance.weight")
        self.key = self.matrix("att.key.weight")
        self.value = self.matrix("att.value.weight")
        self.gate = self.matrix("att.gate.weight")
        self.output = self.matrix("att.output.weight")
        self.decay = self.vector("att.time_decay")
        self.bonus = self.vector("att.time_faaaa")
        self.ln_x = self.norm("att.ln_x")
        self.load_channel_mix(self.vectors("ffn.time_maa_k", "ffn.time_maa_r"))

    def time_mix(
        self, x: torch.Tensor, v_first: torch.Tensor | None, state: LayerState, rows: torch.Tensor
    ) -> torch.Tensor | None:
        heads = (x.shape[0], self.shape.n_head, self.shape.head_size)
        before = state.shift[:, 0].contiguous()
        u, d, after = ops.norm_shift(x, *self.ln1, before, rows)
        low = ops.tanh(torch.mm(ops.mix(u, d, self.first_mix, None, self.dtype)[0], self.maa_w1))
        delta = torch.empty(len(MIXES), *x.shape, dtype=self.dtype)
        for part, low_part, second in zip(delta, low.chunk(len(MIXES), dim=1), self.maa_w2, strict=True):
            torch.mm(low_part, second, out=part)
        x_w, x_k, x_v, x_r, x_g = ops.mix(u, d, self.mixes, delta, self.dtype)
        decay_low = torch.mm(ops.tanh(torch.mm(x_w, self.decay_w1)), self.decay_w2)
        w = ops.v6_decay(decay_low, self.decay).view(heads)
        r = linear(x_r, self.receptance).float().view(heads)
        k = linear(x_k, self.key).float().view(heads)
        v = linear(x_v, self.value).float().view(heads)
        y, wkv = ops.wkv6(r, w, k, v, self.bonus, state.wkv, rows)
        gate = linear(x_g, self.gate)
        h = ops.group_norm_gate(y.view(x.shape), gate, *self.ln_x, self.shape.n_head, GROUP_NORM_EPS, self.dtype)
        self.add_product(x, h, self.output)
        state.wkv.copy_(wkv)
        state.shift[:, 0] = after
        return None
