"""What is installed on this node: versions, a digest of the program's own files, the libraries behind MPI and CUDA."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import hashlib
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rwkvmpi import __version__
from rwkvmpi.cluster import mpi
from rwkvmpi.doctor.diagnosis import Finding
from rwkvmpi.doctor.machine_checks import NEEDED

PACKAGES = ("torch", "mpi4py", "pyzmq", "psutil", *NEEDED)
PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("libmpi", "libucp", "libpmix", "libibverbs", "libfabric", "libcudart", "libcuda")
DRIVER = Path("/proc/driver/nvidia/version")
_MAPPED = re.compile(r"/\S*/(lib[a-z]+)[-.\w]*\.so[.\w]*$", re.MULTILINE)


def versions() -> dict[str, str]:
    """Python, rwkvmpi and the packages it uses -> version; "missing" where there is none."""
    found = {"python": platform.python_version(), "rwkvmpi": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def files(package: Path = PACKAGE) -> dict[str, str]:
    """The program's own files that must be the same on all nodes -> the first 16 digits of their SHA-256.

    Without the compiled operators, which may be built for each kind of processor, and Python's caches.
    """
    found = {}
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix not in (".so", ".pyc") and "__pycache__" not in path.parts:
            found[str(path.relative_to(package))] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def operators() -> dict[str, str]:
    """How the operators in use were built, and what torch makes of the processor. UserError where there are none."""
    import torch

    from rwkvmpi.ops import library

    facts = library.info()
    return {
        "ISA": str(facts["isa"]),
        "compiler": str(facts["compiler"]),
        "torch's kernels": torch.backends.cpu.get_cpu_capability(),
    }


def gpus() -> dict[str, str]:
    """The GPUs of this node as the driver shows them, the driver, and CUDA."""
    import torch

    from rwkvmpi.doctor import gpu_checks
    from rwkvmpi.ops.cuda import library

    number = library.driver_version()
    if number is None:
        return {"GPUs": "none"}
    names = [gpu.name for gpu in gpu_checks.visible_gpus()]
    kinds = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return {
        "GPUs": ", ".join(kinds) or "none visible",
        "driver": _driver() or "unknown",
        "CUDA of the driver": library.shown(number),
        "CUDA of torch": str(torch.version.cuda),
    }


def shared_libraries() -> dict[str, str]:
    """MPI's name, and path and version of each library that matters and that this process has loaded."""
    found = {"MPI": mpi.library_version()} if mpi.library_version() else {}
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    for match in _MAPPED.finditer(maps):
        if match[1] in LIBRARIES:
            found.setdefault(match[1], _described(match[0]))
    return found


def system() -> dict[str, str]:
    """The kernel and the C library."""
    return {"kernel": platform.release(), "libc": " ".join(platform.libc_ver())}


@functools.cache
def library_of_a_run() -> Any:
    """The MPI library that a run started here would use (a fabric_library.Library), or why there is none."""
    from rwkvmpi.doctor import fabric_library

    return fabric_library.find()


def libraries() -> Iterator[Finding]:
    """Path and version of what MPI is made of, in a process that a launcher did or did not start."""
    library = library_of_a_run()
    if isinstance(library, str):
        yield Finding("libraries", "ok", f"{library}: one process only")
        return
    parts = [f"{library.name} in {library.path}"]
    parts.append(f"UCX {library.ucx} in {library.ucx_path}" if library.ucx else "no UCX loaded")
    if library.pml:
        parts.append(f"messages by {library.pml}")
    verbs = ctypes.util.find_library("ibverbs")
    parts.append(verbs or "no libibverbs")
    yield Finding("libraries", "ok", ", ".join(parts), facts={"mpi": library.path, "ucx": library.ucx_path})


def _described(path: str) -> str:
    """A library's path and version: what it says itself, or what its file's name says."""
    name = os.path.basename(path)
    said = {"libucp": "ucp_get_version_string", "libpmix": "PMIx_Get_version"}
    for start, function in said.items():
        if name.startswith(start):
            try:
                ask = getattr(ctypes.CDLL(path), function)
            except (OSError, AttributeError):
                break
            ask.restype = ctypes.c_char_p
            text = ask().decode("ascii", errors="replace")
            return f"{path} ({' '.join(re.split('[,(]', text)[0].split())})"
    real = os.path.basename(os.path.realpath(path))
    return path if real == name else f"{path} ({real})"


def _driver() -> str:
    try:
        match = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", DRIVER.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return match[1] if match else ""
