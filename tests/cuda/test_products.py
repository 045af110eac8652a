"""Products with packed weights on emulated CUDA, through our kernel (up to 16 rows) and through torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvmpi import ops
from rwkvmpi.ops.cuda import product
from rwkvmpi.ops.product import Packed

pytestmark = pytest.mark.usefixtures("kernels")

KINDS = ["float32", "bfloat16", "float16"]
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
OUTPUTS, INPUTS = 37, 40


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(rows: int, kind: str) -> tuple[Tensor, Packed, Tensor]:
    """x, the weight and the exact product."""
    dtype = product.KINDS[kind]
    x, weight = normal(1, rows, INPUTS, dtype=dtype), normal(2, OUTPUTS, INPUTS, dtype=dtype)
    return x, product.pack(weight, kind), x.double() @ weight.double().T


def assert_near(got: Tensor, want: Tensor, rounded: torch.dtype = torch.float32) -> None:
    """Within one rounding of the result and one, to `rounded`, of the sums before it, which reach 30."""
    bound = EPS[got.dtype] * want.abs() + EPS[rounded] * 30
    assert ((got.double() - want).abs() <= bound).all(), (got.double() - want).abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16, 17, 33])
def test_plain_products_and_activations(rows: int, kind: str) -> None:
    x, w, want = case(rows, kind)
    for dtype in {torch.float32, x.dtype}:
        for op, function in (("none", lambda s: s), ("tanh", torch.tanh), ("sigmoid", torch.sigmoid)):
            out = torch.full(want.shape, torch.nan, dtype=dtype)
            product.product_into(out, x, w, op)
            assert_near(out, function(want), dtype)
        out = torch.full(want.shape, torch.nan, dtype=dtype)
        product.product_into(out, x, w, "relu_squared", scale=1 / 16)
        squared = (want.relu() / 16).square()
        bound = 3 * EPS[dtype] * squared + 2e-6  # where the sum is rounded before, its error counts twice
        assert ((out.double() - squared).abs() <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [3, 33])
def test_products_into_the_residual_stream(rows: int, kind: str) -> None:
    x, w, want = case(rows, kind)
    residual, gate = normal(3, rows, OUTPUTS), normal(4, rows, OUTPUTS, dtype=x.dtype)
    for scale in (1.0, 256.0):
        out = residual.clone()
        product.product_into(out, x, w, "add", scale=scale)
        assert (out.double() - residual - scale * want).abs().max() <= scale * 30 * 2e-6
        out = residual.clone()
        product.product_into(out, x, w, "gated_add", gate, scale=scale)
        error = out.double() - residual - torch.sigmoid(gate.double()) * scale * want
        assert error.abs().max() <= scale * 30 * (EPS[x.dtype] if rows > 16 else 2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [3, 33])
def test_mix(rows: int, kind: str) -> None:
    x, w, want = case(rows, kind)
    u, d, mix = normal(3, rows, OUTPUTS), normal(4, rows, OUTPUTS), normal(5, OUTPUTS)
    out = torch.full(want.shape, torch.nan, dtype=x.dtype)
    product.product_into(out, x, w, "mix", None, u, d, mix)
    want = u.double() + d.double() * (mix.double() + want)
    assert ((out.double() - want).abs() <= EPS[x.dtype] * (want.abs() + 30 * d.abs()) + 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_rows_that_lie_apart(rows: int, kind: str) -> None:
    """As the parts of a wider product do; some not on 16 bytes."""
    dtype = product.KINDS[kind]
    wide, w = normal(1, rows, 4 * INPUTS + 1, dtype=dtype), product.pack(normal(2, OUTPUTS, INPUTS), kind)
    for first in (0, INPUTS, 2 * INPUTS + 1):
        part = wide[:, first : first + INPUTS]
        got, want = (torch.full([rows, OUTPUTS], torch.nan) for _ in range(2))
        product.product_into(got, part, w)
        product.product_into(want, part.contiguous(), w)
        assert torch.equal(got, want)


def test_float16_relu_squared_stays_in_range() -> None:
    """Sums of 1000, whose squares float16 does not hold; what comes after undoes the scale."""
    for rows in (2, 20):
        x, key = torch.full((rows, 40), 5.0, dtype=torch.float16), product.pack(torch.full((16, 40), 5.0), "float16")
        squares, out = torch.empty(rows, 16, dtype=torch.float16), torch.ones(rows, 8)
        scale = ops.relu_squared_scale(torch.float16)
        product.product_into(squares, x, key, "relu_squared", scale=scale)
        value = product.pack(torch.full((8, 16), 2.0**-10), "float16")
        product.product_into(out, squares, value, "add", scale=1 / scale**2)
        want = 1 + 1e6 * 16 * 2.0**-10
        assert ((out - want).abs() <= 2**-11 * want).all()
    assert ops.relu_squared_scale(torch.bfloat16) == 1.0


def test_pack() -> None:
    weight = normal(1, 24, 37)
    for kind in KINDS:
        dtype = product.KINDS[kind]
        packed = product.pack(weight.t(), kind)  # any strides
        assert packed.data.numel() == product.packed_bytes(kind, 37, 24)
        assert torch.equal(product.matrix(packed), weight.t().to(dtype))
        memory = torch.empty(4096, dtype=torch.uint8)[: packed.data.numel()]
        assert product.pack(weight.t(), kind, memory).data.data_ptr() == memory.data_ptr()
        assert torch.equal(memory, packed.data)
    with pytest.raises(ValueError, match="int8"):
        product.pack(weight, "int8")
    with pytest.raises(ValueError, match="larger than float16"):
        product.pack(weight * 1e6, "float16")
    with pytest.raises(ValueError, match="out must be uint8"):
        product.pack(weight, "float32", torch.empty(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="16 bytes"):
        product.pack(weight, "float16", torch.empty(4096, dtype=torch.uint8)[1 : 1 + 24 * 37 * 2])
