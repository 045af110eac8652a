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


def head_rows(count: int) -> Callable[[int, torch.Generator], list[Tensor]]:
    return lambda t, g: [normal(g, t, CHANNELS, scale=2.0) for _ in range(count)]


C1, C2, C3, C4, C5, C6, C7 = constants(1, *[(CHANNELS,)] * 7)
(R_K,) = constants(2, (HEADS, SIZE))
(MIXES,) = constants(3, (6, CHANNELS))


def _square_state(g: torch.Generator) -> Tensor:
    return normal(g, HEADS, SIZE, SIZE)


def _exponent_state(g: torch.Generator) -> Tensor:
    """RWKV-4's: aa, bb above 0, pp."""
    return torch.stack([normal(g, CHANNELS), uniform(g, CHANNELS, low=0.5), normal(g, CHANNELS)])


def _heads_inputs(t: int, g: torch.Generator, count: int) -> list[Tensor]:
    return [normal(g, t, HEADS, SIZE) for _ in range(count)]


def _wkv(function: Callable[..., tuple[Tensor, Tensor]], *fixed: Tensor) -> Callable[..., Outputs]:
    def run(x: list[Tensor], state: Tensor, rows: Tensor) -> Outputs:
        y, after = function(*x, *fixed, state, rows)
        return [y], after

    return run


def in_place(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[[list[Tensor], Tensor, Tensor], Outputs]:
    """Of an operator that changes its state; which is one row of a larger tensor, as shift rows are."""

    def run(x: list[Tensor], state: Tensor, rows: Tensor) -> Outputs:
        after = torch.stack([state, state], 1)[:, 1] if state.dim() == 2 else state.clone()
        out = function(x, after, rows)
        return list(out) if isinstance(out, tuple) else [out], after.contiguous()

    return run


def _v7_later(x: list[Tensor], state: Tensor, rows: Tensor) -> Tensor:
    return ops.v7_time_mix(*x, C1, C2, C3, C4, C5, R_K, C6, C7, state, rows)[0]


def _v7_first(x: list[Tensor], state: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    h, v_first = ops.v7_time_mix(*x[:5], None, x[5], None, C1, C2, None, C4, C5, R_K, C6, C7, state, rows, 64e-5, BF16)
    assert v_first is not None
    return h, v_first


TIME_MIXES = [
    Case("v7_time_mix", head_rows(8), _square_state, in_place(_v7_later), zero_padding=True),
    Case("v7_time_mix_first_bf16", head_rows(6), _square_state, in_place(_v7_first), zero_padding=True),
    Case(
        "v6_time_mix_bf16",
        head_rows(5),
        _square_state,
        in_place(lambda x, state, rows: ops.v6_time_mix(*x[:4], C1, R_K, x[4], C2, C3, state, rows, 64e-5, BF16)),
        zero_padding=True,
    ),
    Case(
        "v5_time_mix",
        head_rows(3),
        _square_state,
        in_place(lambda x, state, rows: ops.v5_time_mix(*x, torch.sigmoid(R_K), R_K, None, C2, C3, state, rows)),
        zero_padding=True,
    ),
    Case(
        "v4_time_mix",
        head_rows(3),
        _exponent_state,
        in_place(lambda x, state, rows: ops.v4_time_mix(*x, -torch.exp(C3), C4, state, rows)),
        zero_padding=True,
    ),
]

SHIFTS = [
    Case(
        f"shift_mix_{name}",
        head_rows(1),
        lambda g: normal(g, CHANNELS),
        in_place(lambda x, shift, rows, dtype=dtype: ops.shift_mix(x[0], C1, C2, shift, MIXES, rows, dtype).unbind(0)),
    )
    for name, dtype in (("float32", torch.float32), ("bf16", BF16))
] + [
    Case(
        "shift_pair",
        head_rows(1),
        lambda g: normal(g, CHANNELS),
        in_place(lambda x, shift, rows: _rows_first(*ops.shift_pair(x[0], C1, C2, shift, MIXES[:1], rows, BF16))),
    )
]


def _rows_first(u: Tensor, d: Tensor, mixed: Tensor) -> tuple[Tensor, ...]:
    return u, d, mixed[0]


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
        _exponent_state,
        _wkv(ops.wkv4, -torch.exp(C3), C4),
        zero_padding=True,
    ),
    *TIME_MIXES,
    *SHIFTS,
]

ROW_CASES = [
    Case("layer_norm", head_rows(1), no_state, rows_only(lambda x: ops.layer_norm(x, C1, C2))),
    Case("layer_norm_bf16", head_rows(1), no_state, rows_only(lambda x: ops.layer_norm(x, C1, C2, 1e-5, BF16))),
]

CASES = SEGMENT_CASES + ROW_CASES


def rows_of(*segments: tuple[int, int]) -> Tensor:
    return torch.tensor(segments, dtype=torch.int32).view(-1, 2)
