"""Every operator that works on the rows of a chunk, in one form, so that the laws of bit-identity are tested on all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvmpi import ops

HEADS, SIZE = 3, 40  # 40 is no multiple of any register: tails are met
CHANNELS = HEADS * SIZE
BF16 = torch.bfloat16

Outputs = tuple[list[Tensor], Tensor]  # rows first, then the state


@dataclass
class Case:
    """inputs: row tensors [T, ...]; state: of one document; run(inputs, states [D, ...], rows) -> (outputs, states)."""

    name: str
    inputs: Callable[[int, torch.Generator], list[Tensor]]
    state: Callable[[torch.Generator], Tensor]
    run: Callable[[list[Tensor], Tensor, Tensor], Outputs]
    zero_padding: bool = False  # rows outside every segment come out as 0


def normal(g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=g) * scale


def uniform(g: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.rand(*shape, generator=g) * (high - low) + low


def wkv7_inputs(t: int, g: torch.Generator, heads: int = HEADS, size: int = SIZE) -> list[Tensor]:
    """r, w, k, v, a = -kk, b = kk*gate, as RWKV-7 makes them: kk of length 1, gate in (0, 1), w in (0.545, 1)."""
    r, k, v = (normal(g, t, heads, size) for _ in range(3))
    kk = torch.nn.functional.normalize(normal(g, t, heads, size), dim=-1)
    w = torch.exp(-0.6065306597 * torch.sigmoid(normal(g, t, heads, size, scale=8.0)))
    return [r, w, k, v, -kk, kk * uniform(g, t, heads, size)]


def constants(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [normal(g, *shape) for shape in shapes]


def rows_only(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
) -> Callable[[list[Tensor], Tensor, Tensor], Outputs]:
    def run(x: list[Tensor], state: Tensor, rows: Tensor) -> Outputs:
        y = function(*x)
        return list(y) if isinstance(y, tuple) else [y], state

    return run


def no_state(g: torch.Generator) -> Tensor:
    return torch.zeros(0)


def head_rows(count: int, dtype: torch.dtype = torch.float32) -> Callable[[int, torch.Generator], list[Tensor]]:
    return lambda t, g: [normal(g, t, CHANNELS, scale=2.0).to(dtype) for _ in range(count)]


C1, C2, C3, C4, C5 = constants(1, *[(CHANNELS,)] * 5)
(R_K,) = constants(2, (HEADS, SIZE))
(MIXES,) = constants(3, (6, CHANNELS))


def _square_state(g: torch.Generator) -> Tensor:
    return normal(g, HEADS, SIZE, SIZE)


def _heads_inputs(t: int, g: torch.Generator, count: int) -> list[Tensor]:
    return [normal(g, t, HEADS, SIZE) for _ in range(count)]


def _norm_shift(x: list[Tensor], state: Tensor, rows: Tensor) -> Outputs:
    u, d, after = ops.norm_shift(*x, C1, C2, state, rows)
    return [u, d], after


def _norm_shift_mix(dtype: torch.dtype) -> Callable[[list[Tensor], Tensor, Tensor], Outputs]:
    def run(x: list[Tensor], state: Tensor, rows: Tensor) -> Outputs:
        out, after = ops.norm_shift_mix(*x, C1, C2, state, MIXES, rows, dtype)
        return list(out.unbind(0)), after

    return run


def _wkv(function: Callable[..., tuple[Tensor, Tensor]], *fixed: Tensor) -> Callable[..., Outputs]:
    def run(x: list[Tensor], state: Tensor, rows: Tensor) -> Outputs:
        y, after = function(*x, *fixed, state, rows)
        return [y], after

    return run


SEGMENT_CASES = [
    Case("wkv7", wkv7_inputs, _square_state, _wkv(ops.wkv7), zero_padding=True),
    Case(
        "wkv6",
        lambda t, g: [normal(g, t, HEADS, SIZE), uniform(g, t, HEADS, SIZE), *_heads_inputs(t, g, 2)],
        _square_state,
        _wkv(ops.wkv6, R_K),
        zero_padding=True,
    ),
    Case(
        "wkv5",
        lambda t, g: _heads_inputs(t, g, 3),
        _square_state,
        lambda x, state, rows: _wkv(ops.wkv5)([x[0], torch.sigmoid(R_K), x[1], x[2], R_K], state, rows),
        zero_padding=True,
    ),
    Case(
        "wkv4",
        lambda t, g: [normal(g, t, CHANNELS, scale=3.0), normal(g, t, CHANNELS)],
        lambda g: torch.stack([normal(g, CHANNELS), uniform(g, CHANNELS, low=0.5), normal(g, CHANNELS)]),
        _wkv(ops.wkv4, -torch.exp(C3), C4),
        zero_padding=True,
    ),
    Case("norm_shift", head_rows(1), lambda g: normal(g, CHANNELS), _norm_shift),
    Case("norm_shift_mix", head_rows(1), lambda g: normal(g, CHANNELS), _norm_shift_mix(torch.float32)),
    Case("norm_shift_mix_bf16", head_rows(1), lambda g: normal(g, CHANNELS), _norm_shift_mix(BF16)),
]

ROW_CASES = [
    Case("layer_norm", head_rows(1), no_state, rows_only(lambda x: ops.layer_norm(x, C1, C2))),
    Case("mix", head_rows(2), no_state, rows_only(lambda u, d: ops.mix(u, d, MIXES).unbind(0))),
    Case(
        "v7_prepare",
        head_rows(6),
        no_state,
        rows_only(lambda k, v, w, a, vl, vf: ops.v7_prepare(k, v, w, a, vl, vf, C1, C2, C3, C4, C5, HEADS)),
    ),
    Case(
        "v7_prepare_bf16",
        head_rows(4, BF16),
        no_state,
        rows_only(lambda k, v, w, a: ops.v7_prepare(k, v, w, a, None, None, C1, C2, None, C4, C5, HEADS)),
    ),
    Case(
        "v7_output", head_rows(5), no_state, rows_only(lambda y, r, k, v, g: ops.v7_output(y, r, k, v, g, R_K, C1, C2))
    ),
    Case("group_norm_gate", head_rows(2), no_state, rows_only(lambda y, g: ops.group_norm_gate(y, g, C1, C2, HEADS))),
    Case("v6_decay", head_rows(1), no_state, rows_only(lambda w: ops.v6_decay(w, C1))),
    Case("tanh", head_rows(1), no_state, rows_only(ops.tanh)),
    Case("sigmoid_bf16", head_rows(1, BF16), no_state, rows_only(ops.sigmoid)),
    Case("relu_squared", head_rows(1), no_state, rows_only(ops.relu_squared)),
    Case("sigmoid_mul", head_rows(2), no_state, rows_only(ops.sigmoid_mul)),
]

CASES = SEGMENT_CASES + ROW_CASES


def rows_of(*segments: tuple[int, int]) -> Tensor:
    return torch.tensor(segments, dtype=torch.int32).view(-1, 2)
