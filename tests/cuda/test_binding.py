"""Calls into the CUDA operators: what is passed, what comes back as which error, and which library answers.

A small library in C++ plays the compiled operators; no GPU is needed.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkvmpi.errors import UserError
from rwkvmpi.ops import library as cpu_library
from rwkvmpi.ops import registry
from rwkvmpi.ops.cuda import library

ROOT = Path(__file__).parents[2]
STUB = """
#include <cstdint>
extern "C" {
const char* rwkvmpi_cuda_error_text(int code) { return code == 700 ? "an illegal memory access" : "something else"; }
const char* rwkvmpi_cuda_architectures() { return "sm_90a.compute_80"; }
int rwkvmpi_cuda_version() { return 13000; }
// x[0] = everything that came, where it came; y may be null
int rwkvmpi_cuda_echo(float* x, const int64_t* y, int64_t n, int i, float f, int device, void* stream) {
  if (!x) return -1;
  x[0] = static_cast<float>(n);
  x[1] = static_cast<float>(i);
  x[2] = f;
  x[3] = y ? static_cast<float>(y[0]) : -1;
  x[4] = static_cast<float>(device);
  x[5] = stream ? 1 : 0;
  return 0;
}
int rwkvmpi_cuda_fail(const float*, int code, int, void*) { return code; }
int64_t rwkvmpi_cuda_room(int64_t rows, int dtype) { return (rows << 33) + dtype; }
}
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no compiler g++")
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.cpp").write_text(STUB)
    command = ["g++", "-shared", "-fPIC", folder / "stub.cpp", "-o", folder / "stub.so"]
    subprocess.run(command, check=True)
    return folder / "stub.so"


@pytest.fixture
def emulation(stub: Path) -> Iterator[None]:
    with library.emulated(stub):
        yield


def test_arguments_arrive(emulation: None) -> None:
    echo = library.bind("echo", "pplif")
    x, y = torch.zeros(6), torch.tensor([12])
    assert echo(x, y, 1 << 23, -3, 0.5) is None
    assert x.tolist() == [1 << 23, -3, 0.5, 12, 0, 0]
    echo(x.data_ptr(), None, 0, 2, 0.0)
    assert x[3] == -1
    assert library.bind_number("room", "li")(3, 2) == (3 << 33) + 2


def test_codes_become_sentences(emulation: None) -> None:
    fail = library.bind("fail", "pi")
    x = torch.zeros(1)
    sentences = set()
    for code in range(-7, 0):
        with pytest.raises(library.CudaError, match=rf"^fail: [^\n]+ \(code {code}\)$") as caught:
            fail(x, code)
        assert caught.value.code == code
        sentences.add(str(caught.value).partition(" (code")[0])
    assert len(sentences) == 7
    with pytest.raises(library.CudaError, match=r"fail: an illegal memory access .CUDA error 700; .*LAUNCH_BLOCKING"):
        fail(x, 700)
    with pytest.raises(library.CudaError, match="a pointer is missing"):
        library.bind("echo", "pplif")(None, x, 0, 0, 0.0)


@pytest.mark.parametrize("code", [35, 100, 209, 222])
def test_a_gpu_that_cannot_run_them_is_the_users_matter(emulation: None, code: int) -> None:
    with pytest.raises(UserError, match=r".*; .*\.$"):
        library.bind("fail", "pi")(torch.zeros(1), code)


def test_where_the_tensors_are(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = torch.zeros(8)
    assert not library.takes(on_cpu)
    with library.emulated(stub):
        assert library.takes(on_cpu)
        assert not library.takes(on_cpu.to("meta"))
        assert library.emulating()
    assert not library.emulating()
    monkeypatch.setattr(library, "PATH", stub)
    for arguments in ((on_cpu, 0), (None, 0)):
        with pytest.raises(ValueError, match="fail: the tensors must be on a GPU"):
            library.bind("fail", "pi")(*arguments)


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    number = 1

    @property
    def is_cuda(self) -> bool:
        return True

    def get_device(self) -> int:
        return self.number


def test_the_gpu_and_its_stream_are_passed(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(8).as_subclass(OnGpu)
    echo, y = library.bind("echo", "pplif"), torch.zeros(1, dtype=torch.int64).as_subclass(OnGpu)
    asked: list[int] = []
    monkeypatch.setattr(library, "PATH", stub)
    monkeypatch.setattr(library, "_raw_stream", lambda device: asked.append(device) or 0x1000)
    assert library.takes(x)
    echo(x, y, 1, 1, 1.0)
    assert x.as_subclass(torch.Tensor)[4:6].tolist() == [1, 1]
    assert asked == [1]
    y.number = 0
    with pytest.raises(ValueError, match="echo: all tensors must be on one device"):
        echo(x, y, 1, 1, 1.0)
    with library.emulated(stub), pytest.raises(ValueError, match="echo: the tensors must be on the CPU"):
        echo(x, None, 1, 1, 1.0)


def test_the_library_in_use_changes_with_the_context(stub: Path, tmp_path: Path) -> None:
    other = shutil.copy(stub, tmp_path / "other.so")
    fail, x = library.bind("fail", "pi"), torch.zeros(1)
    with library.emulated(stub):
        fail(x, 0)
        with library.emulated(other):
            fail(x, 0)
            assert library.load()._name == str(other)
        assert library.load()._name == str(stub)
        with pytest.raises(RuntimeError, match="x"), library.emulated(other):
            raise RuntimeError("x")
        assert library.load()._name == str(stub)
        assert library.architectures() == ["sm_90a", "compute_80"]
        assert library.runtime_version() == 13000
    with library.emulated(tmp_path / "absent.so"), pytest.raises(UserError, match=r"absent.so are not built; .*setup"):
        fail(x, 0)
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with library.emulated(tmp_path / "broken.so"), pytest.raises(UserError, match="cannot be loaded"):
        fail(x, 0)
    with library.emulated(stub), pytest.raises(UserError, match="older than this program"):
        library.bind("of_tomorrow", "p")(x)


def test_a_process_that_is_emulated_from_its_start(stub: Path) -> None:
    program = (
        "import torch; from rwkvmpi.ops.cuda import library as l; print(l.takes(torch.ones(1)), l.load()._name,"
        " l.available())"
    )
    environment = os.environ | {library.EMULATION_VARIABLE: str(stub), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["True", str(stub)]


def test_a_recording_refuses_calls_that_it_cannot_replay(emulation: None) -> None:
    with cpu_library.recording() as calls, pytest.raises(RuntimeError, match="fail cannot be recorded"):
        library.bind("fail", "pi")(torch.zeros(1), 0)
    assert calls == []


@pytest.mark.parametrize(
    ("compiled", "capability", "runs"),
    [
        ("sm_80", (8, 0), True), ("sm_80", (8, 9), True), ("sm_86", (8, 0), False), ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True), ("sm_90a", (10, 0), False), ("sm_100", (10, 3), True), ("sm_100", (12, 0), False),
        ("sm_120", (12, 1), True), ("compute_80", (7, 5), False), ("compute_80", (8, 0), True),
        ("compute_80", (13, 0), True), ("compute_90a", (10, 0), False), ("compute_100f", (10, 3), True),
        ("compute_100f", (11, 0), False), ("sm_80 sm_90a", (9, 0), True), ("", (9, 0), False), ("x", (9, 0), False),
    ],
)  # fmt: skip
def test_which_code_runs_where(compiled: str, capability: tuple[int, int], runs: bool) -> None:
    assert library.runs_on(compiled.split(), capability) is runs


def test_why_there_are_no_gpu_operators(stub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each thing that can be missing, in the order in which it is looked for, each told with a remedy."""

    def why() -> str:
        assert not library.available()
        with pytest.raises(UserError) as caught:
            library.require()
        sentence = str(caught.value)
        assert sentence == library.reason(0)
        assert "; " in sentence
        assert sentence.endswith(".")
        assert "\n" not in sentence
        return sentence

    monkeypatch.setattr(library, "driver_version", lambda: None)
    assert "no NVIDIA driver" in why()
    monkeypatch.setattr(library, "driver_version", lambda: 12080)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in why()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(library, "PATH", tmp_path / "_cuda.so")
    assert "are not built" in why()
    monkeypatch.setattr(library, "PATH", stub)
    assert "knows CUDA up to 12.8, but torch and the operators need 13.0" in why()
    monkeypatch.setattr(library, "driver_version", lambda: 13000)
    gpu = SimpleNamespace(
        is_available=lambda: False,
        get_device_capability=lambda device: (9, 0),
        get_device_name=lambda device: "NVIDIA H100",
    )
    monkeypatch.setattr(torch, "cuda", gpu)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "nvidia-smi" in why()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES= hides" in why()
    gpu.is_available = lambda: True
    gpu.get_device_capability = lambda device: (7, 0)
    assert "compiled for sm_90a, compute_80, not for NVIDIA H100 (compute capability 7.0)" in why()
    assert "--device cpu" in why()
    monkeypatch.setattr(library, "runs_on", lambda compiled, capability: False)
    gpu.get_device_capability = lambda device: (12, 1)
    assert "RWKVMPI_CUDA_ARCHITECTURES=121 " in why()
    monkeypatch.undo()
    assert not library.emulating()


def test_operators_choose_their_body(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body for GPUs is imported at its first use; both the operator itself and `into` choose by the tensor."""
    module = SimpleNamespace(doubled=lambda out, x, power: out.copy_(2 * x))
    monkeypatch.setitem(sys.modules, "rwkvmpi.ops.cuda.of_a_test", module)

    @registry.operator(
        "of_a_test(Tensor x, float power) -> Tensor", lambda x, power: torch.empty_like(x), "of_a_test:doubled"
    )
    def powers(out: torch.Tensor, x: torch.Tensor, power: float) -> None:
        out.copy_(x**power)

    x, out = torch.tensor([3.0]), torch.zeros(1)
    assert powers(x, 2.0).item() == 9
    powers.into(out, x, 2.0)
    assert out.item() == 9
    with library.emulated(stub):
        assert powers(x, 2.0).item() == 6
        powers.into(out, x, 2.0)
        assert out.item() == 6
        assert powers(x.to("meta"), 2.0).device.type == "meta"
    assert math.isclose(torch.ops.rwkvmpi.of_a_test(x, 0.5).item(), math.sqrt(3), rel_tol=1e-6)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("rwkvmpi::of_a_test", "CUDA")


def test_operators_import_no_body_for_gpus() -> None:
    program = "import sys, rwkvmpi.ops; print([m for m in sys.modules if m.startswith('rwkvmpi.ops.cuda.')])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop(library.EMULATION_VARIABLE, None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['rwkvmpi.ops.cuda.library']"
