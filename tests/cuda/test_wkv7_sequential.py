"""RWKV-7's recurrence token by token, alone and within the time mix, emulated on the host, against float64.

Body 1 of wkv7 and of v7_time_mix: every head size and dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from time_mix7_cases import SIZES, Mix, equal, largest_error, mix_of, rows_of
from torch import Tensor

from rwkvmpi.ops import reference
from rwkvmpi.ops.cuda import library

Orders = Callable[[Callable[[], None]], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounded outputs differ by their own rounding; the arithmetic is float32's for all.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 100]
SEVERAL = [(3, 1), (4, 17), (0, 0), (24, 16), (41, 33)]  # of 80 tokens, with gaps and padding

_wkv7 = library.bind("wkv7", "p" * 10 + "llllii")


@dataclass
class Plain:
    """r, w, k, v, a, b [T, H, N]; states [D, H, N, N], of one document [H, N, N] where rows is None."""

    inputs: list[Tensor]
    state: Tensor
    rows: Tensor | None

    def run(self, body: int = 1, in_place: bool = False) -> tuple[Tensor, Tensor]:
        """y and the states after; what is written starts as NaN."""
        y = torch.full_like(self.inputs[0], torch.nan)
        before = self.state.clone()
        after = before if in_place else torch.full_like(before, torch.nan)
        segments = 1 if self.rows is None else len(self.rows)
        number = library.DTYPES[y.dtype]
        _wkv7(*self.inputs, before, after, self.rows, y, *y.shape, segments, body, number)
        assert in_place or torch.equal(before, self.state)
        return y, after

    def part(self, first: int, count: int, state: Tensor) -> Plain:
        return Plain([x[first : first + count].contiguous() for x in self.inputs], state, rows_of((0, count)))

    def check(self) -> None:
        y, after = self.run()
        want, want_after = reference.wkv7(*self.inputs, self.state, self.rows)
        assert largest_error(y, want, ROUNDING[y.dtype]) <= 2e-5
        assert largest_error(after, want_after) <= 2e-5


def plain(
    rows: Tensor | None, total: int, heads: int = 1, size: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Plain:
    g = torch.Generator().manual_seed(seed)
    r, k, v, kk = (torch.randn(total, heads, size, generator=g) for _ in range(4))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    gate, w = (torch.rand(total, heads, size, generator=g) for _ in range(2))
    inputs = [r, torch.exp(-0.6065306597 * w), k, v, -kk, kk * gate]
    state = torch.randn(*(() if rows is None else (len(rows),)), heads, size, size, generator=g)
    return Plain([x.to(dtype) for x in inputs], state, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("kernels")
def test_recurrence(size: int, dtype: torch.dtype) -> None:
    plain(rows_of((0, 19), (20, 3)), 24, 2, size, dtype).check()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.usefixtures("kernels")
def test_lengths_of_the_recurrence(length: int) -> None:
    plain(None, length, dtype=DTYPES[length % 3]).check()


@pytest.mark.usefixtures("kernels")
def test_several_documents() -> None:
    case = plain(rows_of(*SEVERAL, (78, 9), (-2, 4)), 80, 1)
    y, after = case.run()
    states = case.state
    valid = replace(case, rows=case.rows[:5], state=states[:5])
    want, want_after = reference.wkv7(*valid.inputs, valid.state, valid.rows)
    assert largest_error(y, want) <= 2e-5
    assert largest_error(after[:5], want_after) <= 2e-5
    assert torch.equal(after[5:], states[5:])
    assert torch.equal(after[2], states[2])
    assert y[:3].eq(0).all()
    assert y[21:24].eq(0).all()
    assert y[74:].eq(0).all()
    assert equal(case.run(in_place=True), (y, after))


@pytest.mark.usefixtures("kernels")
def test_no_documents() -> None:
    case = plain(rows_of(), 20)
    assert case.run()[0].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.usefixtures("kernels")
def test_extreme_decays(dtype: torch.dtype) -> None:
    case = plain(None, 40, dtype=dtype)
    case.inputs[1][::2, :, ::3], case.inputs[1][1::2, :, ::3] = 0.0, 1.0
    case.check()


def test_orders_of_the_recurrence(orders: Orders) -> None:
    case = plain(rows_of((0, 35), (36, 1)), 38, 1, dtype=torch.bfloat16)
    outputs = []
    orders(lambda: outputs.append(case.run()))
    assert all(equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("size", [40, 64])
@pytest.mark.parametrize("cuts", [[32, 64], [1], [15, 16, 17, 50], [64]], ids=str)
@pytest.mark.usefixtures("kernels")
def test_cuts_of_the_recurrence(size: int, cuts: list[int]) -> None:
    case = plain(rows_of((0, 70)), 70, size=size, dtype=DTYPES[len(cuts) % 3])
    y, after = case.run()
    state, parts = case.state, []
    for first, end in zip([0, *cuts], [*cuts, 70], strict=True):
        part, state = case.part(first, end - first, state).run()
        parts.append(part)
    assert equal((torch.cat(parts), state), (y, after))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.usefixtures("kernels")
def test_unaligned(dtype: torch.dtype, offset: int) -> None:
    """What does not begin on a multiple of 16 bytes goes the slow way, to the same bits."""
    case = plain(rows_of((0, 18)), 18, dtype=dtype)

    def moved(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)

    other = replace(case, inputs=[moved(x) for x in case.inputs], state=moved(case.state))
    assert equal(case.run(), other.run(in_place=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("kernels")
def test_time_mix(size: int, dtype: torch.dtype) -> None:
    check(mix_of(rows_of((0, 18), (19, 3)), 23, 2, size, dtype))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.usefixtures("kernels")
def test_lengths_of_the_time_mix(length: int) -> None:
    check(mix_of(rows_of((0, length)), length, dtype=DTYPES[length % 3], first_layer=length % 2 == 0))


def check(mix: Mix) -> None:
    h, v_out, after = mix.run(1)
    want, want_v, want_after = mix.reference()
    assert largest_error(h, want, ROUNDING[h.dtype]) <= 5e-5
    assert largest_error(after, want_after) <= 5e-5
    assert (v_out is None) == (want_v is None)
    if v_out is not None:
        assert torch.equal(v_out.double(), want_v)


@pytest.mark.parametrize("first_layer", [False, True])
@pytest.mark.usefixtures("kernels")
def test_several_documents_in_the_time_mix(first_layer: bool) -> None:
    mix = mix_of(rows_of(*SEVERAL), 80, first_layer=first_layer)
    check(mix)
    h, v_out, after = mix.run(1)
    for d, (first, count) in enumerate(mix.rows.tolist()):
        alone = mix.part(first, count, mix.state[d : d + 1]).run(1) if count else None
        if alone is None:
            assert torch.equal(after[d], mix.state[d])
        else:
            own = None if v_out is None else v_out[first : first + count]
            assert equal(alone, (h[first : first + count], own, after[d : d + 1]))


@pytest.mark.usefixtures("kernels")
def test_extreme_inputs_of_the_time_mix() -> None:
    mix = mix_of(rows_of((0, 40)), 40)
    mix.tokens[3][::2, ::3], mix.tokens[3][1::2, ::3] = 60.0, -60.0
    mix.tokens[1][::5] = 0.0  # a key without direction: kk is 0, not NaN
    check(mix)


def test_orders_of_the_time_mix(orders: Orders) -> None:
    mix = mix_of(rows_of((0, 20), (21, 1)), 22, dtype=torch.bfloat16, first_layer=True)
    outputs = []
    orders(lambda: outputs.append(mix.run(1)))
    assert all(equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("size", [40, 64])
@pytest.mark.parametrize("cuts", [[32, 64], [1], [15, 16, 17, 50]], ids=str)
@pytest.mark.usefixtures("kernels")
def test_cuts_of_the_time_mix(size: int, cuts: list[int]) -> None:
    mix = mix_of(rows_of((0, 70)), 70, size=size, dtype=DTYPES[len(cuts) % 2])
    h, _, after = mix.run(1)
    state, parts = mix.state, []
    for first, end in zip([0, *cuts], [*cuts, 70], strict=True):
        part, _, state = mix.part(first, end - first, state).run(1)
        parts.append(part)
    assert equal((torch.cat(parts), state), (h, after))


@pytest.mark.usefixtures("kernels")
def test_large_heads() -> None:
    """Their states do not fit a block's registers."""
    plain(rows_of((0, 5)), 5, size=260).check()
    check(mix_of(rows_of((0, 5)), 5, size=260))


@pytest.mark.usefixtures("kernels")
def test_refusals() -> None:
    case = plain(None, 3)
    with pytest.raises(library.CudaError, match="combination"):
        case.run(body=2)  # tiles are for 16-bit types
    with pytest.raises(library.CudaError, match="size"):
        plain(None, 1, size=513).run()
