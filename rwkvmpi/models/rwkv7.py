"""One layer of RWKV-7: a state that unlearns along a learned direction before it learns (generalised delta rule)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rwkvmpi import ops
from rwkvmpi.models.layer_base import GROUP_NORM_EPS, LayerBase

if TYPE_CHECKING:
    from rwkvmpi.models.state import LayerState


class Layer(LayerBase):
    """See `LayerBase`. State: wkv [D, H, N value, N key]. Layer 0 makes v_first, every other layer mixes it in."""

    def load(self) -> None:
        self.mixes = self.vectors(*(f"att.x_{n}" for n in "rwkvag"))
        self.receptance = self.matrix("att.receptance.weight")
        self.key = self.matrix("att.key.weight")
        self.value = self.matrix("att.value.weight")
        self.output = self.matrix("att.output.weight")
        # Low-rank pairs. Layer 0 has no use for v's, whether the file has them or not.
        pairs = "wag" if self.index == 0 else "wagv"
        self.pairs = {n: (self.low_rank(f"att.{n}1"), self.low_rank(f"att.{n}2")) for n in pairs}
        self.w0 = self.vector("att.w0")
        self.a0 = self.vector("att.a0")
        self.v0 = None if self.index == 0 else self.vector("att.v0")
        self.k_k = self.vector("att.k_k")
        self.k_a = self.vector("att.k_a")
        self.r_k = self.vector("att.r_k")
        self.ln_x = self.norm("att.ln_x")
        self.ffn_mix = self.vectors("ffn.x_k")
        self.ffn_key = self.matrix("ffn.key.weight")
        self.ffn_value = self.matrix("ffn.value.weight")

    def first_value(self, x: torch.Tensor, v_first: torch.Tensor | None) -> torch.Tensor | None:
        if (v_first is None) != (self.index == 0):
            raise ValueError(f"RWKV-7: layer 0 makes v_first, all others need it (this is layer {self.index})")
        return torch.empty_like(x, dtype=self.resources.between) if v_first is None else v_first

    def time_mix(self, x: torch.Tensor, v_first: torch.Tensor | None, state: LayerState, rows: torch.Tensor) -> None:
        x_r, x_w, x_k, x_v, x_a, x_g = self.shift_mix(x, self.ln1, state.shift[:, 0], self.mixes, rows)
        w = self._through_pair("w", x_w, "tanh")
        a = self._through_pair("a", x_a, "none")
        gate = self._through_pair("g", x_g, "sigmoid")
        r = self.product(x_r, self.receptance)
        k = self.product(x_k, self.key)
        v = self.product(x_v, self.value)
        makes_first = self.index == 0
        v_lin = None if makes_first else self._through_pair("v", x_v, "none")
        h = self.workspace.take(tuple(x.shape), self.dtype)
        ops.v7_time_mix_into(
            (h, v_first if makes_first else None),
            *(r, k, v, w, a, v_lin, gate, None if makes_first else v_first),
            *(self.w0, self.a0, self.v0, self.k_k, self.k_a, self.r_k, *self.ln_x, state.wkv, rows, GROUP_NORM_EPS),
        )
        ops.product_into(x, h, self.output, "add")

    def _through_pair(self, name: str, x: torch.Tensor, between: str) -> torch.Tensor:
        first, second = self.pairs[name]
        return self.product(self.product(x, first, between, self.dtype), second)

    def channel_mix(self, x: torch.Tensor, state: LayerState, rows: torch.Tensor) -> None:
        (x_k,) = self.shift_mix(x, self.ln2, state.shift[:, 1], self.ffn_mix, rows)
        self.add_value(x, self.hidden_key(x_k, self.ffn_key), self.ffn_value)
