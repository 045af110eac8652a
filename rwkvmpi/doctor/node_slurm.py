"""Slurm seen from a node where no job runs: what is there, which of its ways to start ranks fits MPI, what is next."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rwkvmpi.doctor import node_installation
from rwkvmpi.doctor.diagnosis import Finding

LIMIT_S = 10
SHOWN_PARTITIONS = 8


@dataclass(frozen=True)
class Partition:
    """A partition as sinfo lists it."""

    name: str
    default: bool
    nodes: int
    cpus: str
    time: str
    gres: str

    def __str__(self) -> str:
        gpus = f", {self.gres}" if self.gres not in ("", "(null)") else ""
        star = "*" if self.default else ""
        return f"{self.name}{star} ({self.nodes} nodes of {self.cpus} CPUs{gpus}, {self.time})"


def on_a_login_node() -> Iterator[Finding]:
    """Nothing where a job runs around this process, or where there is no Slurm: the check of the job says so."""
    if os.environ.get("SLURM_JOB_ID") or shutil.which("sbatch") is None:
        return
    if shutil.which("srun") is None:
        remedy = "install the whole of Slurm's commands here: srun starts ranks, and lists how it can"
        yield Finding("login node", "warn", "sbatch is here, but no srun", remedy)
        return
    code, listing = _ask("sinfo", "--noheader", "--format=%P|%D|%c|%l|%G")
    if code:
        value = f"Slurm does not answer: {_last(listing)}"
        yield Finding("login node", "warn", value, "ask who runs it; `scontrol ping` says whether the controller is up")
        return
    there = partitions(listing)
    named = "; ".join(map(str, there[:SHOWN_PARTITIONS]))
    more = f" and {len(there) - SHOWN_PARTITIONS} more" if there[SHOWN_PARTITIONS:] else ""
    facts = {"partitions": [one.name for one in there]}
    if not there:
        yield Finding("partitions", "warn", "none may be used", "ask for an account that may submit jobs")
    else:
        yield Finding("partitions", "ok", named + more, facts=facts)
    yield from _launch(there)


def partitions(listing: str) -> list[Partition]:
    """sinfo's lines PARTITION|NODES|CPUS|TIME|GRES; a partition with several kinds of nodes has several lines."""
    found: dict[str, Partition] = {}
    for line in listing.splitlines():
        words = line.strip().split("|")
        if len(words) == 5 and words[1].isdigit():
            name, nodes = words[0].rstrip("*"), int(words[1])
            old = found.get(name)
            found[name] = Partition(
                name, words[0].endswith("*"), nodes + (old.nodes if old else 0), words[2], words[3], words[4]
            )
    return list(found.values())


def plugins(listing: str) -> list[str]:
    """What `srun --mpi=list` offers."""
    return [word for line in listing.splitlines() if re.fullmatch(r"\s*([a-z]\w*)\s*", line) for word in line.split()]


def fitting(library: str, offered: list[str]) -> str:
    """The plugin by which srun starts ranks of this MPI library, by its name; '' where none is offered."""
    wanted = ("pmix",) if "Open MPI" in library else ("pmi2", "cray_shasta", "pmix") if "MPI" in library else ()
    for kind in wanted:
        if found := sorted(name for name in offered if name == kind or name.startswith(kind + "_")):
            return found[0]
    return ""


def next_command(plugin: str, there: list[Partition]) -> str:
    """How to examine nodes of the cluster."""
    default = next((one for one in there if one.default), None) or next(iter(there), None)
    where = f" -p {default.name}" if default and not default.default else ""
    nodes = max(1, min(2, default.nodes)) if default else 2
    if plugin:
        # Slurm's PMIx and that of a library from another source agree only on this; it does no harm elsewhere
        said = "env PMIX_SECURITY_MODE=native PMIX_GDS_MODULE=hash " if plugin.startswith("pmix") else ""
        return f"srun --mpi={plugin} -N {nodes} --ntasks-per-node=1{where} {said}rwkvmpi doctor --all-ranks"
    return f"salloc -N {nodes} --ntasks-per-node=1{where} mpirun -n {nodes} --map-by node rwkvmpi doctor --all-ranks"


def _launch(there: list[Partition]) -> Iterator[Finding]:
    _, listing = _ask("srun", "--mpi=list")
    offered, library = plugins(listing), node_installation.library_of_a_run()
    value = f"srun --mpi offers {', '.join(offered) or 'nothing'}"
    facts: dict[str, Any] = {"plugins": offered}
    if isinstance(library, str):
        remedy = "load the site's MPI module, or pip install 'rwkvmpi[mpi]'; Open MPI goes with pmix, MPICH with pmi2"
        yield Finding("launcher", "warn", f"{value}; {library}", remedy, facts=facts)
        return
    plugin = fitting(library.name, offered)
    facts["plugin"] = plugin
    command = next_command(plugin, there)
    if plugin:
        yield Finding("launcher", "ok", f"{value}; {library.name} goes with {plugin}", facts=facts)
    else:
        kind = "pmix" if library.is_open_mpi else "pmi2"
        value += f", not {kind}, which {library.name} needs: every task would be rank 0 of 1"
        yield Finding("launcher", "warn", value, "start ranks with mpirun inside the batch script", facts=facts)
    yield Finding("next", "ok", f"examine the nodes: {command}", facts={"command": command})


def _ask(*command: str) -> tuple[int, str]:
    """(exit code, all that was printed)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return 1, f"{command[0]} did not end within {LIMIT_S} s"
    except OSError as error:
        return 1, f"{command[0]}: {error.strerror}"
    return done.returncode, done.stdout + done.stderr


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "nothing was printed"
