"""The way to pyverbs, which is imported only where the verbs transport is used, and may be missing.

pip can rarely build it, and an environment seldom has it; the distribution's package fits every environment of the same
Python version. So where the environment has none, the one folder of the system's is loaded, and nothing beside it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

from rwkvmpi.cluster import rdma
from rwkvmpi.errors import UserError

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
SYSTEM_FOLDERS = (
    Path("/usr/lib/python3/dist-packages/pyverbs"),
    Path(f"/usr/lib64/python{_VERSION}/site-packages/pyverbs"),
    Path(f"/usr/lib/python{_VERSION}/site-packages/pyverbs"),
)
LIBRARY = "libibverbs.so.1"
INSTALL = "apt install python3-pyverbs ibverbs-providers (or dnf install python3-pyverbs), or pip install pyverbs"
_PARTS = ("addr", "cq", "device", "fork", "mr", "pd", "pyverbs_error", "qp", "wr")


@functools.cache
def reason() -> str:
    """Why verbs cannot be used on this machine, as a sentence with the way out; "" when they can."""
    if not rdma.ports():
        return "this machine has no RDMA device (/sys/class/infiniband is empty); see `rdma link`"
    try:
        pyverbs()
    except ImportError as error:
        return str(error)
    return ""


def require() -> None:
    """UserError with the reason when verbs cannot be used."""
    if why := reason():
        raise UserError(f"the verbs transport cannot be used: {why}; or use --transport mpi")


@functools.cache
def pyverbs() -> SimpleNamespace:
    """pyverbs' modules by name, and `enums`. ImportError with a sentence when they cannot be loaded."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        raise ImportError(f"{LIBRARY} is not installed; {INSTALL}") from None
    _find_package()
    try:
        modules = {name: importlib.import_module(f"pyverbs.{name}") for name in _PARTS}
        return SimpleNamespace(enums=_enums(), **modules)
    except ImportError as error:
        raise ImportError(f"pyverbs cannot be loaded ({error}); {INSTALL}") from None


def _find_package() -> None:
    """Make `import pyverbs` work: from the environment, else from the system's folder for this Python version."""
    if "pyverbs" in sys.modules or importlib.util.find_spec("pyverbs") is not None:
        return
    suffixes = importlib.machinery.EXTENSION_SUFFIXES[:1]  # the one that names the version
    for folder in SYSTEM_FOLDERS:
        if any((folder / f"device{suffix}").exists() for suffix in suffixes):
            path = folder / "__init__.py"
            spec = importlib.util.spec_from_file_location("pyverbs", path, submodule_search_locations=[str(folder)])
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules["pyverbs"] = module
            spec.loader.exec_module(module)
            return
    other = next((str(folder) for folder in SYSTEM_FOLDERS if folder.is_dir()), "")
    built = f" ({other} is for another Python)" if other else ""
    raise ImportError(f"pyverbs is not installed for Python {_VERSION}{built}; {INSTALL}")


def _enums() -> ModuleType:
    """The constants moved in rdma-core 5x."""
    try:
        return importlib.import_module("pyverbs.libibverbs_enums")
    except ImportError:
        return importlib.import_module("pyverbs.enums")
