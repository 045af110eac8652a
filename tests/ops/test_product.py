"""Products with packed weights: against float64 and whole numbers, and every bit against every other way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkvmpi.ops import library
from rwkvmpi.ops.product import pack, product, product_into

KINDS = ("float32", "bfloat16", "int8")
EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu_squared": lambda x: torch.relu(x).square(),
}
# Inputs, outputs: tails of both; and several blocks of panels, rows whose stride suits no cache, several parts of the
# inputs.
SIZES = [(k, n) for k in (1, 2, 3, 31, 33, 64, 65, 768) for n in (1, 5, 31, 32, 33, 100)]
LARGE_SIZES = [(515, 600), (1024, 70), (1700, 545), (3300, 40)]


def operands(rows: int, inputs: int, outputs: int, kind: str) -> tuple[Tensor, Tensor]:
    """x [rows, inputs] in the kind's dtype; the weight [outputs, inputs], float32."""
    generator = torch.Generator().manual_seed(rows + 1000 * inputs + outputs)
    x = torch.randn(rows, inputs, generator=generator)
    return x if kind == "float32" else x.bfloat16(), torch.randn(outputs, inputs, generator=generator)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per row: whole numbers in -127..127 as float64, and the float32 scale [rows, 1]."""
    most = x.float().abs().amax(1, keepdim=True)
    return torch.round(x.float() * (torch.tensor(127.0) / most)).double(), most / torch.tensor(127.0)


def check_values(got: Tensor, x: Tensor, weight: Tensor, kind: str) -> None:
    """No larger error than rounding every step of the sum makes: a missing or doubled element makes a larger one."""
    if kind == "int8":
        (a, a_scale), (b, b_scale) = quantised(x), quantised(weight)
        assert torch.equal(got, (a @ b.T).float() * (a_scale * b_scale.T))
        return
    a, b = x.double(), (weight.bfloat16() if kind == "bfloat16" else weight).double()
    bound = (x.shape[1] + 2) * 2.0**-24 * (a.abs() @ b.abs().T)
    assert bool(((got.double() - a @ b.T).abs() <= bound).all())


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, also -0 and NaN."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [SIZES, LARGE_SIZES], ids=["tails", "blocks"])
def test_values_and_rows(sizes: list[tuple[int, int]], kind: str, isa: str) -> None:
    """The sums are right, and a row's bits are the same among any number of rows."""
    for inputs, outputs in sizes:
        x, weight = operands(100, inputs, outputs, kind)
        w = pack(weight, kind)
        every = product(x, w)
        check_values(every, x, weight, kind)
        for rows in (1, 2, 11, 12, 13, 31, 33):
            assert same(product(x[100 - rows :], w), every[100 - rows :]), (inputs, outputs, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_row_alone_and_threads(kind: str, isa: str) -> None:
    x, weight = operands(300, 768, 400, kind)
    w = pack(weight, kind)
    every = product(x, w)
    for row in (0, 137, 299):
        assert same(product(x[row : row + 1], w), every[row : row + 1])
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same(pack(weight, kind).data.view(torch.float32), w.data.view(torch.float32))
        for rows in (1, 5, 30, 300):
            assert same(product(x[:rows], w), every[:rows])


@pytest.mark.parametrize("kind", KINDS)
def test_every_build_gives_the_same_bits(kind: str) -> None:
    """But portable, which rounds products before it adds them, and the tile unit's other order of bfloat16 sums."""
    other = {"int8": [], "float32": ["portable"], "bfloat16": ["portable", "amx"]}[kind]
    builds = [variant for variant in library.runnable() if variant not in other]
    for rows, inputs, outputs in ((1, 100, 70), (37, 769, 65), (50, 2050, 33), (50, 99, 40)):
        x, weight = operands(rows, inputs, outputs, kind)
        if inputs == 99:  # sums that are flushed to zero now and then
            x, weight = x * 2e-20, weight * 2e-20
        found = {}
        for build in builds:
            with library.use(build):
                w = pack(weight, kind)
                found[build] = (product(x, w), w.data, product(x, w, "tanh"))
        first = found[builds[-1]]
        for build, results in found.items():
            assert same(results[0], first[0]), build
            assert torch.equal(results[1], first[1]), build
            assert build == "portable" or same(results[2], first[2]), build


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", [64, 77])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_epilogues(kind: str, rows: int, outputs: int, isa: str) -> None:
    """Each is a function of the sum before it is rounded, and bfloat16 is rounded once."""
    x, weight = operands(rows, 50, outputs, kind)
    w = pack(weight, kind)
    sums = product(x, w)
    for op, function in EPILOGUES.items():
        found = product(x, w, op)
        torch.testing.assert_close(found.double(), function(sums.double()), rtol=3e-7, atol=1e-30)
        assert torch.equal(product(x, w, op, torch.bfloat16), found.bfloat16()), op
    assert torch.equal(product(x, w, "none", torch.bfloat16), sums.bfloat16())
    held, gate, u, d = (torch.randn(rows, outputs) for _ in range(4))
    mix = torch.randn(outputs)
    out = held.clone()
    assert product(x, w, "add", out=out) is out
    assert same(out, held + sums)
    out = held.clone()
    product(x, w, "gated_add", gate=gate, out=out)
    torch.testing.assert_close(out.double(), held.double() + torch.sigmoid(gate.double()) * sums, rtol=1e-6, atol=1e-5)
    mixed = product(x, w, "mix", u=u, d=d, mix=mix)
    torch.testing.assert_close(mixed.double(), u.double() + d.double() * (mix.double() + sums), rtol=1e-6, atol=1e-5)
    assert torch.equal(product(x, w, "mix", torch.bfloat16, u=u, d=d, mix=mix), mixed.bfloat16())


@pytest.mark.parametrize("op", EPILOGUES)
def test_functions_over_their_whole_range(op: str, isa: str) -> None:
    """Of x itself: its product with 1. Also where they saturate, near 0 and for what is not finite."""
    sizes = torch.logspace(-37, 1.9, 3000, dtype=torch.float64).float()
    x = torch.cat([sizes, -sizes, torch.tensor([0.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])]).unsqueeze(1)
    exact = EPILOGUES[op](x.double())
    exact = torch.where(exact.abs() < 2.0**-126, 0.0, exact)
    found = product(x, pack(torch.ones(1, 1), "float32"), op)
    torch.testing.assert_close(found, exact.float(), rtol=3e-7, atol=2.0**-126, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["none", "tanh"])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 33), (3, 64), (40, 33), (40, 600)])
def test_all_of_the_output_is_written_and_nothing_else(kind: str, op: str, rows: int, outputs: int, isa: str) -> None:
    x, weight = operands(rows, 70, outputs, kind)
    w = pack(weight, kind)
    for dtype in (torch.float32, torch.bfloat16):
        room = torch.full([rows * outputs + 200], torch.nan, dtype=dtype)
        product_into(room[100:-100].view(rows, outputs), x, w, op)
        assert torch.equal(room[100:-100].view(rows, outputs), product(x, w, op, dtype))
        assert bool(room[:100].isnan().all())
        assert bool(room[-100:].isnan().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [1, 7, 33, 64, 127, 700])
def test_rows_may_lie_apart(kind: str, inputs: int, isa: str) -> None:
    """What lies between the rows (NaN) is not read into any sum, whatever the row's alignment."""
    x, weight = operands(30, inputs, 40, kind)
    w = pack(weight, kind)
    wanted = product(x, w)
    for gap, offset in ((1, 0), (2, 1), (3, 3), (1024 - inputs % 1024, 0)):
        room = torch.full([offset + 30 * (inputs + gap) + 1], torch.nan, dtype=x.dtype)
        apart = room.as_strided((30, inputs), (inputs + gap, 1), offset)
        apart.copy_(x)
        assert same(product(apart, w), wanted)
        assert same(product(apart[5:6], w), wanted[5:6])
    repeated = x[:1].expand(20, inputs)
    assert same(product(repeated, w), wanted[:1].expand(20, 40).contiguous())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_stays_in_its_row(kind: str, value: float, isa: str) -> None:
    x, weight = operands(14, 70, 40, kind)
    w = pack(weight, kind)
    clean = product(x, w)
    x[9, 69] = value
    found = product(x, w)
    assert not found[9].isfinite().any()
    found[9] = clean[9]
    assert same(found, clean)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_numbers(kind: str, isa: str) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    w = pack(torch.ones(3, 8), kind)
    zeros = product(torch.zeros(2, 8, dtype=dtype), w)
    assert same(zeros, torch.zeros(2, 3))
    denormal = product(torch.full([2, 8], 1e-39).to(dtype), w)
    assert same(denormal, torch.zeros(2, 3))
    for size in (1e-30, 1e30, 2.0**124):
        x = torch.full([2, 8], size).to(dtype)
        torch.testing.assert_close(product(x, w).double(), x.double().sum(1, keepdim=True).expand(2, 3))
    assert same(product(torch.ones(2, 8, dtype=dtype), pack(torch.zeros(3, 8), kind)), torch.zeros(2, 3))
    if kind != "int8":
        overflow = product(torch.full([1, 8], 3e38).to(dtype), w)
        assert bool(overflow.isinf().all())


@pytest.mark.parametrize("kind", KINDS)
def test_callers_denormal_mode_changes_nothing(kind: str, isa: str) -> None:
    x, weight = operands(13, 100, 40, kind)
    x, weight = x * 1e-20, weight * 1e-18
    wanted = product(x, pack(weight, kind))
    torch.set_flush_denormal(True)
    try:
        found = product(x, pack(weight, kind))
    finally:
        torch.set_flush_denormal(False)
    assert same(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 8, 5), (3, 0, 5), (3, 8, 0)])
def test_nothing_to_do(kind: str, rows: int, inputs: int, outputs: int, isa: str) -> None:
    x, weight = operands(rows, inputs, outputs, kind)
    w = pack(weight, kind)
    assert same(product(x, w), torch.zeros(rows, outputs))
    held = torch.randn(rows, outputs)
    assert same(product(x, w, "add", out=held.clone()), held)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 300),
    st.integers(1, 150),
    st.sampled_from(KINDS),
    st.integers(0, 5),
    st.booleans(),
)
def test_any_shape(rows: int, inputs: int, outputs: int, kind: str, gap: int, transposed: bool) -> None:
    x, weight = operands(rows, inputs, outputs, kind)
    apart = torch.full([rows, inputs + gap], torch.nan, dtype=x.dtype)
    apart[:, :inputs] = x
    w = pack(weight.t().contiguous().t() if transposed else weight, kind)
    check_values(product(apart[:, :inputs], w), x, weight, kind)


def test_torchs_own_checks_of_the_registration() -> None:
    x, u, mix = torch.randn(4, 8), torch.randn(4, 5), torch.randn(5)
    data = pack(torch.randn(5, 8), "float32").data
    for operator, arguments in [
        (torch.ops.rwkvmpi.product, (x, data, "float32", 5, "tanh", torch.bfloat16, None, None, None)),
        (torch.ops.rwkvmpi.product, (x, data, "float32", 5, "mix", torch.float32, u, u, mix)),
        (torch.ops.rwkvmpi.product_add, (u, x, data, "float32", 5, None)),
        (torch.ops.rwkvmpi.product_add, (u, x, data, "float32", 5, torch.randn(4, 5))),
    ]:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
