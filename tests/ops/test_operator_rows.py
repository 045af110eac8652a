"""Norms, mixes, gates and elementwise functions against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operator_cases import BF16, normal, rows_of
from torch import Tensor

from rwkvmpi import ops
from rwkvmpi.ops import reference

HEADS = {64: 1, 120: 3, 768: 12, 40: 5}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(got: Tensor, want: Tensor, tolerance: float = 2e-6) -> bool:
    """Within the tolerance of the largest value, or within one bfloat16 rounding."""
    if got.dtype == BF16:
        return torch.allclose(got.double(), want, rtol=2**-8, atol=tolerance * float(want.abs().max()))
    return float((got.double() - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("channels", HEADS)
def test_norm_and_mix(channels: int, dtype: torch.dtype, isa: str) -> None:
    g = generator(channels)
    x = normal(g, 50, channels, scale=30.0) + 100.0 * normal(g, 50, 1)
    weight, bias, shift, mixes = (normal(g, *s) for s in [(channels,), (channels,), (2, channels), (5, channels)])
    rows = rows_of((3, 1), (10, 33))
    assert close(ops.layer_norm(x, weight, bias, 1e-5, dtype), reference.layer_norm(x, weight, bias), 1e-5)
    for got, want in zip(
        ops.norm_shift(x, weight, bias, shift, rows), reference.norm_shift(x, weight, bias, shift, rows), strict=True
    ):
        assert close(got, want, 1e-5)
    u, d, delta = normal(g, 50, channels), normal(g, 50, channels), normal(g, 5, 50, channels)
    assert close(ops.mix(u, d, mixes, None, dtype), reference.mix(u, d, mixes))
    assert close(ops.mix(u, d, mixes, delta.to(dtype), dtype), reference.mix(u, d, mixes, delta.to(dtype)))
    got, after = ops.norm_shift_mix(x, weight, bias, shift, mixes, rows, dtype)
    want, want_after = reference.norm_shift_mix(x, weight, bias, shift, mixes, rows)
    assert close(got, want, 1e-5)
    assert close(after, want_after, 1e-5)


def test_layer_norm_of_a_constant_row(isa: str) -> None:
    """Variance 0: eps alone keeps it finite."""
    one, zero = torch.ones(64), torch.zeros(64)
    assert not ops.layer_norm(torch.full([1, 64], 3.0), one, zero).any()
    small = torch.full([1, 64], 1e-3) * torch.arange(64).remainder(2)
    assert close(ops.layer_norm(small, one, zero), reference.layer_norm(small, one, zero), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("channels", HEADS)
def test_v7(channels: int, dtype: torch.dtype, isa: str) -> None:
    g, heads = generator(channels), HEADS[channels]
    k, v, w_lin, a_lin, v_lin = (normal(g, 33, channels, scale=3.0).to(dtype) for _ in range(5))
    k[7] = 0.0  # no direction at all: kk is 0, not NaN
    v_first = normal(g, 33, channels)
    w0, a0, v0, k_k, k_a = (normal(g, channels) for _ in range(5))
    for first in (None, v_first):
        arguments = (k, v, w_lin, a_lin, v_lin if first is not None else None, first, w0, a0, v0, k_k, k_a, heads)
        for got, want in zip(ops.v7_prepare(*arguments), reference.v7_prepare(*arguments), strict=True):
            assert got.dtype == torch.float32
            assert close(got, want)
    y, r, k32, v32 = (normal(g, 33, channels) for _ in range(4))
    r_k, weight, bias = normal(g, heads, channels // heads), normal(g, channels), normal(g, channels)
    tail = (r.to(dtype), k32, v32, w_lin, r_k, weight, bias, 64e-5)
    assert close(ops.v7_output(y, *tail, dtype), reference.v7_output(y, *tail), 5e-6)


@pytest.mark.parametrize("which", range(5))
def test_each_input_may_be_bfloat16_by_itself(which: int, isa: str) -> None:
    g = generator(which)
    lin = [normal(g, 5, 64) for _ in range(5)]
    v_first, *fixed = (normal(g, *s) for s in [(5, 64), *[(64,)] * 5])
    lin[which] = lin[which].to(BF16)
    mixed = ops.v7_prepare(*lin, v_first, *fixed, 2)
    plain = ops.v7_prepare(*[x.float() for x in lin], v_first, *fixed, 2)
    assert all(torch.equal(a, b) for a, b in zip(mixed, plain, strict=True))
    r, gate = (normal(g, 5, 64).to(BF16 if which % 2 == i else torch.float32) for i in range(2))
    tail = (fixed[0].view(2, 32), fixed[1], fixed[2])
    y = v_first
    assert torch.equal(ops.v7_output(y, r, y, y, gate, *tail), ops.v7_output(y, r.float(), y, y, gate.float(), *tail))


def test_group_norm_eps_matters(isa: str) -> None:
    """A head of small values: 64e-5 and 1e-5 differ by far more than the tolerance."""
    y = normal(generator(1), 8, 64, scale=1e-2)
    one, zero = torch.ones(64), torch.zeros(64)
    got = ops.group_norm_gate(y, None, one, zero, 1, 64e-5)
    assert close(got, reference.group_norm_gate(y, None, one, zero, 1, 64e-5))
    assert not close(got, reference.group_norm_gate(y, None, one, zero, 1, 1e-5), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("channels", HEADS)
def test_gates_of_the_older_versions(channels: int, dtype: torch.dtype, isa: str) -> None:
    g, heads = generator(channels), HEADS[channels]
    y, gate = normal(g, 33, channels), normal(g, 33, channels, scale=4.0).to(dtype)
    weight, bias = normal(g, channels), normal(g, channels)
    for some in (gate, None):
        got = ops.group_norm_gate(y, some, weight, bias, heads, 64e-5, dtype)
        assert close(got, reference.group_norm_gate(y, some, weight, bias, heads, 64e-5), 5e-6)
    assert close(ops.sigmoid_mul(gate, y, dtype), reference.sigmoid_mul(gate, y))
    assert close(ops.v6_decay(gate, weight), reference.v6_decay(gate, weight))


def ulps(got: Tensor, want: Tensor) -> float:
    """The largest error in units of the last place, where the true value is a normal number."""
    size = want.abs().float()
    unit = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    error = (got.double() - want).abs() / unit.double()
    return float(error[size >= 2**-126].max())


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_functions_to_two_units_in_the_last_place(name: str, isa: str) -> None:
    exact: Callable[[Tensor], Tensor] = getattr(torch, name)
    x = torch.arange(0, 2**32, 7919, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([x[x.isfinite()], torch.linspace(-87, 20, 400_001)])
    got = getattr(ops, name)(x)
    assert ulps(got, exact(x.double())) <= 2.0
    assert got.abs().max() <= 1.0


def test_exp_to_two_units_in_the_last_place(isa: str) -> None:
    """By itself it shows in WKV-4: from the state 0 at pp = 0, without decay, aa becomes e^k for k below 0."""
    k = torch.linspace(-87.3, 0, 1_000_001)
    _, after = ops.wkv4(k.unsqueeze(0), torch.ones(1, k.numel()), k * 0, k, torch.zeros(3, k.numel()))
    assert ulps(after[0], torch.exp(k.double())) <= 2.0


def test_special_values(isa: str) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 0.0, 1e30, -1e30])
    for dtype in (torch.float32, BF16):
        assert torch.equal(ops.tanh(x.to(dtype))[1:], torch.tensor([1, -1, 0, 1, -1], dtype=dtype))
        assert torch.equal(ops.sigmoid(x.to(dtype))[1:], torch.tensor([1, 0, 0.5, 1, 0], dtype=dtype))
        assert torch.equal(ops.relu_squared(x.to(dtype))[1:4], torch.tensor([inf, 0, 0], dtype=dtype))
        for function in (ops.tanh, ops.sigmoid, ops.relu_squared):
            assert function(x.to(dtype))[0].isnan()
    all_ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaNs that carry when rounded
    assert ops.sigmoid_mul(torch.zeros(2), all_ones, BF16).isnan().all()
    numbers = normal(generator(1), 4096, scale=10.0)
    rounded = ops.relu_squared(numbers.to(BF16))
    assert torch.equal(rounded, torch.relu(numbers.to(BF16).float()).square().to(BF16))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_all_finite_finds_one_bad_value_anywhere(dtype: torch.dtype, isa: str) -> None:
    x = torch.zeros(40_001, dtype=dtype)
    x[5] = torch.finfo(dtype).max
    torch.set_num_threads(2)
    assert ops.all_finite(x)
    for place in (0, 17, 39_999, 40_000):
        for bad in (torch.nan, torch.inf, -torch.inf):
            y = x.clone()
            y[place] = bad
            assert not ops.all_finite(y)
    assert ops.all_finite(x[:0])


def test_fold_rows(isa: str) -> None:
    x = normal(generator(1), 100, 40) * 10.0 ** normal(generator(2), 100, 1, scale=3.0)
    whole, parts, plain = (torch.full([40], 0.1, dtype=torch.float64) for _ in range(3))
    ops.fold_rows(whole, x, 3, 90)
    for first, count in ((3, 1), (4, 0), (4, 50), (54, 39)):
        ops.fold_rows(parts, x, first, count)
    reference.fold_rows(plain, x, 3, 90)
    assert torch.equal(whole, plain)
    assert torch.equal(whole, parts)
