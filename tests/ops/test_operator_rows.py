"""Norms, token shift, embedding and small reductions against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operator_cases import BF16, normal, rows_of, uniform
from torch import Tensor

from rwkvmpi import ops
from rwkvmpi.ops import reference


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    """Within the tolerance of the largest value, or within one bfloat16 rounding."""
    if got.dtype == BF16:
        return torch.allclose(got.double(), want, rtol=2**-8, atol=tolerance * float(want.abs().max()))
    return float((got.double() - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("channels", [64, 120, 768, 40, 7])
def test_norm_and_shift(channels: int, dtype: torch.dtype, isa: str) -> None:
    g = generator(channels)
    x = normal(g, 50, channels, scale=30.0) + 100.0 * normal(g, 50, 1)
    weight, bias, mixes = normal(g, channels), normal(g, channels), normal(g, 5, channels)
    rows = rows_of((3, 1), (10, 33))
    assert close(ops.layer_norm(x, weight, bias, 1e-5, dtype), reference.layer_norm(x, weight, bias))
    state = normal(g, 2, 2, channels)
    *want, want_shift = reference.shift_pair(x, weight, bias, state[:, 1], mixes, rows)
    for function, expected in ((ops.shift_pair, want), (ops.shift_mix, want[2:])):
        after = state.clone()
        got = function(x, weight, bias, after[:, 1], mixes, rows, dtype)
        assert all(close(a, b) for a, b in zip(got if isinstance(got, tuple) else [got], expected, strict=True))
        assert close(after[:, 1], want_shift)
        assert torch.equal(after[:, 0], state[:, 0]), "a neighbour of the shift rows was changed"


@pytest.mark.parametrize("parts", [[(0, 100)], [(0, 40), (40, 35), (75, 25)], [(5, 1), (33, 60)]])
def test_shift_rows_while_segments_cross_threads(parts: list[tuple[int, int]], isa: str) -> None:
    """The thread with a segment's last row must not exchange the shift row before its first row has been read."""
    g = generator(3)
    x, weight, bias, mixes = normal(g, 100, 64), normal(g, 64), normal(g, 64), normal(g, 1, 64)
    rows, start = rows_of(*parts), normal(g, len(parts), 64)
    one = start.clone()
    want = ops.shift_mix(x, weight, bias, one, mixes, rows)
    for threads in (2, 3, 6):
        torch.set_num_threads(threads)
        for _ in range(20):
            after = start.clone()
            assert torch.equal(ops.shift_mix(x, weight, bias, after, mixes, rows), want)
            assert torch.equal(after, one)


def test_layer_norm_of_a_constant_row(isa: str) -> None:
    """Variance 0: eps alone keeps it finite."""
    one, zero = torch.ones(64), torch.zeros(64)
    assert not ops.layer_norm(torch.full([1, 64], 3.0), one, zero).any()
    small = torch.full([1, 64], 1e-3) * torch.arange(64).remainder(2)
    assert close(ops.layer_norm(small, one, zero), reference.layer_norm(small, one, zero))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("tokens_dtype", [torch.int32, torch.int64])
def test_embed(dtype: torch.dtype, tokens_dtype: torch.dtype, isa: str) -> None:
    """Of a table that lies as in a file, at any byte; float16's numbers below the normal ones too."""
    g = generator(1)
    values = (normal(g, 50, 40) * torch.exp2(uniform(g, 50, 40, low=-22.0, high=10.0))).to(dtype)
    memory = torch.zeros(values.numel() * dtype.itemsize + 8, dtype=torch.uint8)
    table = memory[dtype.itemsize :][: values.numel() * dtype.itemsize].view(dtype).view(50, 40).copy_(values)
    tokens = torch.randint(0, 50, (70,), generator=g).to(tokens_dtype)
    weight, bias = normal(g, 40), normal(g, 40)
    assert torch.equal(ops.embed(tokens, table), values[tokens.long()].float())
    want = ops.embed(tokens, table, weight, bias)
    assert torch.equal(want, ops.layer_norm(values[tokens.long()].float(), weight, bias))
    assert close(want, reference.embed(tokens, values, weight, bias))
    torch.set_num_threads(3)
    assert torch.equal(ops.embed(tokens, table, weight, bias), want)


def test_tokens_outside_the_vocabulary(isa: str) -> None:
    table, tokens = torch.ones(10, 8), torch.tensor([0, -1, 10, 9, 2**62])
    for bad in (-1, 10, 2**62):
        with pytest.raises(ValueError, match=r"embed: tokens must be 0 to 9, but they are .*" + str(bad)):
            ops.embed(torch.tensor([3, bad, 5]), table)
    x = torch.full([5, 8], torch.nan)
    ops.embed_into(x, tokens, table, None, None)
    assert x[:, 0].tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_filling_given_outputs_and_recording(isa: str) -> None:
    """What stands around the time mixes in a recorded step, with other tokens at the second run."""
    g = generator(5)
    table, weight, bias, mixes = normal(g, 10, 24), normal(g, 24), normal(g, 24), normal(g, 2, 24)
    tokens, rows, shift = torch.tensor([4, 2]), rows_of((0, 1), (1, 1)), normal(g, 2, 2, 24)
    x, u, d, mixed, pair, normed = (torch.empty(*s) for s in [*[(2, 24)] * 3, *[(2, 2, 24)] * 2, (2, 24)])
    other = shift.clone()

    def body() -> None:
        ops.embed_into(x, tokens, table, weight, bias)
        ops.shift_mix_into(mixed, x, weight, bias, shift[:, 1], mixes, rows)
        ops.shift_pair_into((u, d, pair), x, weight, bias, shift[:, 0], mixes, rows)
        ops.layer_norm_into(normed, x, weight, bias)

    def same() -> bool:
        want_x = ops.embed(tokens, table, weight, bias)
        want_mixed = ops.shift_mix(want_x, weight, bias, other[:, 1], mixes, rows)
        want_pair = ops.shift_pair(want_x, weight, bias, other[:, 0], mixes, rows)
        want = [want_x, want_mixed, *want_pair, ops.layer_norm(want_x, weight, bias), other]
        return all(torch.equal(a, b) for a, b in zip([x, mixed, u, d, pair, normed, shift], want, strict=True))

    program = ops.Program(body, [shift])
    assert same()
    tokens.copy_(torch.tensor([7, 9]))
    program.run()
    assert same()


def ulps(got: Tensor, want: Tensor) -> float:
    """The largest error in units of the last place, where the true value is a normal number."""
    size = want.abs().float()
    unit = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    error = (got.double() - want).abs() / unit.double()
    return float(error[size >= 2**-126].max())


def behind_a_product(op: str, x: Tensor) -> Tensor:
    """The function of every x: products of 1 and x."""
    return ops.product(torch.ones(1, 1), ops.pack(x.view(-1, 1), "float32"), op).view(-1)


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_functions_to_two_units_in_the_last_place(name: str, isa: str) -> None:
    exact: Callable[[Tensor], Tensor] = getattr(torch, name)
    x = torch.arange(0, 2**32, 7919, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([x[x.isfinite()], torch.linspace(-87, 20, 400_001)])
    got = behind_a_product(name, x)
    assert ulps(got, exact(x.double())) <= 2.0
    assert got.abs().max() <= 1.0


def test_exp_to_two_units_in_the_last_place(isa: str) -> None:
    """By itself it shows in WKV-4: from the state 0 at pp = 0, without decay, aa becomes e^k for k below 0."""
    k = torch.linspace(-87.3, 0, 1_000_001)
    _, after = ops.wkv4(k.unsqueeze(0), torch.ones(1, k.numel()), k * 0, k, torch.zeros(3, k.numel()))
    assert ulps(after[0], torch.exp(k.double())) <= 2.0


def test_special_values(isa: str) -> None:
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([nan, inf, -inf, 0.0, 1e30, -1e30])
    for op, want in (
        ("tanh", [1, -1, 0, 1, -1]),
        ("sigmoid", [1, 0, 0.5, 1, 0]),
        ("relu_squared", [inf, 0, 0, inf, 0]),
    ):
        got = behind_a_product(op, x)
        assert got[1:].tolist() == want, op
        assert got[0].isnan(), op
    numbers = normal(generator(1), 4096, scale=10.0)
    one, zero = torch.ones(4096), torch.zeros(4096)
    exact = ops.layer_norm(numbers.unsqueeze(0), one, zero)
    rounded = ops.layer_norm(numbers.unsqueeze(0), one, zero, 1e-5, BF16)
    assert torch.equal(rounded, exact.to(BF16))
    all_ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaNs that carry when rounded
    assert ops.layer_norm(all_ones.view(2, 1), one[:1], zero[:1], 1e-5, BF16).isnan().all()


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
