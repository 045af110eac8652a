"""The CUDA kernels of WKV-4 and of its time mix, emulated on the host, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops import reference
from rwkvmpi.ops.cuda import library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of an output, relative

_wkv4 = library.bind("wkv4", "p" * 8 + "llli")
_time_mix = library.bind("v4_time_mix", "p" * 8 + "llli")


pytestmark = pytest.mark.usefixtures("kernels")


def normal(g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=g) * scale


def rows_of(*segments: tuple[int, int]) -> Tensor:
    return torch.tensor(segments, dtype=torch.int32).view(-1, 2)


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    """Within the rounding of the output, and the tolerance at the scale of all of them."""
    error = (got.double() - want).abs()
    return bool((error <= 1.01 * ROUNDING[got.dtype] * want.abs() + tolerance * want.square().mean().sqrt()).all())


def same_state(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    """aa and bb at the exact pp, which itself is rounded; bb is the sum of the weights in aa, and so its scale."""
    got = got.double()
    sums, pp = got[:, :2] * torch.exp(got[:, 2:] - want[:, 2:]), got[:, 2]
    sums_close = (sums - want[:, :2]).abs() <= tolerance * want[:, 1:2].clamp_min(1.0)
    pp_close = (pp - want[:, 2]).abs() <= tolerance * want[:, 2].abs().clamp_min(1.0)
    return bool(sums_close.all() and pp_close.all())


class Inputs:
    def __init__(self, tokens: int, channels: int, dtype: torch.dtype, segments: int, scale: float = 3.0) -> None:
        g = torch.Generator().manual_seed(tokens)
        self.r, self.v = (normal(g, tokens, channels).to(dtype) for _ in range(2))
        self.k = normal(g, tokens, channels, scale=scale).to(dtype)
        self.w, self.u = -torch.exp(normal(g, channels, scale=3.0) - 2.0), normal(g, channels, scale=2.0)
        begun = torch.stack([normal(g, channels), torch.rand(channels, generator=g) + 0.5, normal(g, channels)])
        fresh = torch.zeros(3, channels)
        fresh[2] = -1e30
        self.state = torch.stack([begun if i % 2 == 0 else fresh for i in range(segments)])
        self.dtype = dtype


def wkv4(x: Inputs, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    y, after = poison(*x.k.shape, dtype=x.dtype), poison(*x.state.shape)
    segments = 1 if rows is None else rows.shape[0]
    _wkv4(x.k, x.v, x.w, x.u, x.state, after, rows, y, *x.k.shape, segments, library.DTYPES[x.dtype])
    return y, after


def time_mix(x: Inputs, state: Tensor, rows: Tensor, first: int = 0) -> Tensor:
    r, k, v = (t[first:].contiguous() for t in (x.r, x.k, x.v))
    h = poison(*r.shape, dtype=x.dtype)
    _time_mix(r, k, v, x.w, x.u, state, rows, h, *r.shape, rows.shape[0], library.DTYPES[x.dtype])
    return h


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [7, 128, 200])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100])
def test_wkv4(length: int, channels: int, dtype: torch.dtype) -> None:
    x = Inputs(length, channels, dtype, 1)
    y, after = wkv4(x, None)
    want_y, want_state = reference.wkv4(x.k, x.v, x.w, x.u, x.state[0])
    assert close(y, want_y)
    assert same_state(after, want_state.unsqueeze(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_time_mix_of_several_documents(dtype: torch.dtype) -> None:
    rows = rows_of((3, 17), (20, 1), (22, 0), (25, 33), (58, 8))
    x = Inputs(70, 150, dtype, 5)
    want_h, want_state = reference.v4_time_mix(x.r, x.k, x.v, x.w, x.u, x.state, rows)
    state = x.state.clone()
    h = time_mix(x, state, rows)
    assert close(h, want_h)
    assert same_state(state, want_state)
    assert torch.equal(state[2], x.state[2])
    outside = torch.ones(70, dtype=torch.bool)
    for first, count in rows.tolist():
        outside[first : first + count] = False
    assert not h[outside].any()
    assert h[~outside].all()


@pytest.mark.parametrize("k", [-60.0, 60.0, 0.0])
@pytest.mark.parametrize("w", [-1e-7, -1e-3, -1.0, -50.0])
def test_extremes(w: float, k: float) -> None:
    x = Inputs(40, 32, torch.float32, 1)
    x.w.fill_(w)
    x.k[:, ::2] = k
    x.k[::3, 1::2] = k
    x.k[1::3, 1::2] = -k
    y, after = wkv4(x, None)
    want_y, want_state = reference.wkv4(x.k, x.v, x.w, x.u, x.state[0])
    assert torch.isfinite(y).all()
    assert close(y, want_y)
    assert same_state(after, want_state.unsqueeze(0))


@pytest.mark.parametrize("constant", [True, False])
def test_it_does_not_drift(constant: bool) -> None:
    """Slow decays over many tokens: no rounding may add up, neither pp + w's nor, with equal keys, the shares'."""
    x = Inputs(2000, 8, torch.float32, 2)
    x.state = x.state[1:].clone()
    x.w[:] = -torch.logspace(-5, -2, 8)
    if constant:
        x.k.fill_(0.3)
    y, after = wkv4(x, None)
    want_y, want_state = reference.wkv4(x.k, x.v, x.w, x.u, x.state[0])
    assert close(y, want_y, 3e-5)
    assert same_state(after, want_state.unsqueeze(0), 1e-4)


def test_segments_that_are_none() -> None:
    rows = rows_of((0, 0), (2, 5), (0, -3), (-1, 3), (7, 4), (10, 2**31 - 1))
    x = Inputs(10, 40, torch.bfloat16, len(rows))
    state = x.state.clone()
    h = time_mix(x, state, rows)
    alone = x.state[1:2].clone()
    assert torch.equal(time_mix(x, alone, rows[1:2].contiguous()), h)
    assert torch.equal(state[1], alone[0])
    others = [0, 2, 3, 4, 5]
    assert torch.equal(state[others], x.state[others])
    assert not h[:2].any()
    assert not h[7:].any()
    assert not time_mix(x, x.state[:0], rows_of()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_chunk_or_the_order_of_threads(
    dtype: torch.dtype, orders: Callable[[Callable[[], None]], None]
) -> None:
    x = Inputs(100, 136, dtype, 3)
    whole_state = x.state[:1].clone()
    whole = time_mix(x, whole_state, rows_of((0, 100)))

    def run() -> None:
        state, pieces = x.state[:1].clone(), []
        for first, count in ((0, 32), (32, 64), (96, 4)):
            pieces.append(time_mix(x, state, rows_of((0, count)), first=first)[:count])
        assert torch.equal(torch.cat(pieces), whole)
        assert torch.equal(state, whole_state)
        moved = Inputs(100, 136, dtype, 3)
        for name in ("r", "k", "v"):
            setattr(moved, name, torch.cat([getattr(x, name)[50:57], getattr(x, name), getattr(x, name)[:2]]))
        states = x.state[[1, 0, 2]].contiguous()
        assert torch.equal(time_mix(moved, states, rows_of((0, 7), (7, 100), (107, 2)))[7:107], whole)
        assert torch.equal(states[1], whole_state[0])

    orders(run)


def test_one_token_of_each_of_many_states() -> None:
    x = Inputs(9, 136, torch.float16, 9)
    rows = rows_of(*((i, 1) for i in range(9)))
    want_h, want_state = reference.v4_time_mix(x.r, x.k, x.v, x.w, x.u, x.state, rows)
    assert close(time_mix(x, x.state, rows), want_h)
    assert same_state(x.state, want_state)


def test_refusals() -> None:
    x = Inputs(4, 8, torch.float32, 1)
    h, rows = poison(4, 8), rows_of((0, 4))

    def refused(code: int, **changed: object) -> None:
        values: dict[str, object] = {
            **{"r": x.r, "k": x.k, "v": x.v, "w": x.w, "u": x.u, "state": x.state, "rows": rows, "h": h},
            **{"T": 4, "C": 8, "D": 1, "dtype": 0},
        }
        with pytest.raises(library.CudaError) as error:
            _time_mix(*(values | changed).values())
        assert error.value.code == code

    for name in ("r", "k", "v", "w", "u", "state", "rows", "h"):
        refused(-1, **{name: None})
    refused(-2, T=-1)
    refused(-2, C=-8)
    refused(-2, D=70000)
    refused(-3, dtype=3)
