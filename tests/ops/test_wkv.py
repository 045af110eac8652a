"""The recurrences against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import normal, rows_of, uniform, wkv7_inputs
from torch import Tensor

from rwkvmpi import ops
from rwkvmpi.ops import reference

SHAPES = [(1, 64), (31, 64), (32, 32), (33, 8), (100, 40), (1024, 64)]


def close(got: Tensor, want: Tensor, tolerance: float = 3e-6) -> bool:
    """Within the tolerance of the largest value."""
    assert got.dtype == torch.float32
    assert torch.isfinite(want).all()
    return float((got.double() - want).abs().max()) <= tolerance * float(want.abs().max())


def agree(
    function: Callable[..., tuple[Tensor, Tensor]], plain: Callable[..., tuple[Tensor, Tensor]], *x: Tensor
) -> None:
    before = [tensor.clone() for tensor in x]
    (y, after), (want_y, want_after) = function(*x), plain(*x)
    assert close(y, want_y)
    assert close(after, want_after)
    assert all(torch.equal(tensor, old) for tensor, old in zip(x, before, strict=True)), "an argument was changed"


@pytest.mark.parametrize(("tokens", "size"), SHAPES)
def test_wkv7(tokens: int, size: int, isa: str) -> None:
    g = torch.Generator().manual_seed(tokens)
    x = wkv7_inputs(tokens, g, 2, size)
    agree(ops.wkv7, reference.wkv7, *x, normal(g, 2, size, size))


@pytest.mark.parametrize("decay", [0.5452, 1.0])
def test_wkv7_at_the_bounds_of_its_decay(decay: float, isa: str) -> None:
    x = wkv7_inputs(1024, torch.Generator().manual_seed(1), 1, 64)
    x[1].fill_(decay)
    agree(ops.wkv7, reference.wkv7, *x, torch.zeros(1, 64, 64))


@pytest.mark.parametrize(("tokens", "size"), SHAPES)
def test_wkv6_and_5(tokens: int, size: int, isa: str) -> None:
    g = torch.Generator().manual_seed(tokens)
    r, k, v = (normal(g, tokens, 2, size) for _ in range(3))
    u, state = normal(g, 2, size), normal(g, 2, size, size)
    w = uniform(g, tokens, 2, size)
    w[::3, :, ::2] = 0.0  # forgets at once
    w[1::3, :, ::2] = 1e-30
    w[2::3, :, ::2] = 1 - 2**-24  # never forgets
    agree(ops.wkv6, reference.wkv6, r, w, k, v, u, state)
    agree(ops.wkv5, reference.wkv5, r, w[0].contiguous(), k, v, u, state)


@pytest.mark.parametrize(("tokens", "channels"), [(1, 64), (33, 768), (100, 40), (1024, 7)])
def test_wkv4(tokens: int, channels: int, isa: str) -> None:
    g = torch.Generator().manual_seed(tokens)
    k, v = normal(g, tokens, channels, scale=5.0), normal(g, tokens, channels)
    k[:, ::5] *= 1e4  # e^k overflows and underflows
    w, u = -torch.exp(normal(g, channels, scale=4.0)), normal(g, channels, scale=3.0)
    start = torch.zeros(3, channels)
    start[2] = -1e30
    (y, after), (want_y, want_after) = ops.wkv4(k, v, w, u, start), reference.wkv4(k, v, w, u, start)
    assert close(y, want_y, 1e-5)
    assert close(after[2], want_after[2], 1e-4)
    # aa and bb at the exact pp; not in the channels where u + k and pp + w are themselves rounded to 1e-3
    sums = after[:2].double() * torch.exp(after[2].double() - want_after[2])
    sums[:, ::5] = want_after[:2, ::5]
    assert close(sums.float(), want_after[:2], 1e-5)


def test_wkv4_does_not_drift(isa: str) -> None:
    """A slow decay: the rounding of pp + w, always to the same side, must not add up over thousands of tokens."""
    g = torch.Generator().manual_seed(1)
    k, v = normal(g, 4096, 8, scale=2.0), normal(g, 4096, 8)
    start = torch.zeros(3, 8)
    start[2] = -1e30
    arguments = (k, v, torch.full([8], -1e-4), torch.zeros(8), start)
    assert close(ops.wkv4(*arguments)[0], reference.wkv4(*arguments)[0], 8e-6)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_segments(data: st.DataObject) -> None:
    """Lengths, gaps and states at random: every document as if alone, every other row 0."""
    segments, end = [], 0
    for _ in range(data.draw(st.integers(1, 5))):
        first = end + data.draw(st.integers(0, 33))
        count = data.draw(st.integers(1, 40))
        segments.append((first, count))
        end = first + count
    total = end + data.draw(st.integers(0, 20))
    g = torch.Generator().manual_seed(total)
    x, states, rows = wkv7_inputs(total, g, 2, 8), normal(g, len(segments), 2, 8, 8), rows_of(*segments)
    y, after = ops.wkv7(*x, states, rows)
    want_y, want_after = reference.wkv7(*x, states, rows)
    assert close(y, want_y)
    assert close(after, want_after)
    assert not y[want_y.abs().sum((1, 2)) == 0].any()


def test_no_rows_and_no_segments(isa: str) -> None:
    none = torch.zeros(0, 2, 8)
    y, after = ops.wkv7(*[none] * 6, torch.ones(2, 8, 8))
    assert y.shape == (0, 2, 8)
    assert torch.equal(after, torch.ones(2, 8, 8))
    y, after = ops.wkv7(*[torch.ones(32, 2, 8)] * 6, torch.ones(0, 2, 8, 8), rows_of())
    assert not y.any()
    assert after.shape == (0, 2, 8, 8)
