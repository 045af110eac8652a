"""The compiled CUDA operators: whether they can run here, why not, and how to call into them.

The library is built from cuda/*.cu and carries the CUDA runtime inside; it shares the GPU's context and the streams
with torch. For tests the same sources can be compiled as C++ for the host: `emulated`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from rwkvmpi.errors import UserError
from rwkvmpi.ops import library as cpu_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # in the order of the C functions' numbers
PATH = Path(__file__).parents[1] / "_cuda.so"
EMULATION_VARIABLE = "RWKVMPI_CUDA_EMULATION"

_REBUILD = "compile it where nvcc is: RWKVMPI_CUDA=1 python setup.py build_ext --inplace"
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
_OWN_ERRORS = {
    -1: "a pointer is missing",
    -2: "a size is negative or too large",
    -3: "it does not know this dtype",
    -4: "a tensor does not lie on the boundary in memory that it needs",
    -5: "the rows of a tensor overlap or lie too far apart",
    -6: "it does not support this combination of sizes and dtypes",
}
_CANNOT_RUN_HERE = (35, 100, 209, 222, 803, 804)  # driver too old, no device, code or PTX for another GPU

# The stream's address alone; torch.cuda.current_stream takes ten times as long to build an object around it.
_raw_stream: Callable[[int | None], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)
_emulation: Path | None = Path(os.environ[EMULATION_VARIABLE]) if os.environ.get(EMULATION_VARIABLE) else None


class CudaError(RuntimeError):
    """A CUDA operator refused its arguments (code < 0) or CUDA failed (code > 0)."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


def takes(tensor: torch.Tensor) -> bool:
    """Whether operators on this tensor run their CUDA bodies: it lies on a GPU, or they are emulated."""
    return tensor.is_cuda or (_emulation is not None and tensor.device.type == "cpu")


@contextlib.contextmanager
def emulated(path: Path | str) -> Iterator[None]:
    """Within the context CUDA bodies run on CPU tensors, from a library that compiled cuda/*.cu for the host.

    For tests alone: an emulated kernel takes a thousand times as long as a CPU operator. The environment variable
    RWKVMPI_CUDA_EMULATION=PATH does the same for a whole process, for tests that start jobs. Not for several threads.
    """
    global _emulation
    before, _emulation = _emulation, Path(path)
    try:
        yield
    finally:
        _emulation = before


def emulating() -> bool:
    """Whether CUDA bodies run emulated."""
    return _emulation is not None


@functools.cache
def _open(path: Path) -> ctypes.CDLL:
    if not path.exists():
        raise UserError(f"The CUDA operators {path} are not built; {_REBUILD}.")
    try:
        opened = ctypes.CDLL(str(path))
        opened.rwkvmpi_cuda_error_text.argtypes = [ctypes.c_int]
        for name in ("error_text", "architectures"):
            getattr(opened, f"rwkvmpi_cuda_{name}").restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise UserError(f"The CUDA operators {path} cannot be loaded ({error}); {_REBUILD}.") from error
    return opened


def load() -> ctypes.CDLL:
    """The library in use. Raises UserError when it is not built or cannot be loaded."""
    return _open(PATH if _emulation is None else _emulation)


def architectures() -> list[str]:
    """What the library in use was compiled for: sm_90a and so on, and compute_80 for PTX."""
    return load().rwkvmpi_cuda_architectures().decode().split(".")


def runtime_version() -> int:
    """The CUDA runtime inside the library in use: 13000 for 13.0."""
    return load().rwkvmpi_cuda_version()


def driver_version() -> int | None:
    """The newest CUDA that this machine's driver knows: 13000 for 13.0; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def runs_on(compiled: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU of this compute capability.

    Machine code runs on its own generation from its own minor version on, PTX on everything later; the suffix a ties
    either to exactly its own version, f to its own generation.
    """
    for name in compiled:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            continue
        kind, own, suffix = match[1], (int(match[2]), int(match[3])), match[4]
        same_generation = own[0] == capability[0] and own[1] <= capability[1]
        if suffix == "a":
            found = own == capability
        elif kind == "sm" or suffix == "f":
            found = same_generation
        else:
            found = own <= capability
        if found:
            return True
    return False


def reason(device: int | None = None) -> str:
    """Why CUDA operators cannot run on this GPU (by default: on the current one), with the remedy; '' if they can."""
    driver = driver_version()
    if driver is None:
        return "This machine has no NVIDIA driver (libcuda.so.1 cannot be loaded); install one, or use --device cpu."
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install the build of it for CUDA {shown(driver)}."
    try:
        opened = _open(PATH)
    except UserError as error:
        return str(error)
    needed = max(opened.rwkvmpi_cuda_version(), 1000 * int(torch.version.cuda.split(".")[0])) // 1000
    if driver // 1000 < needed:
        text = f"The NVIDIA driver knows CUDA up to {shown(driver)}, but torch and the operators need {needed}.0; "
        return text + "update the driver, or use builds of both for an older CUDA."
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "nvidia-smi may tell why" if visible is None else f"CUDA_VISIBLE_DEVICES={visible} hides those there are"
        return f"torch sees no GPU; {why}."
    capability = torch.cuda.get_device_capability(device)
    compiled = opened.rwkvmpi_cuda_architectures().decode().split(".")
    if runs_on(compiled, capability):
        return ""
    remedy = "they need 8.0 (Ampere) or later, use --device cpu"
    if capability >= (8, 0):
        number = f"{capability[0]}{capability[1]}"
        remedy = f"compile them for it: RWKVMPI_CUDA_ARCHITECTURES={number} python setup.py build_ext --inplace --force"
    name = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
    return f"The CUDA operators were compiled for {', '.join(compiled)}, not for {name}; {remedy}."


def available() -> bool:
    """Whether CUDA operators can run on the current GPU of this process; emulation does not count."""
    return not reason()


def require(device: int | None = None) -> None:
    """UserError with the reason and the remedy when CUDA operators cannot run on this GPU (by default the current)."""
    if why := reason(device):
        raise UserError(why)


def shown(version: int) -> str:
    """13000 as 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"


def bind(name: str, signature: str) -> Callable[..., None]:
    """The launcher `rwkvmpi_cuda_<name>` of whatever library is in use, on the current stream of the tensors' GPU.

    signature: one letter per argument but the last two, device and stream, which `call` finds itself; p pointer (a
    tensor, or None for null), l int64, i int, f float. `call` raises CudaError for a code that is not 0, ValueError
    for tensors on different devices.
    """
    types = [*(_TYPES[letter] for letter in signature), ctypes.c_int, ctypes.c_void_p]
    path, pointer = Path(), cast(Callable[..., int], None)

    def call(*arguments: object) -> None:
        nonlocal path, pointer
        if cpu_library._recording is not None:
            raise RuntimeError(f"the CUDA operator {name} cannot be recorded; capture it in a CUDA graph")
        wanted = PATH if _emulation is None else _emulation
        if path is not wanted:
            pointer = _function(name, types, ctypes.c_int)
            path = wanted
        device: int | None = None
        values: list[Any] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                if device is None:
                    device = argument.get_device()
                elif argument.get_device() != device:
                    raise ValueError(f"{name}: all tensors must be on one device, but one is on {argument.device}")
                values.append(argument.data_ptr())
            else:
                values.append(argument)
        if (device is None or device < 0) != (_emulation is not None):
            raise ValueError(f"{name}: the tensors must be on {'a GPU' if _emulation is None else 'the CPU'}")
        code = pointer(*values, 0, None) if _emulation else pointer(*values, device, _raw_stream(device))
        if code:
            raise _error(name, code)

    return call


def bind_number(name: str, signature: str) -> Callable[..., int]:
    """The C function `rwkvmpi_cuda_<name>` that computes an int64 on the host: no device, no stream."""
    types = [_TYPES[letter] for letter in signature]

    def call(*arguments: int | float) -> int:
        return _function(name, types, ctypes.c_int64)(*arguments)

    return call


def _function(name: str, types: Sequence[type], result: type) -> Callable[..., int]:
    opened = load()
    try:
        function = opened[f"rwkvmpi_cuda_{name}"]  # a fresh object at every look-up: others may bind it otherwise
    except AttributeError:
        raise UserError(f"The CUDA operators {opened._name} are older than this program; {_REBUILD}.") from None
    function.argtypes, function.restype = types, result
    return function


def _error(name: str, code: int) -> Exception:
    """The exception for a launcher's code."""
    if code < 0:
        return CudaError(f"{name}: {_OWN_ERRORS.get(code, 'it refused its arguments')} (code {code})", code)
    text = load().rwkvmpi_cuda_error_text(code).decode(errors="replace")
    if code in _CANNOT_RUN_HERE:
        return UserError(reason() or f"CUDA operators cannot run on this GPU: {text} (CUDA error {code}); {_REBUILD}.")
    where = "it may stem from an earlier operator, CUDA_LAUNCH_BLOCKING=1 finds it"
    return CudaError(f"{name}: {text} (CUDA error {code}; {where})", code)
