"""The doctor's rows about GPUs, on machines with and without a driver, played by a small library in its place."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rwkvmpi
from rwkvmpi.doctor import gpu_checks
from rwkvmpi.ops.cuda import library

PACKAGE = Path(rwkvmpi.__file__).parents[1]
# The functions of libcuda.so.1 that are used here, with one device, or with the failure that STUB_INIT names.
DRIVER = """
#include <cstdlib>
#include <cstring>
extern "C" {
int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
int cuInit(unsigned) { const char* code = getenv("STUB_INIT"); return code ? atoi(code) : 0; }
int cuGetErrorString(int, const char** text) { *text = "unknown error"; return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int number) { *device = number; return 0; }
int cuDeviceGetName(char* name, int, int) { strcpy(name, "NVIDIA H100 80GB HBM3"); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = size_t{79} << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { *value = attribute == 75 ? 9 : 0; return 0; }
}
"""
PROGRAM = """
from rwkvmpi.doctor import gpu_checks
print([(f.name, f.status, f.value, f.remedy) for f in gpu_checks.gpus()])
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that claims an H100."""
    if shutil.which("g++") is None:
        pytest.skip("no compiler g++")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cpp").write_text(DRIVER)
    command = ["g++", "-shared", "-fPIC", folder / "driver.cpp", "-o", folder / "libcuda.so.1"]
    subprocess.run(command, check=True)
    return folder


def findings(driver: Path, **variables: str) -> list[tuple[str, str, str, str]]:
    """The rows (name, status, value, remedy) of a process that finds this driver."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(PACKAGE)} | variables
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout)


def test_a_gpu_is_described(driver: Path) -> None:
    gpu, *rest = findings(driver)
    value = "0: NVIDIA H100 80GB HBM3, 79.0 GiB, compute capability 9.0; driver for CUDA 13.1"
    assert gpu == ("GPU", "ok", value, "")
    ((name, status, value, remedy),) = rest  # torch here lacks CUDA, or finds that this driver is none
    assert (name, status) == ("GPU operators", "warn")
    assert value.endswith("; runs use the CPU")
    assert remedy


def test_a_driver_that_fails(driver: Path) -> None:
    ((name, status, value, remedy),) = findings(driver, STUB_INIT="999")
    assert (name, status) == ("GPU", "warn")
    assert value == "driver for CUDA 13.1: cuInit failed with code 999, unknown error"
    assert "nvidia-smi" in remedy
    assert findings(driver, STUB_INIT="100") == [
        ("GPU", "ok", "none visible, driver for CUDA 13.1; everything runs on the CPU", "")
    ]


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "driver_version", lambda: None)
    monkeypatch.setattr(gpu_checks, "PCI_DEVICES", tmp_path)
    (finding,) = gpu_checks.gpus()
    assert (finding.name, finding.status) == ("GPU", "ok")
    for number, vendor, kind in (("0", "0x10de", "0x030200"), ("1", "0x10de", "0x040300"), ("2", "0x8086", "0x030000")):
        (tmp_path / number).mkdir()
        (tmp_path / number / "vendor").write_text(f"{vendor}\n")
        (tmp_path / number / "class").write_text(f"{kind}\n")
    (finding,) = gpu_checks.gpus()
    assert (finding.status, finding.value) == ("warn", "1 of NVIDIA in this machine, but no driver")
    assert "driver" in finding.remedy


def test_operators_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "driver_version", lambda: 13000)
    monkeypatch.setattr(gpu_checks, "visible_gpus", lambda: [gpu_checks.Gpu("NVIDIA H200", 141 << 30, (9, 0))] * 2)
    monkeypatch.setattr(library, "reason", lambda device: "")
    monkeypatch.setattr(library, "architectures", lambda: ["sm_90a", "compute_80"])
    monkeypatch.setattr(library, "runtime_version", lambda: 13000)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    *gpus, operators = gpu_checks.gpus()
    assert [gpu.value.partition(",")[0] for gpu in gpus] == ["0: NVIDIA H200", "1: NVIDIA H200"]
    assert "CUDA_VISIBLE_DEVICES=2,3" in gpus[0].value
    assert (operators.status, operators.value.partition(";")[0]) == (
        "ok", "compiled for sm_90a, compute_80, CUDA 13.0 inside"
    )  # fmt: skip
    monkeypatch.setattr(library, "reason", lambda device: "The CUDA operators are not built; compile them." * device)
    *_, operators = gpu_checks.gpus()
    assert (operators.status, operators.remedy) == ("warn", "compile them")
