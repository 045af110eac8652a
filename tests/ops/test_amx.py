"""Products on the tile unit of processors with AMX, on any processor.

Twice: the sources compiled with an emulation of the unit (`emulated`), and the real build (`build`), whose instructions
are emulated one by one where the processor has none. What nothing here can show is the speed, and that a processor does
what Intel's manual says.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from amx_builds import HERE, HOST, Trap, call, compiled, is_native, is_the_build, processor_level, product
from torch import Tensor

from rwkvmpi import ops
from rwkvmpi.ops import amx_check, library
from rwkvmpi.ops.product import Packed

BFLOAT16 = torch.bfloat16

# rows, inputs, outputs: one and two tiles of rows, whole and partial ones; inputs that fill tiles, words, neither; one,
# two and more panels, padding; more than one depth of inputs, more rows than wait for the next one, more than a block
# of panels
SHAPES = [
    (1, 64, 64),
    (1, 1, 1),
    (1, 63, 64),
    (2, 31, 33),
    (5, 70, 40),
    (15, 64, 96),
    (16, 96, 7),
    (17, 31, 65),
    (33, 130, 64),
    (64, 2051, 40),
    (300, 1030, 33),
    (34, 1056, 545),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The products compiled for the emulated unit, and amx_checks.cpp."""
    sources = [HOST / "product.cpp", HOST / "product_amx.cpp", HERE / "amx_checks.cpp"]
    built = compiled(tmp_path_factory.mktemp("amx"), "emulated", "-DRWKV_AMX_EMULATION", *sources)
    built.amx_guarded.restype = ctypes.c_void_p
    built.amx_guarded.argtypes = [ctypes.c_int64, ctypes.c_int]
    return built


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trap]:
    if not library.path_of("amx").exists():
        pytest.skip("the build amx is missing: its compiler did not know AMX, or this is another architecture")
    if processor_level() < library.VARIANTS.index("avx512bf16"):
        pytest.skip("the rest of the build amx needs a processor with AVX512_BF16 and AVX512_VNNI")
    if processor_level() >= library.VARIANTS.index("amx"):
        yield Trap(None)
        return
    handler = compiled(tmp_path_factory.mktemp("amx"), "trap", "-mfma", HERE / "amx_trap.cpp")
    assert handler.amx_trap_install() == 0
    yield Trap(handler)
    handler.amx_trap_remove()


@pytest.fixture(params=["emulated", "build"])
def tiles(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """A library whose products of bfloat16 and int8 use the unit."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    request.getfixturevalue("trap")
    return library.open_variant("amx")


def _operands(rows: int, inputs: int, outputs: int, kind: str) -> tuple[Tensor, Tensor, Packed]:
    """x [rows, inputs], weight [outputs, inputs], the weight packed."""
    generator = torch.Generator().manual_seed(rows * inputs + outputs)
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    return x, weight, ops.pack(weight, kind)


def _in_manual_order(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T as tdpbf16ps adds it up: per 16 pairs the even and the odd elements, both sums, then the total.

    A product of two bfloat16 is exact in float32, so that a sum of rounded products is the processor's chain of FMAs.
    """
    padding = -x.shape[1] % 32
    a, b = (torch.nn.functional.pad(t.float(), (0, padding)) for t in (x, weight))
    total = torch.zeros(len(x), len(weight))
    for first in range(0, a.shape[1], 32):
        even, odd = torch.zeros_like(total), torch.zeros_like(total)
        for k in range(first, first + 32, 2):
            even += a[:, k, None] * b[None, :, k]
            odd += a[:, k + 1, None] * b[None, :, k + 1]
        total += even + odd
    return total


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_the_product(tiles: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    x, weight, packed = _operands(*shape, "bfloat16")
    found = product(tiles, x, packed)
    wanted = x.double() @ weight.double().T
    magnitudes = x.double().abs() @ weight.double().abs().T
    assert bool(((found.double() - wanted).abs() <= (shape[1] + 3) * 2.0**-24 * magnitudes).all())
    if not is_native(tiles):
        assert torch.equal(found, _in_manual_order(x, weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_has_the_bits_of_every_build(tiles: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    x, _, packed = _operands(*shape, "int8")
    assert torch.equal(product(tiles, x, packed), product(library.open_variant("portable"), x, packed))


def test_int8_sums_are_exact(tiles: ctypes.CDLL) -> None:
    x, weight, _ = _operands(19, 203, 45, "int8")
    x, weight = (x * 20).round().clamp(-126, 126), (weight * 20).round().clamp(-126, 126)
    x[:, 0], weight[:, 0] = 127, -127  # so that both are their own quantisation
    packed = ops.pack(weight, "int8")
    assert torch.equal(product(tiles, x, packed).double(), x.double() @ weight.double().T)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("inputs", [64, 70, 1100])
def test_a_row_has_the_same_bits_among_any_others(tiles: ctypes.CDLL, kind: str, inputs: int) -> None:
    x, _, packed = _operands(300, inputs, 40, kind)
    every = product(tiles, x, packed)
    for begin, end in ((0, 1), (7, 12), (3, 19), (9, 26), (250, 300), (31, 290)):
        assert torch.equal(product(tiles, x[begin:end], packed), every[begin:end])


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize(("rows", "stride", "offset"), [(40, 1024, 0), (40, 1088, 0), (40, 2051, 3), (1, 1024, 1)])
def test_rows_may_lie_anywhere(tiles: ctypes.CDLL, kind: str, rows: int, stride: int, offset: int) -> None:
    x, _, packed = _operands(rows, 1024, 72, kind)
    room = torch.full((offset + rows * stride,), torch.inf, dtype=BFLOAT16)
    placed = room.as_strided((rows, 1024), (stride, 1), offset)
    placed.copy_(x)
    assert torch.equal(product(tiles, placed, packed), product(tiles, x.clone(), packed))


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_show_in_the_bits(
    request: pytest.FixtureRequest, tiles: ctypes.CDLL, kind: str, threads: int
) -> None:
    x, _, packed = _operands(70, 1100, 170, kind)
    assert torch.equal(product(tiles, x, packed, threads=threads), product(tiles, x, packed))
    one = x[:1].clone()
    assert torch.equal(product(tiles, one, packed, threads=threads), product(tiles, one, packed))
    if is_the_build(tiles):
        assert request.getfixturevalue("trap").configured_units() == 0
    else:
        assert tiles.amx_configured_units() == 0


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_what_follows_the_product(tiles: ctypes.CDLL, kind: str) -> None:
    x, _, packed = _operands(21, 100, 77, kind)
    sums = product(tiles, x, packed)
    narrow = product(tiles, x, packed, out=torch.empty(21, 77, dtype=BFLOAT16), op="relu_squared")
    assert torch.equal(narrow, (sums.relu() ** 2).bfloat16())
    held = torch.linspace(-3, 3, 21 * 77).reshape(21, 77)
    assert torch.equal(product(tiles, x, packed, out=held.clone(), op="add"), held + sums)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_number_stays_in_its_row(tiles: ctypes.CDLL, value: float) -> None:
    for kind in ("bfloat16", "int8"):
        x, _, packed = _operands(20, 70, 40, kind)
        clean = product(tiles, x, packed)
        x[18, 69] = value
        found = product(tiles, x, packed)
        assert not found[18].isfinite().any()
        assert torch.equal(found[:18], clean[:18])
        assert torch.equal(found[19], clean[19])


def _ends_well(child: Callable[[], object]) -> int:
    """Runs it in a child process; the signal that ended it, 0 for none."""
    process = os.fork()
    if process == 0:
        for number in (signal.SIGSEGV, signal.SIGBUS):
            signal.signal(number, signal.SIG_DFL)
        child()
        os._exit(0)
    _, status = os.waitpid(process, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("at_end", [True, False], ids=["before a hole", "behind a hole"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("shape", [*SHAPES[:10], (1, 2048, 64), (40, 1088, 64)], ids=str)
def test_nothing_outside_is_touched(
    emulated: ctypes.CDLL, tiles: ctypes.CDLL, kind: str, shape: tuple[int, int, int], at_end: bool
) -> None:
    x, _, packed = _operands(*shape, kind)
    wanted = product(tiles, x, packed)

    def guarded(tensor: Tensor) -> int:
        size = tensor.numel() * tensor.element_size()
        address = emulated.amx_guarded(size, at_end)
        ctypes.memmove(address, tensor.data_ptr(), size)
        return address

    of_x, of_data, of_out = guarded(x), guarded(packed.data), guarded(torch.zeros_like(wanted))

    def multiply(rows: int = shape[0]) -> None:
        call(tiles, of_x, x.stride(0), rows, packed, of_data, of_out, "none", 1)

    assert _ends_well(multiply) == 0
    multiply()
    found = torch.frombuffer((ctypes.c_char * (4 * wanted.numel())).from_address(of_out), dtype=torch.float32)
    assert torch.equal(found.view_as(wanted), wanted)
    if at_end:
        assert _ends_well(lambda: multiply(shape[0] + 1)) == signal.SIGSEGV


MISTAKES = {
    0: "used before it was configured",
    1: "not palette 1",
    2: "more than 16 rows",
    3: "more than 64 bytes in a row",
    4: "a tile of rows without bytes or bytes without rows",
    5: "reserved bytes of the configuration",
    6: "reserved bytes of the configuration",
    7: "the sums have other rows than the first factor",
    8: "the factors do not fit",
    9: "the sums have other columns than the second factor",
    10: "a tile without rows in the configuration",
    11: "a row that is not made of words",
    12: "rows in memory overlap",
    13: "a tile was stored before it was loaded",
    14: "a tile was stored before it was loaded",
    15: "used before it was configured",
    16: "a tile was used before it was loaded",
    17: "a tile is two operands",
}


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_the_emulation_notices(emulated: ctypes.CDLL, mistake: int | None) -> None:
    number = -1 if mistake is None else mistake
    script = f"import ctypes; ctypes.CDLL({emulated._name!r}).amx_misuse({number})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    expected = (0, "") if mistake is None else (-signal.SIGABRT, f"tile unit: {MISTAKES[mistake]}")
    assert (done.returncode, done.stderr.strip()) == expected


@pytest.mark.parametrize("bfloat16", [True, False])
def test_the_emulation_of_one_instruction(emulated: ctypes.CDLL, bfloat16: bool) -> None:
    rows, groups, outputs = 5, 7, 3
    g = torch.Generator().manual_seed(1)
    if bfloat16:
        x, w = (torch.randn(16, 32, generator=g).bfloat16() for _ in range(2))
        x[:4] = 0  # no denormal counts, and none comes out: in a chain, from x, from the sum before, in the sum
        w[0, :2], w[1, :2] = torch.tensor([2.0**-26, 2.0**-27]), torch.tensor([1e30, 2.0**-27])
        x[0, 1] = x[0, 3] = 2.0**-100
        x[1, 2] = 1e-39
        x[2, 0], x[3, 0] = 2.0**-100, -(2.0**-100)
        before = torch.randn(16, 16, generator=g)
        before[:4, 0] = torch.tensor([0.0, 0.0, 2.0**-127, 1.5 * 2.0**-126])
    else:
        x, w = (torch.randint(-128, 128, (16, 64), generator=g, dtype=torch.int8) for _ in range(2))
        before = torch.randint(-(2**31), 2**31 - 1, (16, 16), generator=g, dtype=torch.int64).int()
    after = before.clone()
    emulated.amx_add(bfloat16, rows, groups, outputs, *(ctypes.c_void_p(t.data_ptr()) for t in (x, w, after)))
    size = 2 if bfloat16 else 4
    pairs = w[:groups].view(groups, 16, size)[:, :outputs]  # [group, output, input of the group]
    factor = x[:rows, : groups * size].view(rows, groups, size)
    wanted = torch.zeros_like(before)
    if bfloat16:
        chains = torch.zeros(2, rows, outputs)
        for k in range(groups):
            for j in range(2):
                exact = factor[:, k, j, None].double() * pairs[None, k, :, j].double()
                exact[factor[:, k, j].double().abs() < 2.0**-126] = 0
                chains[j] = _flushed((chains[j].double() + exact).float())
        both = _flushed(chains[0] + chains[1])
        wanted[:rows, :outputs] = _flushed(_flushed(before[:rows, :outputs]) + both)
        assert wanted[:4, 0].tolist() == [0, 0, 2.0**-126, 0]
    else:
        exact = torch.einsum("mkj,knj->mn", factor.long(), pairs.long())
        wanted[:rows, :outputs] = (exact + before[:rows, :outputs]).int()  # wraps
    assert torch.equal(after, wanted)


def _flushed(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 2.0**-126, 0.0, x)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_the_build_has_the_instructions() -> None:
    if not library.path_of("amx").exists():
        pytest.skip("the build amx is missing")
    code = subprocess.run(["objdump", "-d", library.path_of("amx")], capture_output=True, text=True, check=True).stdout
    for name in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tdpbssd", "tilestored", "tilerelease"):
        assert f"\t{name}" in code, f"no {name}"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="builds for x86-64")
def test_other_builds_have_none_of_them() -> None:
    if shutil.which("objdump") is None or not library.path_of("avx512bf16").exists():
        pytest.skip("no objdump, or no build avx512bf16")
    path = library.path_of("avx512bf16")
    assert "\ttdp" not in subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout


def test_the_build_is_checked_before_it_is_used(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trap.products
    assert amx_check.disagreement("amx", "avx512bf16") is None
    if trap.handler is not None:
        assert trap.products > before
    _pretend(monkeypatch)
    assert library.runnable()[-1] == "amx"


@pytest.mark.parametrize("row", [1, 15], ids=["a row of few", "a row of many"])
def test_a_wrong_processor_falls_back(
    trap: Trap, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, row: int
) -> None:
    if trap.handler is None:
        pytest.skip("this processor's unit is right")
    _pretend(monkeypatch)
    monkeypatch.delenv("RWKVMPI_ISA", raising=False)
    monkeypatch.setattr(library, "_current", None)
    trap.handler.amx_trap_fault(row)
    try:
        with caplog.at_level(logging.WARNING, "rwkvmpi"):
            assert library.current() == "avx512bf16"
            assert library.runnable()[-1] == "avx512bf16"
    finally:
        trap.handler.amx_trap_fault(0)
        library._amx_is_right.cache_clear()
    assert len(caplog.records) == 1
    assert "amx is wrong on this processor" in caplog.text
    assert "avx512bf16 is used instead" in caplog.text


def _pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the processor had the unit, and nobody had asked yet."""
    library._amx_is_right.cache_clear()
    monkeypatch.setattr(library.open_variant("portable"), "rwkvmpi_processor_level", lambda: 4)
