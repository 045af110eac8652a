"""Whether one process of this machine may read another's memory: how MPI moves large messages with a single copy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rwkvmpi.doctor.diagnosis import Finding

LIMIT_S = 20
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
# A child reads its parent as a rank reads its neighbour: no ancestor of it, but one that allows it, as MPI does.
CHILD = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
class Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]
libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
there, here = ctypes.create_string_buffer(b"single copy"), ctypes.create_string_buffer(12)
one, other = Piece(ctypes.addressof(there), 12), Piece(ctypes.addressof(here), 12)
parent, pid = os.getpid(), os.fork()
if pid == 0:
    ctypes.memset(here, 0, 12)
    there.value = b""
    read = libc.process_vm_readv(parent, ctypes.byref(other), 1, ctypes.byref(one), 1, 0)
    os._exit(0 if read == 12 and here.value == b"single copy" else ctypes.get_errno() or 255)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def single_copy() -> Iterator[Finding]:
    """Tried by two processes of their own, for the word of the kernel's settings is not the last one."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", CHILD], capture_output=True, text=True, timeout=LIMIT_S, check=True
        )
        number = int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        yield Finding("single copy", "warn", f"could not be tried ({type(error).__name__})", "report this")
        return
    if number == 0:
        yield Finding("single copy", "ok", "ranks of this node may read each other's memory (CMA)")
        return
    value = (
        f"ranks of this node may not read each other's memory (process_vm_readv: {_name(number)}): a message of 1 MiB "
        "may take 12 to 30 ms then instead of 0.04"
    )
    remedy = "in a container docker run --cap-add SYS_PTRACE (or --security-opt seccomp=unconfined)"
    if scope() not in ("", "0"):
        remedy += f"; else sysctl kernel.yama.ptrace_scope=0 (now {scope()})"
    yield Finding("single copy", "warn", value, remedy, facts={"errno": number})


def scope() -> str:
    """The kernel's ptrace scope; '' where it has none."""
    try:
        return PTRACE_SCOPE.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _name(number: int) -> str:
    import errno
    import os

    return f"{errno.errorcode.get(number, number)}, {os.strerror(number)}"
