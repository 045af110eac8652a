"""RWKV-7's time mix and WKV-7 in tiles on tensor cores, emulated on the host, against float64.

Bodies 2 (one kernel) and 3 (two kernels) of v7_time_mix, body 2 of wkv7.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops import reference
from rwkvmpi.ops.cuda import library
from rwkvmpi.ops.cuda.library import CudaError

N = 64
EPS = 64e-5
FUSED, SPLIT = 2, 3
DTYPES = [torch.bfloat16, torch.float16]
ORDERS = (0, 1, 2, 3)
# Of the error of an output: its own rounding, relative to itself; beyond that, the largest relative to the root of the
# mean square of all, and the root of its mean square likewise. The operands of the matrix products have the precision
# of the dtype; the largest elements of a state are products of the largest v and k, and err twice as much.
OUTPUT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LARGEST = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
TYPICAL = {torch.bfloat16: 4e-3, torch.float16: 6e-4}

_mix = library.bind("v7_time_mix", "p" * 21 + "lllllfii")
_scratch = library.bind_number("v7_time_mix_scratch", "lllli")
_wkv7 = library.bind("wkv7", "p" * 10 + "llllii")


@pytest.fixture(autouse=True)
def order(kernels: ctypes.CDLL) -> Iterator[Callable[[int], object]]:
    """Sets the order in which the emulated threads run."""
    with library.emulated(kernels._name):
        yield kernels.rwkvmpi_cuda_emulation_order
        kernels.rwkvmpi_cuda_emulation_order(0)


def rows_of(*segments: tuple[int, int]) -> Tensor:
    return torch.tensor(segments, dtype=torch.int32).view(-1, 2)


def typical(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@dataclass
class Mix:
    """Inputs of a time mix: tokens [T, C], vectors, states [D, H, N, N]."""

    tokens: list[Tensor | None]
    vectors: list[Tensor | None]
    state: Tensor
    rows: Tensor
    eps: float = EPS
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        assert self.tokens[0] is not None
        self.dtype = self.tokens[0].dtype

    def run(self, body: int = FUSED, *, scratch: int | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """h, v_out (None in later layers), the states after; what is written starts as NaN."""
        total, heads = self.tokens[0].shape[0], self.state.shape[1]
        outputs = [torch.full((total, heads * N), float("nan"), dtype=self.dtype) for _ in range(2)]
        v_out = outputs[1] if self.tokens[7] is None else None
        sizes = (total, heads, N, len(self.rows))
        number = library.DTYPES[self.dtype]
        size = _scratch(*sizes, number) if scratch is None else scratch
        room = torch.full((size + 16,), 255, dtype=torch.uint8)
        state = self.state.clone()
        _mix(
            *self.tokens, *self.vectors, state, self.rows, outputs[0], v_out, room, *sizes, size, self.eps, body, number
        )
        assert room[size:].eq(255).all()
        return outputs[0], v_out, state

    def part(self, first: int, count: int, state: Tensor) -> Mix:
        """Some rows as a chunk of their own, one segment."""
        tokens = [None if x is None else x[first : first + count].contiguous() for x in self.tokens]
        return replace(self, tokens=tokens, state=state, rows=rows_of((0, count)))

    def reference(self) -> tuple[Tensor, Tensor | None, Tensor]:
        return reference.v7_time_mix(*self.tokens, *self.vectors, self.state, self.rows, self.eps)


def mix_of(
    rows: Tensor,
    total: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 1,
    first_layer: bool = False,
    seed: int = 0,
    **scales: float,
) -> Mix:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    channels = heads * N
    names = ("r", "k", "v", "w_lin", "a_lin", "v_lin", "g", "v_first")
    tokens: list[Tensor | None] = [normal(total, channels, scale=scales.get(name, 1.0)) for name in names]
    tokens[6] = 1 + 0.3 * tokens[6]
    tokens = [x.to(dtype) for x in tokens]
    vectors: list[Tensor | None] = [normal(channels) for _ in range(8)]
    vectors[3:6] = [1 + 0.2 * vectors[3], 1 + 0.2 * vectors[4], normal(heads, N, scale=0.3)]
    vectors[6:] = [1 + 0.2 * vectors[6], 0.2 * vectors[7]]
    if first_layer:
        tokens[5] = tokens[7] = vectors[2] = None
    state = normal(len(rows), heads, N, N, scale=scales.get("state", 1.0))
    return Mix(tokens, vectors, state, rows)


def document(length: int, **options: object) -> Mix:
    return mix_of(rows_of((0, length)), length, **options)


def errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Largest (beyond the output's own rounding) and typical error, relative to the typical value."""
    error = (got.double() - want).abs()
    rounding = OUTPUT.get(got.dtype, 0.0)
    return float((error - rounding * want.abs()).max()) / typical(want), typical(error) / typical(want)


def check(dtype: torch.dtype, output: Tensor, want: Tensor, state: Tensor, want_state: Tensor) -> None:
    for got, right, factor in ((output, want, 1.0), (state, want_state, 2.0)):
        largest, usual = errors(got, right)
        assert largest <= factor * LARGEST[dtype]
        assert usual <= TYPICAL[dtype]


def equal(one: tuple[Tensor | None, ...], other: tuple[Tensor | None, ...]) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 33, 48, 64, 100])
def test_is_right(length: int, dtype: torch.dtype) -> None:
    mix = document(length, dtype=dtype, heads=1 + length % 2, first_layer=length % 3 == 0, seed=length, w_lin=2.0)
    got, want = mix.run(), mix.reference()
    check(dtype, got[0], want[0], got[2], want[2])
    assert equal(mix.run(SPLIT), got)
    if got[1] is not None:
        assert torch.equal(got[1], mix.tokens[2])


EXTREMES = {
    "strong decay": {"w_lin": 30.0},
    "large k": {"k": 30.0},
    "large r": {"r": 30.0},
    "large state": {"state": 30.0},
    "saturated rates": {"a_lin": 30.0, "v_lin": 30.0},
    "small values": {"v": 0.03, "v_first": 0.03, "state": 0.0, "k": 0.1},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str, dtype: torch.dtype) -> None:
    mix = document(40, dtype=dtype, seed=7, **EXTREMES[name])
    got, want = mix.run(), mix.reference()
    check(dtype, got[0], want[0], got[2], want[2])
    assert equal(mix.run(SPLIT), got)


@pytest.mark.parametrize("w_lin", [-40.0, 40.0])
def test_decays_at_their_limits_do_not_overflow(w_lin: float) -> None:
    """All decays 1, or all 0.545, token after token: the scaled operands reach their largest range."""
    for dtype in DTYPES:
        mix = document(48, dtype=dtype, k=20.0, r=20.0)
        mix.tokens[3] = torch.full_like(mix.tokens[3], w_lin)
        got, want = mix.run(), mix.reference()
        check(dtype, got[0], want[0], got[2], want[2])


def test_zero_keys_and_zero_everything() -> None:
    mix = document(20)
    mix.tokens[1] = torch.zeros_like(mix.tokens[1])
    got, want = mix.run(), mix.reference()
    check(mix.dtype, got[0], want[0], got[2], want[2])
    mix.tokens = [torch.zeros_like(x) for x in mix.tokens]
    mix.state = torch.zeros_like(mix.state)
    assert mix.run()[0].eq(0).all()


def test_the_error_of_the_state_does_not_grow_with_the_document() -> None:
    mix = document(96, seed=3, w_lin=0.5)
    mix.vectors[0] = torch.full((N,), -6.0)  # decays of 0.998
    assert errors(mix.run()[2], mix.reference()[2])[1] <= TYPICAL[torch.bfloat16]


# What a planted mistake does, against the tolerances: an argument of the reference changed.
MISTAKES = {
    "eps": lambda m: replace(m, eps=1e-5),
    "no bonus": lambda m: replace(m, vectors=[*m.vectors[:5], torch.zeros(1, N), *m.vectors[6:]]),
    "k_k": lambda m: replace(m, vectors=[*m.vectors[:3], torch.ones(N), *m.vectors[4:]]),
    "k_a": lambda m: replace(m, vectors=[*m.vectors[:4], torch.zeros(N), *m.vectors[5:]]),
    "v_first": lambda m: replace(m, tokens=[*m.tokens[:7], m.tokens[2]]),
    "v0": lambda m: replace(m, vectors=[*m.vectors[:2], torch.zeros(N), *m.vectors[3:]]),
    "w0": lambda m: replace(m, vectors=[torch.zeros(N), *m.vectors[1:]]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_tolerances_notice_mistakes(name: str) -> None:
    small = {"v": 0.03, "v_first": 0.03, "state": 0.0, "k": 0.1} if name == "eps" else {}
    mix = document(40, **small)
    got = mix.run()[0]
    assert errors(got, mix.reference()[0])[1] <= TYPICAL[mix.dtype]
    assert errors(got, MISTAKES[name](mix).reference()[0])[1] > 5 * TYPICAL[mix.dtype]


SEGMENTS = rows_of((2, 17), (19, 0), (19, 16), (40, 1), (41, 33), (0, 0))


@pytest.mark.parametrize("body", [FUSED, SPLIT])
@pytest.mark.parametrize("first_layer", [False, True])
def test_documents_side_by_side(body: int, first_layer: bool, order: Callable[[int], object]) -> None:
    mix = mix_of(SEGMENTS, 80, heads=2, first_layer=first_layer)
    got, want = mix.run(body), mix.reference()
    check(mix.dtype, got[0], want[0], got[2], want[2])
    outside = want[0].eq(0).all(1)
    assert outside.any()
    assert got[0][outside].eq(0).all()
    if first_layer:
        assert torch.equal(got[1].double(), want[1])
    for d, (first, count) in enumerate(SEGMENTS.tolist()):
        if count == 0:
            assert torch.equal(got[2][d], mix.state[d])
            continue
        alone = mix.part(first, count, mix.state[d : d + 1]).run(FUSED)
        assert torch.equal(alone[0], got[0][first : first + count])
        assert torch.equal(alone[2][0], got[2][d])
    for number in ORDERS:
        order(number)
        assert equal(mix.run(body), got)


@pytest.mark.parametrize("body", [FUSED, SPLIT])
def test_cutting_at_multiples_of_32_keeps_the_bits(body: int) -> None:
    mix = document(75, dtype=torch.float16)
    whole = mix.run(FUSED)
    state, parts = mix.state, []
    for first, count in ((0, 32), (32, 32), (64, 11)):
        h, _, state = mix.part(first, count, state).run(body)
        parts.append(h)
    assert torch.equal(torch.cat(parts), whole[0])
    assert torch.equal(state, whole[2])


@pytest.mark.parametrize("rows", [rows_of(), rows_of((0, 0)), rows_of((-1, 5), (15, 7), (3, -2))])
def test_without_a_document_rows_are_zero_and_states_stay(rows: Tensor) -> None:
    for body in (FUSED, SPLIT):
        mix = mix_of(rows, 20, first_layer=True)
        h, v_out, state = mix.run(body)
        assert h.eq(0).all()
        assert v_out.eq(0).all()
        assert torch.equal(state, mix.state)


def test_the_launcher_chooses_tiles_and_checks() -> None:
    mix = document(20)
    assert equal(mix.run(0), mix.run(FUSED))
    assert equal(document(160).run(0), document(160).run(FUSED))  # long enough for two kernels
    assert equal(document(160).run(0, scratch=0), document(160).run(FUSED))
    with pytest.raises(CudaError, match="a size is"):
        mix.run(SPLIT, scratch=16)
    with pytest.raises(CudaError, match="does not support"):
        mix.run(4)
    mix.tokens[0] = torch.zeros(20 * N + 1, dtype=mix.dtype)[1:].view(20, N)
    with pytest.raises(CudaError, match="boundary"):
        mix.run(FUSED)


@dataclass
class Plain:
    tokens: list[Tensor]  # r, w, k, v, a, b [T, H, N]
    state: Tensor

    def run(self, rows: Tensor | None, *, in_place: bool = True) -> tuple[Tensor, Tensor]:
        total, heads, _ = self.tokens[0].shape
        dtype, segments = self.tokens[0].dtype, 1 if rows is None else len(rows)
        y = torch.full((total, heads, N), float("nan"), dtype=dtype)
        before = self.state.clone()
        after = before if in_place else torch.full_like(before, float("nan"))
        _wkv7(*self.tokens, before, after, rows, y, total, heads, N, segments, 2, library.DTYPES[dtype])
        return y, after


def plain_of(total: int, segments: int, *, dtype: torch.dtype, heads: int = 1, seed: int = 0) -> Plain:
    g = torch.Generator().manual_seed(seed)
    r, k, v, kk, w_lin = (torch.randn(total, heads, N, generator=g) for _ in range(5))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    w = torch.exp(-0.6065306597 * torch.sigmoid(4 * w_lin))
    tokens = [r, w, k, v, -kk, kk * torch.rand(total, heads, N, generator=g)]
    return Plain([x.to(dtype) for x in tokens], torch.randn(segments, heads, N, N, generator=g))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 16, 31, 50])
def test_plain_is_right(length: int, dtype: torch.dtype) -> None:
    plain = plain_of(length, 1, dtype=dtype, seed=length)
    y, after = plain.run(None)
    want = reference.wkv7(*plain.tokens, plain.state[0])
    check(dtype, y, want[0], after[0], want[1])


def test_plain_documents_side_by_side(order: Callable[[int], object]) -> None:
    plain = plain_of(80, len(SEGMENTS), dtype=torch.bfloat16, heads=2)
    want = reference.wkv7(*plain.tokens, plain.state, SEGMENTS)
    got = plain.run(SEGMENTS, in_place=False)
    check(torch.bfloat16, got[0], want[0], got[1], want[1])
    assert got[0][want[0].eq(0).all(-1)].eq(0).all()
    for number in ORDERS:
        order(number)
        assert equal(plain.run(SEGMENTS), got)
