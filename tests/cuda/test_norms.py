"""Layer norm, embedding and token shift on emulated CUDA: against float64, and the laws of equal bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops import reference
from rwkvmpi.ops.cuda import norms
from rwkvmpi.ops.cuda.library import CudaError

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
CHANNELS = [8, 40, 64, 192, 768, 1000, 12]  # 12: no whole vectors
LONG = [4104, 8200, 4099]  # two vectors to a thread; beyond the registers; beyond them in single channels


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors(channels: int) -> tuple[Tensor, Tensor]:
    return 1 + normal(1, channels) / 4, normal(2, channels)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within the rounding of the output and float32's own errors."""
    bound = ROUNDING[dtype] * want.abs() + 4e-6 * want.abs().mean().clamp_min(1.0)
    assert ((got.double() - want).abs() <= bound).all(), (got.double() - want).abs().max()


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_layer_norm(channels: int, dtype: torch.dtype) -> None:
    for rows in (1, 31, 33):
        x = normal(3, rows, channels) * 3 + 100 * normal(4, rows, 1)  # the mean weighs more than what is around it
        out = poisoned(rows, channels, dtype=dtype)
        norms.layer_norm_into(out, x, *vectors(channels))
        want = reference.layer_norm(x, *vectors(channels))
        assert ((out.double() - want).abs() <= ROUNDING[dtype] * want.abs() + 1e-4).all()
        norms.layer_norm_into(out, x - x.mean(1, keepdim=True), *vectors(channels))
        assert_near(out, reference.layer_norm(x - x.mean(1, keepdim=True), *vectors(channels)), dtype)


@pytest.mark.parametrize("channels", LONG)
def test_long_rows(channels: int) -> None:
    x, mixes, shift = normal(3, 4, channels), normal(5, 2, channels), normal(6, 2, channels)
    out = poisoned(4, channels)
    norms.layer_norm_into(out, x, *vectors(channels))
    assert_near(out, reference.layer_norm(x, *vectors(channels)))
    rows = torch.tensor([[0, 3], [3, 1]], dtype=torch.int32)
    want = reference.shift_pair(x, *vectors(channels), shift, mixes, rows)
    u, d, mixed = poisoned(4, channels), poisoned(4, channels), poisoned(2, 4, channels)
    norms.shift_pair_into((u, d, mixed), x, *vectors(channels), shift, mixes, rows)
    for got, expected in zip((u, d, mixed, shift), want, strict=True):
        assert_near(got, expected)


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("channels", [40, 12, 768])
def test_embed(channels: int, table_dtype: torch.dtype) -> None:
    table, weights = normal(3, 11, channels).to(table_dtype), vectors(channels)
    for tokens in (torch.tensor([10, 0, 3, 3, 7]), torch.tensor([5], dtype=torch.int32)):
        x = poisoned(len(tokens), channels)
        norms.embed_into(x, tokens, table, None, None)
        assert same(x, table[tokens.long()].float())
        norms.embed_into(x, tokens, table, *weights)
        assert_near(x, reference.embed(tokens, table, *weights))


def test_tokens_outside_the_vocabulary_give_zeros() -> None:
    for dtype in (torch.int32, torch.int64):
        x = poisoned(4, 40)
        norms.embed_into(x, torch.tensor([-1, 11, 2, 2**31 - 1], dtype=dtype), normal(3, 11, 40), *vectors(40))
        assert not x[[0, 1, 3]].any()
        assert x[2].all()


SEGMENTS = [  # of a chunk of 33 rows; those not within it, and those without rows, are none
    [(0, 33)],
    [(0, 1), (1, 1), (2, 30), (32, 1)],
    [(3, 0), (2, 7), (0, 0), (12, 16), (30, 3)],
    [(5, 4), (-1, 3), (20, 14), (9, 5), (0, -2)],
    [],
]


def valid(segments: list[tuple[int, int]], total: int) -> list[int]:
    return [s for s, (first, count) in enumerate(segments) if count > 0 and first >= 0 and first + count <= total]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_shift_pair(channels: int, dtype: torch.dtype, orders: Callable[[Callable[[], None]], None]) -> None:
    for segments in SEGMENTS[:: 1 if channels < 100 else 2]:
        orders(partial(check_shift_pair, segments, channels, dtype))


def check_shift_pair(segments: list[tuple[int, int]], channels: int, dtype: torch.dtype) -> None:
    x, mixes, shifts = normal(3, 33, channels), normal(5, 3, channels), normal(6, len(segments), 2, channels)
    shift, before = shifts[:, 1], shifts.clone()  # rows lie apart, in a larger state
    rows, real = torch.tensor(segments, dtype=torch.int32).view(-1, 2), valid(segments, 33)
    u, d = poisoned(33, channels), poisoned(33, channels)
    mixed = poisoned(3, 33, channels, dtype=dtype)
    norms.shift_pair_into((u, d, mixed), x, *vectors(channels), shift, mixes, rows)
    want = reference.shift_pair(x, *vectors(channels), before[real, 1], mixes, rows[real])
    for got, expected in zip((u, d, mixed, shift[real]), want, strict=True):
        assert_near(got, expected, got.dtype)
    others = [s for s in range(len(segments)) if s not in real]
    assert same(shift[others], before[others, 1])
    assert same(shifts[:, 0], before[:, 0])
    again, shifts = poisoned(3, 33, channels, dtype=dtype), before.clone()
    norms.shift_mix_into(again, x, *vectors(channels), shifts[:, 1], mixes, rows)
    assert same(again, mixed)


@pytest.mark.parametrize("total", [40, 700])  # a block takes one row, or four
def test_place_and_neighbours_and_cuts(total: int) -> None:
    channels = 40
    weights, mixes, document, shift = vectors(channels), normal(5, 2, channels), normal(3, 39, channels), normal(6, 40)

    def alone(x: Tensor, state: Tensor) -> Tensor:
        mixed, rows = poisoned(2, len(x), channels), torch.tensor([[0, len(x)]], dtype=torch.int32)
        norms.shift_mix_into(mixed, x, *weights, state.unsqueeze(0), mixes, rows)
        return mixed

    state = shift.clone()
    want = alone(document, state)
    for cut in (1, 32, 38):
        other = shift.clone()
        assert same(torch.cat([alone(document[:cut], other), alone(document[cut:], other)], 1), want)
        assert same(other, state)
    for place in {0, 1, total - 39}:
        chunk, states = normal(7, total, channels) * 1e3, torch.stack([shift * 5, shift, shift * 7])
        chunk[:place] = torch.nan
        chunk[place : place + 39] = document
        rows = torch.tensor([[0, 0], [place, 39], [total, 1]], dtype=torch.int32)
        mixed = poisoned(2, total, channels)
        norms.shift_mix_into(mixed, chunk, *weights, states, mixes, rows)
        assert same(mixed[:, place : place + 39], want)
        assert same(states[1], state)


def test_no_rows_and_wrong_arguments() -> None:
    weights = vectors(40)
    norms.layer_norm_into(torch.empty(0, 40), torch.empty(0, 40), *weights)
    nothing, none = torch.empty(0, 40), torch.empty(0, 2, dtype=torch.int32)
    norms.shift_mix_into(torch.empty(2, 0, 40), nothing, *weights, nothing, normal(1, 2, 40), none)
    with pytest.raises(CudaError, match="boundary"):
        norms.layer_norm_into(torch.empty(2, 40), torch.empty(81)[1:].view(2, 40), *weights)
    with pytest.raises(CudaError, match="overlap"):
        norms.shift_mix_into(
            *(torch.empty(1, 3, 40), normal(3, 3, 40), *weights, torch.empty(2, 40).as_strided((2, 40), (20, 1))),
            *(normal(1, 1, 40), torch.tensor([[0, 1], [1, 1]], dtype=torch.int32)),
        )
