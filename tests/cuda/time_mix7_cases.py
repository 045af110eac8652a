"""RWKV-7 time mixes with random inputs, of any head size and dtype, for the tests of the sequential bodies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rwkvmpi.ops import reference
from rwkvmpi.ops.cuda import library

SIZES = [5, 8, 32, 40, 64, 96, 128, 192]
EPS = 64e-5

_mix = library.bind("v7_time_mix", "p" * 21 + "lllllfii")
_step = library.bind("v7_step", "p" * 19 + "lllfii")


def rows_of(*segments: tuple[int, int]) -> Tensor:
    return torch.tensor(segments, dtype=torch.int32).view(-1, 2)


def largest_error(got: Tensor, want: Tensor, rounding: float = 0.0) -> float:
    """Beyond a relative rounding of each element, relative to the root of the mean square of all."""
    error = (got.double() - want).abs() - rounding * want.abs()
    return float(error.max() / want.square().mean().sqrt().clamp_min(1e-30))


def equal(one: tuple[Tensor | None, ...], other: tuple[Tensor | None, ...]) -> bool:
    """The same bits, NaN included."""
    pairs = list(zip(one, other, strict=True))
    return all(
        x is y or torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) for x, y in pairs
    )


@dataclass
class Mix:
    """r, k, v, w_lin, a_lin, v_lin, g, v_first [T, C]; w0, a0, v0, k_k, k_a, r_k, ln_weight, ln_bias; states."""

    tokens: list[Tensor | None]
    vectors: list[Tensor | None]
    state: Tensor
    rows: Tensor

    def outputs(self) -> tuple[Tensor, Tensor | None]:
        r = self.tokens[0]
        return torch.full_like(r, torch.nan), torch.full_like(r, torch.nan) if self.tokens[7] is None else None

    def run(self, body: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """h, v_out (None in later layers), the states after; what is written starts as NaN."""
        h, v_out = self.outputs()
        state = self.state.clone()
        sizes = (h.shape[0], *state.shape[1:3], len(self.rows), 0)
        number = library.DTYPES[h.dtype]
        _mix(*self.tokens, *self.vectors, state, self.rows, h, v_out, None, *sizes, EPS, body, number)
        return h, v_out, state

    def step(self, state_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None, Tensor]:
        """Every token is the next one of its own state."""
        h, v_out = self.outputs()
        state = self.state.to(state_dtype, copy=True)
        numbers = (library.DTYPES[state_dtype], library.DTYPES[h.dtype])
        _step(*self.tokens, *self.vectors, state, h, v_out, *state.shape[:3], EPS, *numbers)
        return h, v_out, state

    def part(self, first: int, count: int, state: Tensor) -> Mix:
        """Some rows as a chunk of their own, one segment."""
        tokens = [None if x is None else x[first : first + count].contiguous() for x in self.tokens]
        return replace(self, tokens=tokens, state=state, rows=rows_of((0, count)))

    def reference(self) -> tuple[Tensor, Tensor | None, Tensor]:
        return reference.v7_time_mix(*self.tokens, *self.vectors, self.state, self.rows, EPS)


def mix_of(
    rows: Tensor,
    total: int,
    heads: int = 1,
    size: int = 64,
    dtype: torch.dtype = torch.float32,
    first_layer: bool = False,
    seed: int = 0,
) -> Mix:
    g = torch.Generator().manual_seed(1000 * seed + size)
    channels = heads * size
    tokens: list[Tensor | None] = [torch.randn(total, channels, generator=g).to(dtype) for _ in range(8)]
    vectors: list[Tensor | None] = [torch.randn(channels, generator=g) for _ in range(8)]
    vectors[5] = vectors[5].view(heads, size)
    if first_layer:
        tokens[5] = tokens[7] = vectors[2] = None
    return Mix(tokens, vectors, torch.randn(len(rows), heads, size, size, generator=g), rows)
