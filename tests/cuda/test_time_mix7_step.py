"""RWKV-7's time mix for one token of each of many states, emulated on the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from time_mix7_cases import SIZES, Mix, equal, largest_error, mix_of, rows_of
from torch import Tensor

from rwkvmpi.ops.cuda import library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch_of(count: int, **options: object) -> Mix:
    """As many states, and as many segments of one token, which is what a step means."""
    return mix_of(rows_of(*((d, 1) for d in range(count))), count, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("kernels")
def test_bits_of_a_chunk(size: int, dtype: torch.dtype) -> None:
    mix = batch_of(3, heads=2, size=size, dtype=dtype, first_layer=size % 3 == 0)
    assert equal(mix.step(), mix.run(1))


@pytest.mark.parametrize("size", [40, 64, 260])
@pytest.mark.usefixtures("kernels")
def test_against_float64(size: int) -> None:
    mix = batch_of(2, size=size, first_layer=True)
    want, want_v, want_after = mix.reference()
    h, v_out, after = mix.step()
    assert largest_error(h, want) <= 5e-5
    assert torch.equal(v_out.double(), want_v)
    assert largest_error(after, want_after) <= 5e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("kernels")
def test_float16_states(size: int) -> None:
    """The arithmetic is float32's: only what is stored is rounded."""
    mix = batch_of(2, size=size)
    mix.state = mix.state.half().float()
    want, _, want_after = mix.run(1)
    h, _, after = mix.step(torch.float16)
    assert largest_error(h, want.double()) <= 2e-5
    assert largest_error(after, want_after.double(), 2.0**-11) <= 2e-5


@pytest.mark.usefixtures("kernels")
def test_float16_states_saturate() -> None:
    mix = batch_of(1, first_layer=True)
    mix.tokens[1][:], mix.tokens[2][:] = 700.0, 700.0
    mix.tokens[2][0, ::2] = -700.0
    mix.vectors[4][:] = 0.0  # k stays as it is
    after = mix.step(torch.float16)[2]
    assert after.abs().eq(65504).all()
    assert torch.equal(after.sign()[0, 0, :, 0].float(), mix.tokens[2][0].sign())


def test_orders(orders: Callable[[Callable[[], None]], None]) -> None:
    mix = batch_of(3, dtype=torch.bfloat16, first_layer=True)
    outputs = []
    orders(lambda: outputs.append(mix.step()))
    assert all(equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("kernels")
def test_unaligned(state_dtype: torch.dtype) -> None:
    mix = batch_of(1, first_layer=True)
    want = mix.step(state_dtype)
    room = torch.zeros(mix.state.numel() + 1, dtype=state_dtype)
    state = room[1:].view(mix.state.shape)
    state.copy_(mix.state)
    h, v_out = mix.outputs()
    call = library.bind("v7_step", "p" * 19 + "lllfii")
    numbers = (library.DTYPES[state_dtype], 0)
    call(*mix.tokens, *mix.vectors, state, h, v_out, 1, 1, 64, 64e-5, *numbers)
    assert equal((h, v_out, state), want)
    assert room[0] == 0


@pytest.mark.usefixtures("kernels")
def test_other_states_do_not_matter() -> None:
    mix = batch_of(3)
    h, _, after = mix.step()
    one: list[Tensor | None] = [None if x is None else x[1:2].contiguous() for x in mix.tokens]
    alone = Mix(one, mix.vectors, mix.state[1:2], rows_of((0, 1))).step()
    assert equal(alone, (h[1:2], None, after[1:2]))
