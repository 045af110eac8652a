"""What a rank says of itself, and what the first rank of every node finds out about its node."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkvmpi.cluster import affinity, mpi
from rwkvmpi.cluster.launcher import launch_facts
from rwkvmpi.doctor import diagnosis, node_disks, node_files, node_installation, node_limits
from rwkvmpi.doctor.diagnosis import Finding
from rwkvmpi.doctor.node_bounded import Hung, bounded
from rwkvmpi.errors import UserError

BOOT = Path("/proc/sys/kernel/random/boot_id")
LIMIT_S = 120.0
EACH_ITS_OWN = ("left-over folders",)


def of_this_rank() -> dict[str, Any]:
    """Quick facts, without torch."""
    facts = launch_facts()
    return {
        "rank": facts.rank,
        "node": facts.node,
        "host": socket.gethostname(),
        "boot": _boot(),
        "launcher": _launcher(facts.launcher),
        "mpi": mpi.library_version(),
        "limits": node_limits.limits(),
        "environment": node_limits.environment(),
        "cpus": sorted(affinity.rank_mask()),
        "cpus_of_node": os.cpu_count() or 1,
        "threads": affinity.threads_per_rank(),
    }


def of_this_node(folder: Path, model: str | None, tokenizer: str) -> dict[str, Any]:
    """What has to be compared between nodes. "trouble": what could not be found out, and why."""
    from rwkvmpi.doctor.machine_checks import processor_name

    facts: dict[str, Any] = {"package": str(node_installation.PACKAGE), "trouble": {}}
    parts: dict[str, Callable[[], Any]] = {
        "versions": node_installation.versions,
        "files": node_installation.files,
        "operators": lambda: {"processor": processor_name(), **node_installation.operators()},
        "gpus": node_installation.gpus,
        "libraries": lambda: {**node_installation.shared_libraries(), **node_installation.system()},
        "mount": lambda: _mount(folder),
        "sizes": lambda: node_files.sizes(model, tokenizer),
    }
    for name, part in parts.items():
        try:
            facts[name] = bounded(part, LIMIT_S)
        except UserError:
            continue  # a check says it
        except Exception as error:
            said = str(error) if isinstance(error, (Hung, OSError)) else f"{type(error).__name__}: {error}"
            facts["trouble"][name] = said
    return facts


def own_findings(folder: Path, fix: bool, alone: bool) -> list[Finding]:
    """This node's own checks, mended where that is asked for: what is every node's own, and by one of them, `alone`,
    what they may share."""
    from rwkvmpi.doctor.nodes_judged import elsewhere

    found = []
    for name, check in diagnosis.checks_of_a_node(folder):
        try:
            told = bounded(lambda name=name, check=check: list(diagnosis.examine(name, check)), LIMIT_S)  # type: ignore[misc]
        except Hung as hung:
            told = [Finding(name, "fail", str(hung), "look at this node's file systems (df) and at dmesg")]
        for finding in told:
            may = alone or name in EACH_ITS_OWN
            mended = diagnosis.mend(finding) if fix and may else finding
            found.append(dataclasses.replace(mended, fix=elsewhere if mended.fix and may else None))
    return found


def _launcher(kind: str) -> str:
    names = {"openmpi": "Open MPI's mpirun", "mpich": "MPICH's mpirun", "slurm": "srun", "none": "nobody"}
    way = os.environ.get("SLURM_MPI_TYPE", "") if kind == "slurm" else ""
    return names.get(kind, kind) + (f" --mpi={way}" if way else "")


def _mount(folder: Path) -> str:
    mount = node_disks.mount_of(folder)
    return f"{mount.kind} from {mount.source or '?'}"


def _boot() -> str:
    try:
        return BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""
