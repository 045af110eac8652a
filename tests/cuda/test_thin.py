"""Products of 1 to 16 rows on emulated CUDA: against float64, and the same bits for a row in any company."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops.cuda import library
from rwkvmpi.ops.cuda.library import CudaError

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
STORE, ADD, GATED_ADD, STORE_FLOAT, MIX = range(5)

_thin_product = library.bind("thin_product", "ppppppp" + "llll" + "iifi")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def thin(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    gate: Tensor | None = None,
    mix: tuple[Tensor | None, ...] = (None, None, None),
    op: int = 0,
    accumulate: int = STORE,
    scale: float = 1.0,
) -> Tensor:
    _thin_product(
        *(x, w, out, gate, *mix, x.shape[0], *w.shape, x.stride(0), op, accumulate, scale, library.DTYPES[x.dtype])
    )
    return out


def plain(x: Tensor, w: Tensor) -> Tensor:
    return thin(x, w, torch.full([x.shape[0], w.shape[0]], torch.nan), accumulate=STORE_FLOAT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [8, 40, 512, 1112, 1001])  # of one warp, of all, more than once; no whole vectors
@pytest.mark.parametrize("outputs", [1, 50, 230])  # 3 blocks: up to three times 32 outputs each
def test_against_float64(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    w = normal(1, outputs, inputs, dtype=dtype)
    for rows in (1, 2, 5, 8, 9, 16) if outputs == 50 else (3, 16):
        x = normal(2, rows, inputs, dtype=dtype)
        want = x.double() @ w.double().T
        got = plain(x, w)
        assert (got.double() - want).abs().max() <= 3e-7 * inputs**0.5 * want.abs().max().clamp_min(1.0)
        rounded = thin(x, w, torch.full([rows, outputs], torch.nan, dtype=dtype))
        assert torch.equal(rounded, got.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [72, 70, 1048])
def test_bits_of_a_row(inputs: int, dtype: torch.dtype, orders: Callable[[Callable[[], None]], None]) -> None:
    w, x = normal(1, 100, inputs, dtype=dtype), normal(2, 16, inputs, dtype=dtype)
    want = plain(x, w)
    for first, rows in ((0, 1), (5, 1), (3, 2), (2, 8), (7, 9), (15, 1)):
        assert torch.equal(plain(x[first : first + rows], w), want[first : first + rows])
    part = plain(x[:2], w[33:60])  # other places among the outputs
    assert torch.equal(part, want[:2, 33:60])

    def check() -> None:
        assert torch.equal(plain(x, w), want)

    orders(check)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [64, 50])
def test_what_follows(inputs: int, dtype: torch.dtype) -> None:
    w, x = normal(1, 37, inputs, dtype=dtype), normal(2, 9, inputs, dtype=dtype)
    sums, shape = x.double() @ w.double().T, (9, 37)
    for op, function in ((1, torch.tanh), (2, torch.sigmoid), (3, lambda s: s.relu().square())):
        for accumulate, out_dtype in ((STORE, dtype), (STORE_FLOAT, torch.float32)):
            out = torch.full(shape, torch.nan, dtype=out_dtype)
            thin(x, w, out, op=op, accumulate=accumulate, scale=0.5)
            want = function(sums / 2)
            assert ((out.double() - want).abs() <= EPS[out_dtype] * want.abs() + 2e-5).all()
    residual, gate = normal(3, *shape), normal(4, *shape, dtype=dtype)
    out = thin(x, w, residual.clone(), accumulate=ADD, scale=256.0)
    assert (out.double() - residual - 256 * sums).abs().max() <= 2e-3
    out = thin(x, w, residual.clone(), gate, accumulate=GATED_ADD)
    assert (out.double() - residual - torch.sigmoid(gate.double()) * sums).abs().max() <= 2e-5
    u, d, mix = normal(5, *shape), normal(6, *shape), normal(7, 37)
    out = thin(x, w, torch.full(shape, torch.nan, dtype=dtype), mix=(u, d, mix), accumulate=MIX)
    want = u.double() + d.double() * (mix.double() + sums)
    assert ((out.double() - want).abs() <= EPS[dtype] * want.abs() + 5e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_apart(dtype: torch.dtype) -> None:
    low, w = normal(1, 5, 160, dtype=dtype), normal(2, 40, 32, dtype=dtype)
    for part in low.chunk(5, 1):
        assert torch.equal(plain(part, w), plain(part.contiguous(), w))


def test_what_is_no_number_stays_in_its_row() -> None:
    for dtype in DTYPES:
        x, w = normal(1, 5, 64, dtype=dtype), normal(2, 20, 64, dtype=dtype)
        x[3, 40] = torch.nan
        assert plain(x, w).isnan().all(1).tolist() == [False, False, False, True, False]
        assert thin(x, w, torch.zeros(5, 20, dtype=dtype), op=3).isnan().any(1).tolist() == [False] * 3 + [True, False]


def test_wrong_arguments() -> None:
    x, w, out = torch.zeros(17, 64), torch.zeros(8, 64), torch.zeros(17, 8)
    with pytest.raises(CudaError, match="size"):
        thin(x, w, out)
    with pytest.raises(CudaError, match="pointer"):
        thin(x[:4], w, out, accumulate=GATED_ADD)
    with pytest.raises(CudaError, match="boundary"):
        thin(torch.zeros(65)[1:].view(1, 64), w, out)
    with pytest.raises(CudaError, match="support"):
        thin(x[:4], w, out, op=4)
    thin(x[:0], w, out[:0])
    thin(x[:3], w[:0], out[:, :0])
