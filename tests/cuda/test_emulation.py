"""The emulation of CUDA on the host: its instructions compute what the GPU's do, and it finds what is wrong."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import _emulated_kernels
import pytest
import torch
from scheduling_orders import ORDERS

HERE = Path(__file__).parent
PLANTED = sorted((HERE / "planted").glob("*.cu"))
VALUE, REPORT = "other values in some order", "a report and an abort"
FOUND = {
    "blocks_in_order": VALUE,
    "lane_missing_in_shuffle": REPORT,
    "missing_arrival": REPORT,
    "missing_barrier": VALUE,
    "missing_empty_barrier": VALUE,
    "missing_syncwarp": VALUE,
    "missing_wait": VALUE,
}


@pytest.fixture(scope="module")
def checks(compiler: None) -> Path:
    return _emulated_kernels.build(sources=[HERE / "emulated_instructions.cu"])


@pytest.fixture(scope="module")
def planted(compiler: None) -> Path:
    return _emulated_kernels.build(sources=PLANTED)


@pytest.fixture(params=ORDERS)
def call(checks: Path, request: pytest.FixtureRequest) -> Callable[..., int]:
    """Calls a function of emulated_instructions.cu, tensors as pointers, with one order of the threads."""
    library = ctypes.CDLL(str(checks))
    library.rwkvmpi_cuda_emulation_order(ctypes.c_uint(request.param))

    def run(name: str, *arguments: torch.Tensor | int) -> int:
        return library[name](*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments))

    return run


def test_conversions(call: Callable[..., int]) -> None:
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (5000,), generator=generator).to(torch.int32)
    near = torch.randn(2000, generator=generator) * torch.logspace(-9, 5, 2000)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504, 65519.99, 65520, -7e4, 2**-24, 2**-25,
                            2**-25 * 1.0001, 1.5 * 2**-24, 2**-14, 1e-45])  # fmt: skip
    ties = (torch.arange(2048, dtype=torch.float32) + 1024.5) * 2  # halfway between neighbours of either type
    x = torch.cat([bits.view(torch.float32), near, special, ties])
    narrow, half = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.float16)
    wide = torch.empty(len(x), 2)
    assert call("check_convert", x, narrow, half, wide, len(x)) == 0
    torch.testing.assert_close(narrow, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(half, x.clamp(-65504, 65504).to(torch.float16), rtol=0, atol=0, equal_nan=True)
    expected = torch.stack([narrow.float(), half.float()], 1)
    torch.testing.assert_close(wide, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(half), torch.signbit(x) & ~x.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(call: Callable[..., int], dtype: torch.dtype) -> None:
    a, b, c = (torch.randn(shape).to(dtype) for shape in ((16, 16), (16, 8), (8, 16)))
    d, e = torch.randn(2, 16, 8)
    expected_d = d.double() + a.double() @ b.double()
    expected_e = e.double() + a.double().T @ c.double().T
    assert call("check_multiply", a, b, c, d, e, 1 if dtype == torch.bfloat16 else 2) == 0
    torch.testing.assert_close(d.double(), expected_d, rtol=0, atol=1e-5)
    torch.testing.assert_close(e.double(), expected_e, rtol=0, atol=1e-5)


def test_exchanges(call: Callable[..., int]) -> None:
    out = torch.zeros(12, 64, dtype=torch.int32)
    assert call("check_exchange", out) == 0
    thread = torch.arange(64)
    lane, warp = thread % 32, thread // 32 * 32
    halves = [torch.stack([thread ^ step for step in (8, 4, 2)]).sum(0), 16 * warp + sum(range(16, 32))]
    expected = [
        warp + 5,
        warp + lane // 8 * 8 + (lane + 1) % 8,
        thread ^ 3,
        torch.where(lane < 2, thread, thread - 2),
        torch.where(lane % 16 < 1, thread, thread - 1),
        torch.where(lane + 3 > 31, thread, thread + 3),
        torch.full((64,), sum(1 << i for i in range(0, 32, 3))),
        torch.stack([(thread * 7 % 64)[first : first + 32].max() for first in (0, 32)]).repeat_interleave(32),
        torch.where(lane < 16, *halves),
        torch.where(lane < 30, 5, 2),
        torch.ones(64),
        torch.full((64,), 63 * 32),
    ]
    for row, wanted in zip(out, expected, strict=True):
        assert row.tolist() == (wanted.long() + 2**31).remainder(2**32).sub(2**31).tolist()


def test_shared_memory_starts_as_nan_and_copies_land_at_the_wait(call: Callable[..., int]) -> None:
    out = torch.zeros(3, 32, dtype=torch.int32)
    assert call("check_poison", torch.randn(32), out) == 0
    assert out.tolist() == 3 * [8 * [7] + 24 * [1]]


def test_limits_of_a_launch(checks: Path) -> None:
    limits = ctypes.CDLL(str(checks)).check_limits
    assert limits(0, 32, 0) == limits(65536, 32, 0) == limits(1, 0, 0) == limits(1, 1025, 0) == 9
    assert limits(1, 32, 227 * 1024 + 1) == 1


def test_launches_from_several_threads(checks: Path) -> None:
    library, wrong = ctypes.CDLL(str(checks)), []

    def work() -> None:
        given, out = torch.randn(32), torch.zeros(3, 32, dtype=torch.int32)
        for _ in range(100):
            out.zero_()
            library.check_poison(ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()))
            if out.tolist() != 3 * [8 * [7] + 24 * [1]]:
                wrong.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("overrun", r"kernel overrun, block \(0,0,0\): it wrote behind its 128 bytes of shared memory"),
        (
            "misaligned",
            r"kernel misaligned, block \(0,0,0\), thread 0: a vector at 0x\w+4, which is not a multiple of 16",
        ),
    ],
)
def test_reports(checks: Path, name: str, words: str) -> None:
    code = "import ctypes; x = ctypes.create_string_buffer(1024); a = ctypes.addressof(x) // 16 * 16 + 16; "
    code += f"ctypes.CDLL({str(checks)!r}).check_{name}(ctypes.c_void_p(a))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -6
    assert re.search(words, done.stderr), done.stderr


def run_planted(library: Path, name: str, wrong: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, HERE / "run_planted.py", library, name, str(int(wrong)), *map(str, ORDERS)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_every_planted_kernel_is_known() -> None:
    assert [path.stem for path in PLANTED] == sorted(FOUND)


@pytest.mark.parametrize("name", FOUND)
def test_planted_errors_are_found(planted: Path, name: str) -> None:
    right = run_planted(planted, name, wrong=False)
    assert right.returncode == 0, right.stderr
    assert len(right.stdout.split()) == len(ORDERS)
    assert len(set(right.stdout.split())) == 1
    wrong = run_planted(planted, name, wrong=True)
    if FOUND[name] == VALUE:
        assert wrong.returncode == 0, wrong.stderr
        assert set(wrong.stdout.split()) - set(right.stdout.split())
    else:
        assert wrong.returncode == -6
        assert "CUDA emulation: " in wrong.stderr


def test_a_deadlock_says_who_waits_where(planted: Path) -> None:
    report = run_planted(planted, "missing_arrival", wrong=True).stderr
    assert "deadlock in kernel halves<true>, block (0,0,0)" in report
    assert "threads 0 to 31 wait at barrier 3 (32 of 64 have come)" in report
    assert "threads 32 to 63 wait at barrier 0 (32 of 64 have come)" in report
