"""The fused time mixes against float64, what they change in place, and that their calls can be recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import BF16, normal, rows_of, uniform
from torch import Tensor

from rwkvmpi import ops
from rwkvmpi.ops import reference

Arguments = list[Any]

# tokens of a chunk, its segments, heads, head size
LAYOUTS = [
    (1, [(0, 1)], 2, 64),
    (31, [(0, 31)], 3, 40),
    (33, [(0, 33)], 2, 32),
    (100, [(3, 1), (10, 33), (43, 50)], 2, 64),
    (3, [(1, 1), (2, 1)], 1, 200),
    (20, [(0, 17)], 3, 8),
]

CHOICES: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "7": ("v7_time_mix", lambda x: x),
    "7 first": ("v7_time_mix", lambda x: [*x[:5], None, x[6], None, *x[8:10], None, *x[11:]]),
    "6": ("v6_time_mix", lambda x: x),
    "6 ungated": ("v6_time_mix", lambda x: [*x[:6], None, *x[7:]]),
    "5": ("v5_time_mix", lambda x: x),
    "4": ("v4_time_mix", lambda x: x),
}
every_choice = pytest.mark.parametrize("choice", CHOICES)


def arguments(choice: str, tokens: int, segments: list[tuple[int, int]], heads: int, size: int) -> Arguments:
    """All of the operator's up to rows; decays reach from all to nothing within a token."""
    g = torch.Generator().manual_seed(1000 * tokens + size)
    count, channels = len(segments), heads * size
    products = [normal(g, tokens, channels, scale=2.0) for _ in range(8)]
    vectors = [normal(g, channels) for _ in range(7)]
    per_head, state = normal(g, heads, size), normal(g, count, heads, size, size)
    products[3][::2, ::3], products[3][1::2, ::3] = 60.0, -60.0
    name, choose = CHOICES[choice]
    if name == "v7_time_mix":
        products[1][::5] = 0.0  # a key without direction: kk is 0, not NaN
        own = [*products, *vectors[:5], per_head, *vectors[5:], state]
    elif name == "v6_time_mix":
        own = [*products[:4], vectors[0], per_head, products[4], *vectors[1:3], state]
    elif name == "v5_time_mix":
        own = [*products[:3], uniform(g, heads, size), per_head, products[4], *vectors[1:3], state]
    else:
        exponents = [normal(g, count, channels), uniform(g, count, channels, low=0.5), normal(g, count, channels)]
        own = [products[0], 5 * products[1], products[2], -torch.exp(vectors[0]), vectors[1], torch.stack(exponents, 1)]
    return [*choose(own), rows_of(*segments)]


def copies(x: Arguments) -> Arguments:
    return [None if y is None else y.clone() for y in x]


def listed(x: Any) -> list[Tensor | None]:
    return list(x) if isinstance(x, tuple) else [x]


def close(got: Tensor, want: Tensor) -> bool:
    largest = float(want.abs().max())
    if got.dtype == BF16:
        return torch.allclose(got.double(), want, rtol=2**-8, atol=1e-5 * largest)
    return float((got.double() - want).abs().max()) <= 1e-5 * largest


@every_choice
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}x{layout[3]}")
def test_against_float64(choice: str, layout: tuple[int, list[tuple[int, int]], int, int], isa: str) -> None:
    name, _ = CHOICES[choice]
    given = arguments(choice, *layout)
    *want, want_state = listed(getattr(reference, name)(*given))
    for dtype in (torch.float32, BF16):
        x = copies(given)
        got = listed(getattr(ops, name)(*x, out_dtype=dtype))
        assert got[0].dtype == dtype
        for a, b in zip(got, want, strict=True):
            assert (a is None and b is None) or close(a, b)
        assert close(x[-2], want_state)
        x[-2] = given[-2]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(x, given, strict=True)), "an input was changed"


@every_choice
def test_filling_given_outputs_and_recording(choice: str, isa: str) -> None:
    """`_into` and its recorded call do what the operator does; the state may be another one at every run."""
    name, _ = CHOICES[choice]
    first, second = copies(arguments(choice, *LAYOUTS[3])), arguments(choice, *LAYOUTS[3])
    other = second[-2].flip(0).contiguous()
    want = [listed(getattr(ops, name)(*first)) for _ in range(2)]
    want_other_state = other.clone()
    want_other = listed(getattr(ops, name)(*first[:-2], want_other_state, first[-1]))
    out = [None if x is None else torch.full_like(x, torch.nan) for x in want[0]]

    def body() -> None:
        getattr(ops, f"{name}_into")(tuple(out) if len(out) > 1 else out[0], *second)

    def same(wanted: list[Tensor | None]) -> bool:
        return all(a is b is None or torch.equal(a, b) for a, b in zip(out, wanted, strict=True))

    program = ops.Program(body, [second[-2]])
    assert same(want[0])
    program.run()
    assert same(want[1])
    assert torch.equal(second[-2], first[-2])
    program.rebind([other])
    program.run()
    assert same(want_other)
    assert torch.equal(other, want_other_state)
    assert torch.equal(second[-2], first[-2])


def test_group_norm_eps_matters(isa: str) -> None:
    """A head of small values: 64e-5 and 1e-5 differ by far more than the tolerance."""
    x = arguments("5", *LAYOUTS[1])
    x[2], x[-2] = x[2] * 1e-3, x[-2] * 1e-3
    wide, narrow = (reference.v5_time_mix(*x, eps)[0] for eps in (64e-5, 1e-5))
    got = ops.v5_time_mix(*copies(x), 1e-5)
    assert close(got, narrow)
    assert not torch.allclose(got.double(), wide, rtol=0.1)


def test_no_rows_and_no_segments(isa: str, poisoned: None) -> None:
    for choice, (name, _) in CHOICES.items():
        x = copies(arguments(choice, *LAYOUTS[1]))
        x[-2], x[-1] = x[-2][:0], rows_of()
        for out in listed(getattr(ops, name)(*x)):
            assert out is None or not out.any(), choice
