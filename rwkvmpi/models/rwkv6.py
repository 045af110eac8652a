"""One layer of RWKV-6: as RWKV-5, but token shift and decay depend on the token through low-rank products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rwkvmpi import ops
from rwkvmpi.models.layer_base import GROUP_NORM_EPS, GatedChannelMix

if TYPE_CHECKING:
    from rwkvmpi.models.state import LayerState

MIXES = "wkvrg"  # the order in which time_maa_w1 and time_maa_w2 hold the five


class Layer(GatedChannelMix):
    """See `LayerBase`. State: wkv [D, H, N value, N key]."""

    def load(self) -> None:
        self.first_mix = self.vectors("att.time_maa_x")
        self.mixes = [self.vector(f"att.time_maa_{n}").flatten() for n in MIXES]
        self.maa_w1 = self.low_rank("att.time_maa_w1")
        self.maa_w2 = [self.low_rank("att.time_maa_w2", part) for part in range(len(MIXES))]
        self.decay_w1 = self.low_rank("att.time_decay_w1")
        self.decay_w2 = self.low_rank("att.time_decay_w2")
        self.receptance = self.matrix("att.receptance.weight")
        self.key = self.matrix("att.key.weight")
        self.value = self.matrix("att.value.weight")
        self.gate = self.matrix("att.gate.weight")
        self.output = self.matrix("att.output.weight")
        self.decay = self.vector("att.time_decay").flatten()
        self.bonus = self.vector("att.time_faaaa")
        self.ln_x = self.norm("att.ln_x")
        self.load_channel_mix(self.vectors("ffn.time_maa_k", "ffn.time_maa_r"))

    def time_mix(self, x: torch.Tensor, v_first: torch.Tensor | None, state: LayerState, rows: torch.Tensor) -> None:
        u, d = (self.workspace.take(tuple(x.shape), torch.float32) for _ in range(2))
        first = self.workspace.take((1, *x.shape), self.dtype)
        ops.shift_pair_into((u, d, first), x, *self.ln1, state.shift[:, 0], self.first_mix, rows)
        low = self.product(first[0], self.maa_w1, "tanh", self.dtype)
        mixed = self.workspace.take((len(MIXES), *x.shape), self.dtype)
        for out, part, second, mix in zip(mixed, low.chunk(len(MIXES), dim=1), self.maa_w2, self.mixes, strict=True):
            ops.product_into(out, part, second, "mix", None, u, d, mix)
        x_w, x_k, x_v, x_r, x_g = mixed.unbind(0)
        w = self.product(self.product(x_w, self.decay_w1, "tanh", self.dtype), self.decay_w2)
        r = self.product(x_r, self.receptance)
        k = self.product(x_k, self.key)
        v = self.product(x_v, self.value)
        gate = self.product(x_g, self.gate)
        h = self.workspace.take(tuple(x.shape), self.dtype)
        ops.v6_time_mix_into(h, r, k, v, w, self.decay, self.bonus, gate, *self.ln_x, state.wkv, rows, GROUP_NORM_EPS)
        ops.product_into(x, h, self.output, "add")
