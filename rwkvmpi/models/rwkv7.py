"""One layer of RWKV-7: a state that unlearns along a learned direction before it learns (generalised delta rule)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

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
        self.low_rank = {n: (self.matrix(f"att.{n}1"), self.matrix(f"att.{n}2")) for n in pairs}
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

    def time_mix(
        self, x: torch.Tensor, v_first: torch.Tensor | None, state: LayerState, rows: torch.Tensor
    ) -> torch.Tensor | None:
        if (v_first is None) != (self.index == 0):
            raise ValueError(f"RWKV-7: layer 0 makes v_first, all others need it (this is layer {self.index})")
        heads = (x.shape[0], self.shape.n_head, self.shape.head_size)
        before = state.shift[:, 0].contiguous()
        mixed, after = ops.norm_shift_mix(x, *self.ln1, before, self.mixes, rows, self.dtype)
        x_r, x_w, x_k, x_v, x_a, x_g = mixed.unbind(0)
        w1, w2 = self.low_rank["w"]
        a1, a2 = self.low_rank["a"]
        g1, g2 = self.low_rank["g"]
        w_lin = torch.mm(ops.tanh(torch.mm(x_w, w1)), w2)
        a_lin = torch.mm(torch.mm(x_a, a1), a2)
        gate = torch.mm(ops.sigmoid(torch.mm(x_g, g1)), g2)
        v_lin = None
        if v_first is not None:
            v1, v2 = self.low_rank["v"]
            v_lin = torch.mm(torch.mm(x_v, v1), v2)
        r = linear(x_r, self.receptance).float()
        k_lin = linear(x_k, self.key)
        v_own = linear(x_v, self.value)
        w, k, v, minus_kk, kk_a = ops.v7_prepare(
            k_lin, v_own, w_lin, a_lin, v_lin, v_first, self.w0, self.a0, self.v0, self.k_k, self.k_a, self.shape.n_head
        )
        y, wkv = ops.wkv7(*(z.view(heads) for z in (r, w, k, v, minus_kk, kk_a)), state.wkv, rows)  # type: ignore[call-arg]
        h = ops.v7_output(y.view(x.shape), r, k, v, gate, self.r_k, *self.ln_x, GROUP_NORM_EPS, self.dtype)
        self.add_product(x, h, self.output)
        state.wkv.copy_(wkv)
        state.shift[:, 0] = after
        return v if v_first is None else v_first

    def channel_mix(self, x: torch.Tensor, state: LayerState, rows: torch.Tensor) -> None:
        before = state.shift[:, 1].contiguous()
        mixed, after = ops.norm_shift_mix(x, *self.ln2, before, self.ffn_mix, rows, self.dtype)
        self.add_product(x, ops.relu_squared(linear(mixed[0], self.ffn_key)), self.ffn_value)
        state.shift[:, 1] = after
