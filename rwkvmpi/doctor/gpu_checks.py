"""The doctor's checks of GPUs: the driver, the devices it shows, and whether the operators for them can run here.

The driver is asked directly, so that the GPUs are told even where torch cannot use them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rwkvmpi.doctor.diagnosis import Finding

PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"  # the maker's number, and the class that all GPUs belong to
MAJOR, MINOR = 75, 76  # the compute capability among the driver's attributes of a device


class Gpu(NamedTuple):
    """One GPU that this process may use."""

    name: str
    nbytes: int
    capability: tuple[int, int]


class DriverError(Exception):
    """The driver is there but does not work; says what it said."""


def gpus() -> Iterator[Finding]:
    """The GPUs and whether torch and the operators can use them; one row that says so where there are none."""
    from rwkvmpi.ops.cuda import library

    version, installed = library.driver_version(), _installed()
    if version is None and installed:
        value = f"{installed} of NVIDIA in this machine, but no driver"
        yield Finding("GPU", "warn", value, "install NVIDIA's driver; until then everything runs on the CPU")
        return
    if version is None:
        yield Finding("GPU", "ok", "none of NVIDIA's; everything runs on the CPU")
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
    driver = f"driver for CUDA {library.shown(version)}{chosen}"
    try:
        found = visible_gpus()
    except DriverError as error:
        yield Finding("GPU", "warn", f"{driver}: {error}", "see whether nvidia-smi works; a reboot may be due")
        return
    if not found:
        yield Finding("GPU", "ok", f"none visible, {driver}; everything runs on the CPU")
        return
    for number, gpu in enumerate(found):
        value = f"{number}: {gpu.name}, {gpu.nbytes / 2**30:.1f} GiB, compute capability "
        yield Finding("GPU", "ok", f"{value}{gpu.capability[0]}.{gpu.capability[1]}; {driver}")
    yield from _operators(len(found))


def _operators(count: int) -> Iterator[Finding]:
    import torch

    from rwkvmpi.ops.cuda import library

    for device in range(count):
        if why := library.reason(device):
            value, _, remedy = why.rstrip(".").partition("; ")
            yield Finding("GPU operators", "warn", f"{value}; runs use the CPU", remedy)
            return
    runtime = library.shown(library.runtime_version())
    value = f"compiled for {', '.join(library.architectures())}, CUDA {runtime} inside; torch's is {torch.version.cuda}"
    yield Finding("GPU operators", "ok", value)


def visible_gpus() -> list[Gpu]:
    """What the driver shows to this process. Starts no context on them, so it costs no memory there."""
    driver = ctypes.CDLL("libcuda.so.1")

    def ask(name: str, *arguments: object) -> None:
        code = getattr(driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            driver.cuGetErrorString(code, ctypes.byref(text))
            raise DriverError(f"{name} failed with code {code}, {(text.value or b'unknown').decode()}")

    count = ctypes.c_int()
    try:
        ask("cuInit", 0)
    except DriverError as error:
        if "code 100," in str(error):  # no device: none is visible
            return []
        raise
    ask("cuDeviceGetCount", ctypes.byref(count))
    found = []
    for number in range(count.value):
        device, nbytes, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        ask("cuDeviceGet", ctypes.byref(device), number)
        ask("cuDeviceGetName", name, len(name), device)
        ask("cuDeviceTotalMem_v2", ctypes.byref(nbytes), device)
        capability = [ctypes.c_int(), ctypes.c_int()]
        for part, attribute in zip(capability, (MAJOR, MINOR), strict=True):
            ask("cuDeviceGetAttribute", ctypes.byref(part), attribute, device)
        major, minor = (part.value for part in capability)
        found.append(Gpu(name.value.decode(errors="replace"), nbytes.value, (major, minor)))
    return found


def _installed() -> int:
    """How many of NVIDIA's GPUs are plugged into this machine, whether or not there is a driver."""
    return sum(
        1
        for device in PCI_DEVICES.glob("*")
        if _word(device / "vendor") == NVIDIA and _word(device / "class").startswith(DISPLAY)
    )


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
