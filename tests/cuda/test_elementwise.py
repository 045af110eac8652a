"""What happens element by element, on emulated CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops.cuda import elementwise, library

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FUNCTIONS = [lambda x: x, torch.tanh, torch.sigmoid, lambda x: x.relu().square()]

_activate = library.bind("activate", "plifi")
_gated_add = library.bind("gated_add", "pppllfi")
_mix = library.bind("mix", "pppppll" + "i")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got: Tensor, want: Tensor) -> None:
    assert ((got.double() - want).abs() <= EPS[got.dtype] * want.abs() + 1e-6).all(), (got.double() - want).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", range(4))
@pytest.mark.parametrize("count", [1, 7, 8, 4099, 8192])
def test_activate(count: int, op: int, dtype: torch.dtype) -> None:
    whole = normal(1, count + 9, dtype=dtype) * 4
    for first in (0, 1):  # the second does not lie on 16 bytes
        x = whole.clone()[first : first + count]
        want = FUNCTIONS[op](x.double() / 4)
        _activate(x, count, op, 0.25, library.DTYPES[dtype])
        assert_near(x, want)


def test_extremes() -> None:
    for op, want in ((1, [-1, 1, 0]), (2, [0, 1, 0.5]), (3, [0, torch.inf, 0])):
        x = torch.tensor([-torch.inf, torch.inf, 0.0, torch.nan])
        _activate(x, 4, op, 1.0, 0)
        assert x[:3].tolist() == want
        assert x[3].isnan()
    x = torch.tensor([320.0, -320.0], dtype=torch.float16)
    _activate(x, 2, 3, 1 / 16, library.DTYPES[x.dtype])
    assert x.tolist() == [400, 0]  # 320^2 alone would not fit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [8, 40, 13])
def test_gated_add_and_mix(channels: int, dtype: torch.dtype) -> None:
    x, u, d, weight = normal(1, 31, channels), normal(4, 31, channels), normal(5, 31, channels), normal(6, channels)
    product, gate = normal(2, 31, channels, dtype=dtype), normal(3, 31, channels, dtype=dtype)
    want = x.double() + torch.sigmoid(gate.double()) * 256 * product.double()
    _gated_add(x, product, gate, 31, channels, 256.0, library.DTYPES[dtype])
    assert (x.double() - want).abs().max() <= 1e-4
    out = torch.full_like(product, torch.nan)
    _mix(out, product, u, d, weight, 31, channels, library.DTYPES[dtype])
    assert_near(out, u.double() + d.double() * (weight.double() + product.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 9, 5000])
def test_all_finite(count: int, dtype: torch.dtype) -> None:
    largest = torch.full([count], torch.finfo(dtype).max, dtype=dtype)
    assert elementwise.all_finite(largest)
    assert elementwise.all_finite(largest[1:])
    for place in {0, count // 2, count - 1}:
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = largest.clone()
            x[place] = bad
            assert not elementwise.all_finite(x)
    flag = torch.tensor([1], dtype=torch.int32)
    elementwise.all_finite_flag(largest, flag)
    assert flag.item() == 1  # a later tensor does not clear it


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_convert(source: torch.dtype, target: torch.dtype) -> None:
    x = (normal(1, 1003) * 10.0 ** normal(2, 1003)).to(source)
    x[:4] = torch.tensor([0.0, -0.0, 1.0, torch.nan])
    out = torch.empty(1003, dtype=target)
    elementwise.convert_into(out, x)
    assert torch.equal(out[:3], x[:3].to(target))
    assert out[3].isnan()
    largest = 65504.0 if target == torch.float16 else torch.inf
    assert torch.equal(out[4:], x[4:].float().clamp(-largest, largest).to(target))
