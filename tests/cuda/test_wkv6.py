"""The CUDA kernels of WKV-6 and WKV-5 and of their time mixes, emulated on the host, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops import reference
from rwkvmpi.ops.cuda import library

EPS = 64e-5
HEADS = 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of an output, relative

_wkv6 = library.bind("wkv6", "p" * 9 + "llllii")
_time_mix = library.bind("v6_time_mix", "p" * 12 + "llllfi")
_step = library.bind("v6_step", "p" * 11 + "lllfii")


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


def documents(*lengths: int) -> tuple[Tensor, int]:
    """Segments with gaps before and between them, and the number of rows."""
    segments, end = [], 3
    for i, length in enumerate(lengths):
        segments.append((end, length))
        end += length + i % 3
    return rows_of(*segments), end + 2


class Inputs:
    """Everything that the operators take, for one shape."""

    def __init__(self, tokens: int, size: int, dtype: torch.dtype, segments: int, seed: int = 1) -> None:
        g = torch.Generator().manual_seed(seed)
        channels = HEADS * size
        self.r, self.k, self.v, self.g = (normal(g, tokens, channels).to(dtype) for _ in range(4))
        self.w_lin = normal(g, tokens, channels, scale=2.0).to(dtype)
        self.time_decay = normal(g, channels, scale=3.0) - 2.0
        self.u, self.decay = normal(g, HEADS, size), torch.rand(HEADS, size, generator=g)
        self.weight, self.bias = normal(g, channels), normal(g, channels)
        self.state = normal(g, segments, HEADS, size, size)
        self.size, self.dtype = size, dtype

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, self.size))


def time_mix(x: Inputs, state: Tensor, rows: Tensor, w_lin: bool = True, gate: bool = True, first: int = 0) -> Tensor:
    """RWKV-6's of the rows from `first` on, or without w_lin RWKV-5's."""
    r, k, v, g = (t[first:].contiguous() for t in (x.r, x.k, x.v, x.g))
    lin, decay = (x.w_lin[first:].contiguous(), x.time_decay) if w_lin else (None, x.decay.flatten())
    h = poison(*r.shape, dtype=x.dtype)
    constants = (decay, x.u, g if gate else None, x.weight, x.bias)
    _time_mix(
        *(r, k, v, lin, *constants, state, rows, h, r.shape[0], HEADS, x.size, rows.shape[0], EPS),
        library.DTYPES[x.dtype],
    )
    return h


LENGTHS = [(1,), (15, 1), (16, 2), (17,), (31, 33), (64, 100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 40, 64])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_wkv6_and_wkv5(lengths: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    rows, tokens = documents(*lengths)
    x = Inputs(tokens, size, dtype, len(lengths))
    w = torch.sigmoid(normal(torch.Generator().manual_seed(2), tokens, HEADS, size, scale=4.0)).to(dtype)
    r, k, v = (x.heads(t) for t in (x.r, x.k, x.v))
    for decay in (w, x.decay):
        want_y, want_state = reference.wkv6(r, decay.expand_as(r), k, v, x.u, x.state, rows)
        y, after = poison(tokens, HEADS, size, dtype=dtype), poison(*x.state.shape)
        _wkv6(
            *(r, decay, k, v, x.u, x.state, after, rows, y, tokens, HEADS, size, len(lengths)),
            *(int(decay is x.decay), library.DTYPES[dtype]),
        )
        assert close(y, want_y)
        assert close(after, want_state)


@pytest.mark.parametrize("size", [40, 64])
@pytest.mark.parametrize("low", [0.0, 1e-30, 0.5, 1 - 2**-24])
def test_extreme_decays(low: float, size: int) -> None:
    x = Inputs(37, size, torch.float32, 1)
    r, k, v = (x.heads(t) for t in (x.r, x.k, x.v))
    w = torch.full_like(r, low)
    w[:, :, 1::2] = 1.0
    w[::5] = 0.0
    y, after = poison(*r.shape), poison(HEADS, size, size)
    _wkv6(r, w, k, v, x.u, x.state, after, None, y, 37, HEADS, size, 1, 0, 0)
    want_y, want_state = reference.wkv6(r, w, k, v, x.u, x.state[0])
    assert close(y, want_y)
    assert close(after, want_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 40, 64])
@pytest.mark.parametrize(("w_lin", "gate"), [(True, True), (True, False), (False, True), (False, False)])
def test_time_mix(w_lin: bool, gate: bool, size: int, dtype: torch.dtype) -> None:
    rows, tokens = documents(33, 1, 16)
    x = Inputs(tokens, size, dtype, 3)
    arguments = (x.u, x.g if gate else None, x.weight, x.bias, x.state, rows, EPS)
    if w_lin:
        want_h, want_state = reference.v6_time_mix(x.r, x.k, x.v, x.w_lin, x.time_decay, *arguments)
    else:
        want_h, want_state = reference.v5_time_mix(x.r, x.k, x.v, x.decay, *arguments)
    state = x.state.clone()
    h = time_mix(x, state, rows, w_lin, gate)
    assert close(h, want_h, 2e-5)
    assert close(state, want_state)
    assert not h[want_h.abs().sum(1) == 0].any()


@pytest.mark.parametrize("size", [40, 64])
def test_decays_from_forgetting_at_once_to_never(size: int) -> None:
    rows = rows_of((0, 40))
    x = Inputs(40, size, torch.float32, 1)
    x.time_decay[:] = torch.tensor([-200.0, -20.0, -5.0, 0.0, 4.0, 20.0, 100.0, 88.0]).repeat(HEADS * size // 8)
    want_h, want_state = reference.v6_time_mix(
        *(x.r, x.k, x.v, x.w_lin, x.time_decay, x.u, x.g, x.weight, x.bias, x.state, rows, EPS)
    )
    assert close(time_mix(x, x.state, rows), want_h, 2e-5)
    assert close(x.state, want_state)


def test_slow_decays_do_not_drift() -> None:
    """Hundreds of tokens with decays close to 1: an error of one of them to one side would add up."""
    tokens, rows = 512, rows_of((0, 512))
    x = Inputs(tokens, 64, torch.float32, 1)
    x.w_lin.zero_()
    x.time_decay[:] = torch.linspace(-12.0, -4.0, HEADS * 64)
    x.k.abs_()
    x.v.abs_()
    decays = torch.exp(-torch.exp(x.time_decay.double())).float()  # as float32 has them at best
    want_state = reference.wkv6(*(x.heads(t) for t in (x.r, decays.expand_as(x.r), x.k, x.v)), x.u, x.state, rows)[1]
    time_mix(x, x.state, rows)
    assert ((x.state.double() - want_state).abs() / want_state.abs().clamp_min(1.0)).max() < 5e-6


@pytest.mark.parametrize("size", [40, 64])
def test_segments_that_are_none(size: int) -> None:
    """Padding and segments beyond the chunk leave their states; their rows are in no segment."""
    rows = rows_of((0, 0), (2, 5), (0, -3), (-1, 3), (7, 4), (10, 2**31 - 1), (0, 0))
    x = Inputs(10, size, torch.bfloat16, len(rows))
    state = x.state.clone()
    h = time_mix(x, state, rows)
    alone = x.state[1:2].clone()
    assert torch.equal(time_mix(x, alone, rows[1:2].contiguous()), h)
    assert torch.equal(state[1], alone[0])
    others = [0, 2, 3, 4, 5, 6]
    assert torch.equal(state[others], x.state[others])
    assert not h[:2].any()
    assert not h[7:].any()
    assert h[2:7].all()


@pytest.mark.parametrize("size", [40, 64])
def test_nothing_to_do(size: int) -> None:
    x = Inputs(20, size, torch.float32, 1)
    assert not time_mix(x, x.state[:0], rows_of()).any()
    r, after = x.heads(x.r)[:0], poison(*x.state.shape)
    _wkv6(r, r, r, r, x.u, x.state, after, None, r, 0, HEADS, size, 1, 0, 0)
    assert torch.equal(after, x.state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [40, 64])
def test_bits_do_not_depend_on_the_chunk(size: int, dtype: torch.dtype) -> None:
    """A document in pieces of multiples of 32 rows, among others and elsewhere: the same bits."""
    x = Inputs(100, size, dtype, 1)
    whole_state = x.state.clone()
    whole = time_mix(x, whole_state, rows_of((0, 100)))
    state, pieces = x.state.clone(), []
    for first, count in ((0, 32), (32, 64), (96, 4)):
        pieces.append(time_mix(x, state, rows_of((0, count)), first=first)[:count])
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(state, whole_state)

    other = Inputs(7, size, dtype, 1, seed=9)
    moved = Inputs(100, size, dtype, 1)
    for name in ("r", "k", "v", "g", "w_lin"):
        setattr(moved, name, torch.cat([getattr(other, name), getattr(x, name), getattr(other, name)]))
    states = torch.cat([other.state, x.state, other.state])
    h = time_mix(moved, states, rows_of((0, 7), (7, 100), (107, 7)))
    assert torch.equal(h[7:107], whole)
    assert torch.equal(states[1], whole_state[0])
    assert torch.equal(h[:7], h[107:])


@pytest.mark.parametrize("size", [40, 64])
def test_bits_do_not_depend_on_the_order_of_threads(size: int, orders: Callable[[Callable[[], None]], None]) -> None:
    rows, tokens = documents(35, 0, 16)
    results = []

    def run() -> None:
        x = Inputs(tokens, size, torch.bfloat16, len(rows))
        results.append((time_mix(x, x.state, rows), x.state))

    orders(run)
    for h, state in results[1:]:
        assert torch.equal(h, results[0][0])
        assert torch.equal(state, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 40, 64])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16])
def test_step(state_dtype: torch.dtype, size: int, dtype: torch.dtype) -> None:
    states = 3
    x = Inputs(states, size, dtype, states)
    rows = rows_of(*((i, 1) for i in range(states)))
    start = x.state.to(state_dtype)
    for w_lin, gate in ((True, True), (False, False)):
        decay = x.time_decay if w_lin else x.decay.flatten()
        state, h = start.clone(), poison(states, HEADS * size, dtype=dtype)
        _step(
            *(x.r, x.k, x.v, x.w_lin if w_lin else None, decay, x.u, x.g if gate else None, x.weight, x.bias),
            *(state, h, states, HEADS, size, EPS, library.DTYPES[state_dtype], library.DTYPES[dtype]),
        )
        arguments = (x.u, x.g if gate else None, x.weight, x.bias, start, rows, EPS)
        if w_lin:
            want_h, want_state = reference.v6_time_mix(x.r, x.k, x.v, x.w_lin, decay, *arguments)
        else:
            want_h, want_state = reference.v5_time_mix(x.r, x.k, x.v, x.decay, *arguments)
        assert close(h, want_h, 2e-5)
        assert close(state, want_state)


def test_a_state_too_large_for_float16_is_its_largest_number() -> None:
    x = Inputs(1, 64, torch.float32, 1)
    x.k *= 1e4
    x.v *= 1e4
    state, h = x.state.half(), poison(1, HEADS * 64)
    constants = (x.w_lin, x.time_decay, x.u, x.g, x.weight, x.bias)
    _step(x.r, x.k, x.v, *constants, state, h, 1, HEADS, 64, EPS, 2, 0)
    assert torch.isfinite(state).all()
    assert (state.abs() == 65504).any()


def test_large_heads() -> None:
    size = 272
    x = Inputs(18, size, torch.bfloat16, 1)
    rows = rows_of((1, 17))
    arguments = (x.r, x.k, x.v, x.w_lin, x.time_decay, x.u, x.g, x.weight, x.bias, x.state.clone(), rows, EPS)
    want_h, want_state = reference.v6_time_mix(*arguments)
    assert close(time_mix(x, x.state, rows), want_h, 2e-5)
    assert close(x.state, want_state)


def test_refusals() -> None:
    x = Inputs(16, 64, torch.float32, 1)
    rows = rows_of((0, 16))

    def refused(code: int, **changed: object) -> None:
        values: dict[str, object] = {
            **{"r": x.r, "k": x.k, "v": x.v, "w_lin": x.w_lin, "decay": x.time_decay, "u": x.u, "g": x.g},
            **{"weight": x.weight, "bias": x.bias, "state": x.state, "rows": rows, "h": x.r.clone()},
            **{"T": 16, "H": HEADS, "N": 64, "D": 1, "eps": EPS, "dtype": 0},
        }
        with pytest.raises(library.CudaError) as error:
            _time_mix(*(values | changed).values())
        assert error.value.code == code

    for name in ("r", "k", "v", "decay", "u", "weight", "bias", "state", "rows", "h"):
        refused(-1, **{name: None})
    refused(-2, T=-1)
    refused(-2, N=513)
    refused(-2, N=0)
    refused(-2, D=70000)
    refused(-3, dtype=7)
    refused(-4, r=torch.zeros(16 * HEADS * 64 + 1)[1:])
