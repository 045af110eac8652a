"""What this process is allowed, and which variables of its environment have a say."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator, Mapping

from rwkvmpi.cluster import rdma
from rwkvmpi.doctor.diagnosis import Finding

# name -> (the kernel's number, whether it counts bytes)
LIMITS = {
    "memlock": (resource.RLIMIT_MEMLOCK, True),
    "nofile": (resource.RLIMIT_NOFILE, False),
    "core": (resource.RLIMIT_CORE, True),
    "stack": (resource.RLIMIT_STACK, True),
    "address space": (resource.RLIMIT_AS, True),
    "file size": (resource.RLIMIT_FSIZE, True),
    "processes": (resource.RLIMIT_NPROC, False),
}
FILES_ENOUGH = 1024
STACK_ENOUGH = 1 << 20
RAISE = (
    "ulimit in the shell that starts it; for good /etc/security/limits.conf, and for Slurm LimitMEMLOCK= and the like "
    "in slurmd's unit, or PropagateResourceLimits in slurm.conf"
)
# set by launchers for each rank, or free to differ: ports and GPUs are chosen per rank
_OURS = re.compile(r"(OMPI_MCA_|PRTE_MCA_|PMIX_MCA_|UCX_|RWKVMPI_|OMP_|MKL_|MPIR_CVAR_|MPICH_|FI_|LD_|LC_ALL$|LANG$)")
_PATHS = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_MAY_DIFFER = re.compile(
    r"(UCX_NET_DEVICES|RWKVMPI_RDMA_PORTS|RWKVMPI_DEVICE|OMP_PLACES|(PRTE|OMPI)_MCA_(ess|orte|prte)_|OMPI_MCA_(PREFIXES|"
    r"num_|initial_wdir|cpu_type))"
)


def limits() -> dict[str, int]:
    """The soft limits of this process; -1: none."""
    found = {}
    for name, (number, _) in LIMITS.items():
        soft = resource.getrlimit(number)[0]
        found[name] = -1 if soft == resource.RLIM_INFINITY else soft
    return found


def shown(name: str, value: int) -> str:
    """A limit in words."""
    if value < 0:
        return "unlimited"
    return f"{value >> 10:,} KiB" if LIMITS[name][1] else f"{value:,}"


def of_this_process() -> Iterator[Finding]:
    """The limits, and those of them that are in the way."""
    found = limits()
    value = ", ".join(f"{name} {shown(name, number)}" for name, number in found.items())
    troubles = []
    if 0 <= found["nofile"] < FILES_ENOUGH:
        troubles.append(f"nofile below {FILES_ENOUGH:,}: corpora of many files and many ranks need more")
    if found["address space"] >= 0:
        troubles.append("a limit of the address space: torch and mapped model files take much more than memory")
    if found["file size"] >= 0:
        troubles.append("a limit of the size of files: results of long texts are large")
    if 0 <= found["stack"] < STACK_ENOUGH:
        troubles.append("a small stack: threads may crash")
    if rdma.ports() and found["memlock"] >= 0:
        troubles.append("memlock is limited: RDMA has to lock its buffers")
    if troubles:
        yield Finding("limits", "warn", f"{value}: {'; '.join(troubles)}", RAISE, facts=found)
    else:
        yield Finding("limits", "ok", value, facts=found)


def environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that should be the same for all ranks."""
    env = os.environ if environ is None else environ
    return {
        name: env[name] for name in sorted(env) if name in _PATHS or (_OURS.match(name) and not _MAY_DIFFER.match(name))
    }
