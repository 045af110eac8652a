"""How setup.py finds and uses nvcc, and what the compiler reported about the kernels; a build needs no GPU."""

from __future__ import annotations

import ctypes
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import setuptools
from setuptools.errors import CompileError

from rwkvmpi.ops.cuda import library

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build/cuda/report.txt"
REBUILD = "python setup.py build_ext --inplace"
# Kernels that may use memory of their own in spite of its price, as a pattern of their names: the reason.
MEMORY_ALLOWED = {
    r"wkv6_backward_kernelI.*Li0EE": "head sizes above 64, which no released RWKV-5 or 6 has: a few spilled registers",
}
NVCC = """#!/bin/sh
echo "$@" >>{log}
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
--list-gpu-code) printf 'sm_80\\nsm_90\\nsm_100\\n' ;;
*)
    while [ $# -gt 1 ]; do
        [ "$1" = -o ] && touch "$2" && printf '%s : %s \\\\\\n %s\\n' "$2" {source} {header} >"${{2%.o}}.d"
        shift
    done
    echo "ptxas info    : 0 bytes gmem" ;;
esac
"""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names in setup.py, which sets nothing up this time."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **settings: None)
    for name in ("RWKVMPI_NVCC", "RWKVMPI_CUDA", "RWKVMPI_CUDA_ARCHITECTURES", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def fake_nvcc(folder: Path, release: str = "13.0") -> Path:
    """An nvcc that notes how it is called and makes empty objects."""
    path = folder / "bin/nvcc"
    path.parent.mkdir(parents=True)
    names = {name: str(folder / file) for name, file in (("log", "log"), ("source", "a.cu"), ("header", "a.cuh"))}
    path.write_text(NVCC.format(release=release, **names))
    path.chmod(0o755)
    return path


def test_where_nvcc_is_looked_for(build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path, home, wheel = (fake_nvcc(tmp_path / name) for name in ("path", "home", "site/nvidia/cu13"))
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert build["find_nvcc"]() == str(on_path)
    monkeypatch.setenv("CUDA_HOME", str(home.parents[1]))
    assert build["find_nvcc"]() == str(home)
    monkeypatch.setenv("RWKVMPI_NVCC", "/named/nvcc")
    assert build["find_nvcc"]() == "/named/nvcc"
    for name in ("RWKVMPI_NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: str(path).startswith(str(tmp_path)) and Path(path).exists())
    with pytest.raises(LookupError, match="no nvcc in RWKVMPI_NVCC, CUDA_HOME, PATH"):
        build["find_nvcc"]()
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert build["find_nvcc"]() == str(wheel)


def test_the_gpus_to_compile_for(
    build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("RWKVMPI_NVCC", str(fake_nvcc(tmp_path)))
    _, flags, names = build["cuda_compiler"]()
    assert names == ["sm_80", "sm_90a", "sm_100", "compute_80"]
    assert flags[1:] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    assert "not compiled for sm_120: " in capsys.readouterr().out
    for wanted, expected in (("90a", ["sm_90a"]), ("100, 90", ["sm_100", "sm_90", "compute_90"])):
        monkeypatch.setenv("RWKVMPI_CUDA_ARCHITECTURES", wanted)
        assert build["cuda_compiler"]()[2] == expected
    monkeypatch.setenv("RWKVMPI_CUDA_ARCHITECTURES", "77")
    with pytest.raises(LookupError, match="none of the GPUs asked for"):
        build["cuda_compiler"]()
    monkeypatch.setenv("RWKVMPI_NVCC", str(fake_nvcc(tmp_path / "old", release="11.8")))
    with pytest.raises(LookupError, match=r"older than 12\.0"):
        build["cuda_compiler"]()
    monkeypatch.setenv("RWKVMPI_NVCC", "/nowhere/nvcc")
    with pytest.raises(LookupError, match="does not run"):
        build["cuda_compiler"]()


def test_a_file_is_compiled_when_something_changed(build: dict[str, Any], tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path)
    build["compile_cuda"].__globals__["CUDA_BUILD"] = tmp_path
    source, header = tmp_path / "a.cu", tmp_path / "a.cuh"
    for path in (source, header):
        path.touch()
        os.utime(path, (1, 1))

    def compiled(*flags: str, force: bool = False) -> bool:
        before = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
        assert build["compile_cuda"](source, [str(nvcc), *flags], force) == tmp_path / "a.o"
        return (tmp_path / "log").read_text() != before

    assert compiled()
    assert not compiled()
    assert (tmp_path / "a.txt").read_text() == f"== {source}\nptxas info    : 0 bytes gmem\n"
    assert compiled("-G")
    assert not compiled("-G")
    os.utime(header, (2e9, 2e9))
    assert compiled("-G")
    os.utime(header, (1, 1))
    assert not compiled("-G")
    assert compiled("-G", force=True)
    header.unlink()
    assert compiled("-G")
    nvcc.write_text("#!/bin/sh\necho a.cu is wrong\nexit 1\n")
    for _ in range(2):  # a failure leaves nothing behind that looks like success
        with pytest.raises(CompileError, match="cu is wrong"):
            compiled("-G")


class Kernel(NamedTuple):
    """What ptxas said of one kernel for one GPU, in bytes."""

    source: str
    name: str
    gpu: str
    stack: int
    stores: int
    loads: int


def kernels_of(report: str) -> list[Kernel]:
    """The kernels in a report of `-Xptxas -v`."""
    found, source = [], ""
    pattern = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
    numbers = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
    entry: tuple[str, str] | None = None
    for line in report.splitlines():
        if line.startswith("== "):
            source = line[3:]
        elif match := pattern.search(line):
            entry = match[1], match[2]
        elif entry and (match := numbers.search(line)):
            found.append(Kernel(source, *entry, *map(int, match.groups())))
            entry = None
    return found


@pytest.fixture(scope="module")
def report() -> str:
    if not REPORT.exists():
        pytest.skip(f"the kernels were not compiled here (where there is an nvcc: {REBUILD})")
    newest = max((*ROOT.glob("cuda/*.cu"), *ROOT.glob("cuda/*.cuh")), key=lambda path: path.stat().st_mtime)
    assert newest.stat().st_mtime <= REPORT.stat().st_mtime, f"{newest.name} changed since the build; run {REBUILD}"
    return REPORT.read_text()


def test_no_kernel_spills(report: str) -> None:
    """Registers that do not suffice go to memory, and arrays that are indexed at run time lie there: both are slow."""
    kernels = kernels_of(report)
    assert kernels
    found = [kernel for kernel in kernels if kernel.stores or kernel.loads or kernel.stack]
    found = [kernel for kernel in found if not any(re.search(pattern, kernel.name) for pattern in MEMORY_ALLOWED)]
    assert not found, "\n".join(map(str, found))


def test_every_source_was_compiled_for_every_gpu(report: str) -> None:
    kernels = kernels_of(report)
    gpus = {kernel.gpu for kernel in kernels}
    names = {(kernel.source, kernel.name) for kernel in kernels}
    assert {(kernel.source, kernel.name, kernel.gpu) for kernel in kernels} == {
        (source, name, gpu) for source, name in names for gpu in gpus
    }
    sources = {f"cuda/{path.name}" for path in ROOT.glob("cuda/*.cu")}
    assert set(re.findall(r"^== (.*)$", report, re.M)) == sources
    for source in sources - {kernel.source for kernel in kernels}:
        assert "__global__" not in (ROOT / source).read_text()


def test_the_report_is_understood() -> None:
    text = (
        "== cuda/a.cu\nptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function '_Z3bigPfi' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z3bigPfi\n"
        "    256 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 30 registers, used 0 barriers, 256 bytes cumulative stack size\n"
        "ptxas info    : Function properties for _Z6helperv\n"
        "    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    )
    assert kernels_of(text) == [Kernel("cuda/a.cu", "_Z3bigPfi", "sm_90a", 256, 4, 8)]


@pytest.fixture(scope="module")
def compiled(report: str) -> ctypes.CDLL:
    if not library.PATH.exists():
        pytest.skip(f"{library.PATH} is not built")
    return library._open(library.PATH)


def test_the_library_answers_without_a_gpu(compiled: ctypes.CDLL) -> None:
    names = compiled.rwkvmpi_cuda_architectures().decode().split(".")
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", name) for name in names)
    assert compiled.rwkvmpi_cuda_version() >= 12000
    assert compiled.rwkvmpi_cuda_error_text(700) == b"an illegal memory access was encountered"
    assert compiled.rwkvmpi_cuda_error_text(123456)


def test_the_runtime_inside_stays_inside(compiled: ctypes.CDLL) -> None:
    """torch brings a CUDA runtime of its own; were ours visible, calls of one could end up in the other."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    command = ["nm", "-D", "--defined-only", compiled._name]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split()[-1] for line in lines]
    assert len([name for name in names if name.startswith("rwkvmpi_cuda_")]) >= 3
    assert [name for name in names if name.startswith(("cuda", "__cuda", "cu"))] == []
    needed = subprocess.run(
        ["nm", "-D", "--undefined-only", compiled._name], capture_output=True, text=True, check=True
    )
    assert "cudaLaunchKernel" not in needed.stdout
