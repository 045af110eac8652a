"""What the MPI library itself says: its name, how it would send, and which UCX is inside it.

Asked of the libraries that this process has loaded. A process that no launcher started asks in a child, since MPI may
end a process that it cannot start in.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rwkvmpi.cluster import mpi
from rwkvmpi.cluster.launcher import launch_facts

LIMIT_S = 60
# run by a child: MPI starts as a world of one
CHILD = "import json; from mpi4py import MPI; from rwkvmpi.doctor import fabric_library as l; print(l.as_json())"
# where Open MPI keeps the kind and the name of the component that it chose: after three numbers and a project's name
# of 16 bytes and three numbers more; then 32 bytes, and three numbers
_KIND_AT, _NAME_AT, _NAME_ROOM = 40, 84, 64


@dataclass(frozen=True)
class Library:
    """An MPI library. Empty strings where it does not say."""

    name: str  # "Open MPI v5.0.11"
    path: str  # of libmpi.so
    pml: str  # how Open MPI sends: "ucx", "ob1", "cm"
    ucx: str  # UCX's version
    ucx_path: str

    @property
    def is_open_mpi(self) -> bool:
        """Open MPI, whose settings are the OMPI_MCA_ variables."""
        return "Open MPI" in self.name


def find() -> Library | str:
    """The library that a run started here would use, or the reason why there is none."""
    if launch_facts().size > 1:
        return loaded() if mpi.world() is not None else "MPI is not running"
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD], env=_environment(), capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"MPI does not start within {LIMIT_S} s"
    words = done.stdout.strip().splitlines()
    if done.returncode == 0 and words:
        return Library(**json.loads(words[-1]))
    last = (done.stderr.strip() or "it ended without a word").splitlines()[-1]
    return "mpi4py is not installed" if "No module named 'mpi4py'" in last else f"MPI does not start: {last}"


def as_json() -> str:
    """What is loaded in this process, for the process that started it."""
    return json.dumps(asdict(loaded()))


def loaded() -> Library:
    """The library loaded in this process."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    files = {match[1]: match[0] for match in re.finditer(r"/\S*/(libmpi|libucp)\S*\.so\S*", maps)}
    library, ucp = files.get("libmpi", ""), files.get("libucp", "")
    return Library(mpi.library_version(), library, _pml(library), _ucx_version(ucp), ucp)


def settings(environ: dict[str, str] | None = None) -> dict[str, str]:
    """The variables of the environment that tell UCX, Open MPI and this program how to use the fabric."""
    env = os.environ if environ is None else environ
    ours = re.compile(r"(UCX_|OMPI_MCA_(pml|btl|mtl|osc)|RWKVMPI_(RDMA|DEVICE)|MPIR_CVAR_)")
    return {name: env[name] for name in sorted(env) if ours.match(name)}


def _ucx_version(library: str) -> str:
    if not library:
        return ""
    try:
        version = ctypes.CDLL(library).ucp_get_version_string
    except (OSError, AttributeError):
        return ""
    version.restype = ctypes.c_char_p
    return str(version().decode("ascii", errors="replace"))


def _pml(library: str) -> str:
    """The component by which Open MPI sends from one rank to another, once it runs."""
    try:
        raw = (
            (ctypes.c_char * (_NAME_AT + _NAME_ROOM))
            .in_dll(ctypes.CDLL(library), "mca_pml_base_selected_component")
            .raw
        )
    except (OSError, ValueError):
        return ""
    kind, name = raw[_KIND_AT:].split(b"\0")[0], raw[_NAME_AT:].split(b"\0")[0]
    return name.decode() if kind == b"pml" and re.fullmatch(rb"[a-z0-9_]+", name) else ""


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}
