"""The slow truth: whole RWKV models in plain numpy, float64, one token at a time.

Written from the published formulas alone and on purpose without anything of `rwkvmpi`: no shared helper, no shared
layout, matrices applied as `W @ x`. It takes the weights under the names and in the shapes of the `.pth` files.

`mistake=` plants one of the silent mistakes listed in `MISTAKES`: ones that raise no error, give plausible logits, and
have been made in some port. The tests show that their tolerance tells each of them from the truth.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
State = list[dict[str, Any]]

BOUNDARY = 32  # tokens after which "state_transposed" hands the state over wrongly, as at a chunk's end

_COMMON = ("ln0_twice", "ln0_never", "state_leaks", "shift_leaks", "mix_reversed", "shifts_swapped")
_GROUPNORM = (
    "groupnorm_eps_1e-5",
    "groupnorm_eps_heads",
    "groupnorm_eps_head_size",
    "state_transposed",
    "bonus_missing",
)
MISTAKES: dict[str, tuple[str, ...]] = {
    "4": (*_COMMON, "bonus_missing", "decay_before_reading"),
    "5.0": (*_COMMON, *_GROUPNORM, "bonus_not_exponential", "gate_added", "decay_before_reading"),
    "5.2": (*_COMMON, *_GROUPNORM, "bonus_exponential", "gate_sigmoid", "decay_before_reading"),
    "6": (
        *_COMMON,
        *_GROUPNORM,
        "gate_sigmoid",
        "maa_order",
        "decay_tanh_missing",
        "decay_before_reading",
        "time_state_ignored",
        "time_state_transposed",
    ),
    "7": (
        *_COMMON,
        *_GROUPNORM,
        "v_first_not_sent",
        "k_a_missing",
        "kk_not_normalised",
        "kk_after_k_a",
        "x_a_x_g_swapped",
        "decay_constant_missing",
        "a_not_in_removal",
    ),
}


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight + bias


def group_norm(x_hn: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x_hn - x_hn.mean(axis=1, keepdims=True)
    return (centred / np.sqrt(x_hn.var(axis=1, keepdims=True) + eps)).ravel() * weight + bias


def _as_array(value: Any) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().double().numpy()
    return np.asarray(value, dtype=np.float64)


def version_of(names: Mapping[str, Any]) -> str:
    """ "4", "5.0", "5.2", "6" or "7", told by the tensors' names in the order the facts give."""
    if "blocks.0.att.k_k" in names:
        return "7"
    if "blocks.0.att.time_maa_x" in names:
        return "6"
    if "blocks.0.att.gate.weight" in names:
        return "5.2"
    return "5.0" if "blocks.0.att.ln_x.weight" in names else "4"


class Oracle:
    """One model. `read` gives logits [T, V] in float64 and the state after the last token.

    A state is a list with one dict per layer: `wkv` (RWKV-4: [3, C] of aa, bb, pp; else [H, N, N] in the orientation
    that the version's formulas use), `att` and `ffn` (the last normalised rows, [C]).
    """

    def __init__(self, weights: Mapping[str, Any], mistake: str | None = None) -> None:
        self.version = version_of(weights)
        if mistake is not None and mistake not in MISTAKES[self.version]:
            raise ValueError(f"RWKV-{self.version} has no planted mistake called {mistake!r}")
        self.mistake = mistake
        self.w = {name: _as_array(value) for name, value in weights.items()}
        self.layers = 1 + max(int(name.split(".")[1]) for name in self.w if name.startswith("blocks."))
        self.width = self.w["emb.weight"].shape[1]
        if self.version == "7":
            self.heads = self.w["blocks.0.att.r_k"].shape[0]
        elif self.version in ("5.2", "6"):
            self.heads = self.w["blocks.0.att.time_faaaa"].shape[0]
        elif self.version == "5.0":
            self.heads = self.w["blocks.0.att.time_decay"].size
        else:
            self.heads = 1
        self.size = self.width // self.heads
        self.eps = {
            "groupnorm_eps_1e-5": 1e-5,
            "groupnorm_eps_heads": self.heads * 1e-5,
            "groupnorm_eps_head_size": self.size * 1e-5,
        }.get(mistake or "", 64e-5)

    # ---- reading -------------------------------------------------------------------------------------------------

    def new_state(self) -> State:
        state: State = []
        for layer in range(self.layers):
            if self.version == "4":
                wkv = np.zeros((3, self.width))
                wkv[2] = -1e30
            else:
                wkv = np.zeros((self.heads, self.size, self.size))
            stored = self.w.get(f"blocks.{layer}.att.time_state")
            if stored is not None and self.mistake != "time_state_ignored":
                # The file holds [H, value, key]; RWKV-6's formulas here use [key, value].
                wkv = stored.copy() if self.mistake == "time_state_transposed" else stored.transpose(0, 2, 1).copy()
            state.append({"wkv": wkv, "att": np.zeros(self.width), "ffn": np.zeros(self.width)})
        return state

    def read(self, tokens: Sequence[int], state: State | None = None) -> tuple[Array, State]:
        """Logits [T, V] after each token, and the state after the last one. The given state is not changed."""
        if state is None:
            state = self.new_state()
        state = [{key: value.copy() for key, value in layer.items()} for layer in state]
        logits = []
        for position, token in enumerate(tokens):
            if self.mistake == "state_transposed" and position == BOUNDARY:
                for layer_state in state:
                    layer_state["wkv"] = layer_state["wkv"].transpose(0, 2, 1)
            logits.append(self._step(int(token), state))
        return np.array(logits), state

    def read_documents(self, documents: Sequence[Sequence[int]]) -> list[Array]:
        """Each document from an empty state, one after the other: the logits [T, V] of each."""
        results = []
        previous: State | None = None
        for tokens in documents:
            state = self.new_state()
            if previous is not None and self.mistake in ("state_leaks", "shift_leaks"):
                kept = ("wkv",) if self.mistake == "state_leaks" else ("att", "ffn")
                for fresh, old in zip(state, previous, strict=True):
                    fresh.update({key: old[key] for key in kept})
            logits, previous = self.read(tokens, state)
            results.append(logits)
        return results

    def exported_state(self, state: State) -> tuple[Array, Array]:
        """The state as results files hold it: wkv [L, H, value, key] (RWKV-4 [L, 3, C]) and shift [L, 2, C]."""
        wkv = np.stack([layer["wkv"] for layer in state])
        if self.version in ("5.0", "5.2", "6"):
            wkv = wkv.swapaxes(-1, -2)
        return wkv, np.stack([np.stack([layer["att"], layer["ffn"]]) for layer in state])

    # ---- one token -----------------------------------------------------------------------------------------------

    def _norm(self, name: str, x: Array) -> Array:
        return layer_norm(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _step(self, token: int, state: State) -> Array:
        x = self.w["emb.weight"][token]
        for _ in range({"ln0_twice": 2, "ln0_never": 0}.get(self.mistake or "", 1)):
            x = self._norm("blocks.0.ln0", x)
        v_first = None
        for layer in range(self.layers):
            own = state[layer]
            p = f"blocks.{layer}."
            if self.mistake == "v_first_not_sent" and layer == self.layers // 2:
                v_first = None  # a second stage that takes its own first value for the model's
            if self.mistake == "shifts_swapped":
                own["att"], own["ffn"] = own["ffn"], own["att"]
            u = self._norm(p + "ln1", x)
            if self.version == "7":
                out, v_first = self._att7(p + "att.", u, own, v_first)
            else:
                out = {"4": self._att4, "6": self._att6}.get(self.version, self._att5)(p + "att.", u, own)
            own["att"] = u
            x = x + out
            u = self._norm(p + "ln2", x)
            x = x + self._ffn(p + "ffn.", u, own)
            own["ffn"] = u
        return self.w["head.weight"] @ self._norm("ln_out", x)

    def _mix(self, name: str, u: Array, previous: Array) -> Array:
        """Versions 4 and 5: the share of the present row is in the file. 6 and 7: the share of the previous one."""
        share = self.w[name].ravel()
        present_first = ".time_mix_" in name
        if self.mistake == "mix_reversed" and name.endswith(("_k", ".x_r")):
            present_first = not present_first
        return u * share + previous * (1 - share) if present_first else u + (previous - u) * share

    def _ffn(self, p: str, u: Array, own: dict[str, Any]) -> Array:
        w = self.w
        if self.version == "7":
            return w[p + "value.weight"] @ np.maximum(w[p + "key.weight"] @ self._mix(p + "x_k", u, own["ffn"]), 0) ** 2
        kind = "time_maa_" if self.version == "6" else "time_mix_"
        x_k, x_r = (self._mix(f"{p}{kind}{n}", u, own["ffn"]) for n in "kr")
        value = w[p + "value.weight"] @ np.maximum(w[p + "key.weight"] @ x_k, 0) ** 2
        return sigmoid(w[p + "receptance.weight"] @ x_r) * value

    def _att4(self, p: str, u: Array, own: dict[str, Any]) -> Array:
        w = self.w
        k, v, r = (
            w[f"{p}{m}.weight"] @ self._mix(f"{p}time_mix_{m[0]}", u, own["att"])
            for m in ("key", "value", "receptance")
        )
        aa, bb, pp = own["wkv"]
        if self.mistake == "decay_before_reading":
            pp = pp - np.exp(w[p + "time_decay"].ravel())
        ww = k if self.mistake == "bonus_missing" else w[p + "time_first"].ravel() + k
        q = np.maximum(pp, ww)
        wkv = (np.exp(pp - q) * aa + np.exp(ww - q) * v) / (np.exp(pp - q) * bb + np.exp(ww - q))
        ww = own["wkv"][2] - np.exp(w[p + "time_decay"].ravel())
        q = np.maximum(ww, k)
        own["wkv"] = np.stack([np.exp(ww - q) * aa + np.exp(k - q) * v, np.exp(ww - q) * bb + np.exp(k - q), q])
        return w[p + "output.weight"] @ (sigmoid(r) * wkv)

    def _linear_attention(self, r: Array, k: Array, v: Array, decay: Array, bonus: Array, own: dict[str, Any]) -> Array:
        """RWKV-5 and 6 with the state as [H, key, value]; every argument [H, N]; the result [H, N]."""
        if self.mistake == "bonus_missing":
            bonus = np.zeros_like(bonus)
        out = np.empty_like(v)
        s = own["wkv"]
        new = np.empty_like(s)
        for h in range(self.heads):
            kv = np.outer(k[h], v[h])
            seen = np.diag(decay[h]) @ s[h] if self.mistake == "decay_before_reading" else s[h]
            out[h] = r[h] @ (seen + np.diag(bonus[h]) @ kv)
            new[h] = np.diag(decay[h]) @ s[h] + kv
        own["wkv"] = new
        return out

    def _att5(self, p: str, u: Array, own: dict[str, Any]) -> Array:
        w, shape = self.w, (self.heads, self.size)
        r, k, v = (
            (w[f"{p}{m}.weight"] @ self._mix(f"{p}time_mix_{m[0]}", u, own["att"])).reshape(shape)
            for m in ("receptance", "key", "value")
        )
        decay = np.exp(-np.exp(w[p + "time_decay"]))
        bonus = w[p + ("time_first" if self.version == "5.0" else "time_faaaa")]
        if (self.version == "5.0") != (self.mistake in ("bonus_not_exponential", "bonus_exponential")):
            bonus = np.exp(bonus)
        if self.version == "5.0":  # one number per head
            decay, bonus = (np.repeat(a.reshape(-1, 1), self.size, axis=1) for a in (decay, bonus))
        y = self._linear_attention(r, k, v, decay, bonus, own)
        y = group_norm(y, w[p + "ln_x.weight"], w[p + "ln_x.bias"], self.eps)
        if self.version == "5.2":
            gate = w[p + "gate.weight"] @ self._mix(p + "time_mix_g", u, own["att"])
            y = y * (sigmoid(gate) if self.mistake == "gate_sigmoid" else gate * sigmoid(gate))
        elif self.mistake == "gate_added":
            y = y * sigmoid(r.ravel())
        return w[p + "output.weight"] @ y

    def _att6(self, p: str, u: Array, own: dict[str, Any]) -> Array:
        w, shape = self.w, (self.heads, self.size)
        d = own["att"] - u
        m = np.tanh((u + d * w[p + "time_maa_x"].ravel()) @ w[p + "time_maa_w1"]).reshape(5, -1)
        x: dict[str, Array] = {}
        for n, letter in enumerate("rwkvg" if self.mistake == "maa_order" else "wkvrg"):
            share = w[f"{p}time_maa_{letter}"].ravel() + m[n] @ w[p + "time_maa_w2"][n]
            if self.mistake == "mix_reversed" and letter == "k":
                share = 1 - share
            x[letter] = u + d * share
        r, k, v = ((w[f"{p}{name}.weight"] @ x[name[0]]).reshape(shape) for name in ("receptance", "key", "value"))
        low = x["w"] @ w[p + "time_decay_w1"]
        if self.mistake != "decay_tanh_missing":
            low = np.tanh(low)
        decay = np.exp(-np.exp(w[p + "time_decay"].ravel() + low @ w[p + "time_decay_w2"])).reshape(shape)
        y = self._linear_attention(r, k, v, decay, w[p + "time_faaaa"], own)
        gate = w[p + "gate.weight"] @ x["g"]
        y = group_norm(y, w[p + "ln_x.weight"], w[p + "ln_x.bias"], self.eps)
        y = y * (sigmoid(gate) if self.mistake == "gate_sigmoid" else gate * sigmoid(gate))
        return w[p + "output.weight"] @ y

    def _att7(self, p: str, u: Array, own: dict[str, Any], v_first: Array | None) -> tuple[Array, Array]:
        w, shape = self.w, (self.heads, self.size)
        x = {n: self._mix(f"{p}x_{n}", u, own["att"]) for n in "rwkvag"}
        if self.mistake == "x_a_x_g_swapped":
            x["a"], x["g"] = x["g"], x["a"]
        r, k, v = (w[f"{p}{name}.weight"] @ x[name[0]] for name in ("receptance", "key", "value"))
        a = sigmoid(w[p + "a0"].ravel() + (x["a"] @ w[p + "a1"]) @ w[p + "a2"])
        g = sigmoid(x["g"] @ w[p + "g1"]) @ w[p + "g2"]
        rate = 1.0 if self.mistake == "decay_constant_missing" else np.exp(-0.5)
        decay = np.exp(-rate * sigmoid(w[p + "w0"].ravel() + np.tanh(x["w"] @ w[p + "w1"]) @ w[p + "w2"]))
        new_k = k if self.mistake == "k_a_missing" else k * (1 + (a - 1) * w[p + "k_a"].ravel())
        kk = ((new_k if self.mistake == "kk_after_k_a" else k) * w[p + "k_k"].ravel()).reshape(shape)
        if self.mistake != "kk_not_normalised":
            kk = kk / np.maximum(np.sqrt((kk**2).sum(axis=1, keepdims=True)), 1e-12)
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * sigmoid(w[p + "v0"].ravel() + (x["v"] @ w[p + "v1"]) @ w[p + "v2"])
        r, k, v_hn, a, decay = (z.reshape(shape) for z in (r, new_k, v, a, decay))
        y = np.empty(shape)
        s = own["wkv"] = own["wkv"].copy()
        for h in range(self.heads):
            replaced = kk[h] if self.mistake == "a_not_in_removal" else kk[h] * a[h]
            s[h] = s[h] @ np.diag(decay[h]) + np.outer(s[h] @ -kk[h], replaced) + np.outer(v_hn[h], k[h])
            y[h] = s[h] @ r[h]
        out = group_norm(y, w[p + "ln_x.weight"], w[p + "ln_x.bias"], self.eps)
        if self.mistake != "bonus_missing":
            out = out + ((r * k * w[p + "r_k"]).sum(axis=1, keepdims=True) * v_hn).ravel()
        return w[p + "output.weight"] @ (out * g), v_first
