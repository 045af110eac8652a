"""The doctor: looks at this machine, the installation, MPI, the folder of a run and a model, and names remedies.

Every check yields findings; a check that itself falls over is a finding too. Nothing here changes anything, except
the fixes that the user asks for and that cannot do harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rwkvmpi.errors import UserError

Status = Literal["ok", "warn", "fail"]


@dataclass
class Finding:
    """One thing looked at. `remedy` says what to do where it is not ok; `fix` does it, where that is safe; `facts` are
    figures for programs that read the report."""

    name: str
    status: Status
    value: str
    remedy: str = ""
    fix: Callable[[], None] | None = field(default=None, repr=False)
    fixed: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The finding without its function."""
        return {
            "name": self.name,
            "status": self.status,
            "value": self.value,
            "remedy": self.remedy,
            "fixable": self.fix is not None,
            "fixed": self.fixed,
            "facts": self.facts,
            "nodes": list(self.nodes),
        }


Check = Callable[[], Iterable[Finding]]


def checks(folder: Path, model: str | None, tokenizer: str) -> list[tuple[str, Check]]:
    """All checks in the order of the report, each with the name it reports under if it falls over."""
    from rwkvmpi.doctor import machine_checks, mpi_checks, node_installation, node_slurm, number_checks, thread_checks

    before, after = _of_a_node(folder)
    found: list[tuple[str, Check]] = [
        *before,
        ("slurm", machine_checks.slurm),
        ("login node", node_slurm.on_a_login_node),
        ("mpi", mpi_checks.mpi_library),
        ("libraries", node_installation.libraries),
        ("threads", thread_checks.of_this_process),
        *after,
    ]
    if model is not None:
        found.append(("model", lambda: number_checks.model_and_tokenizer(model, tokenizer)))
    return found


def checks_of_a_node(folder: Path) -> list[tuple[str, Check]]:
    """Those that every node of a job makes for itself; none of them speaks with another rank."""
    before, after = _of_a_node(folder)
    return before + after


def _of_a_node(folder: Path) -> tuple[list[tuple[str, Check]], list[tuple[str, Check]]]:
    """The machine, and what takes torch."""
    from rwkvmpi.doctor import (
        fabric_checks,
        gpu_checks,
        machine_checks,
        node_copies,
        node_disks,
        node_leftovers,
        node_limits,
        number_checks,
    )

    before: list[tuple[str, Check]] = [
        ("python", machine_checks.python),
        ("packages", machine_checks.packages),
        ("processor", machine_checks.processor),
        ("limits", node_limits.of_this_process),
        ("shared memory", machine_checks.shared_memory),
        ("single copy", node_copies.single_copy),
        ("folder", lambda: machine_checks.run_folder(folder)),
        ("file system", lambda: node_disks.file_system(folder)),
        ("temporary files", node_disks.temporary_files),
        ("left-over folders", node_leftovers.session_folders),
        ("hdf5", lambda: machine_checks.hdf5(folder)),
        ("rdma", fabric_checks.in_short),
    ]
    after: list[tuple[str, Check]] = [
        ("torch", number_checks.torch_library),
        ("GPU", gpu_checks.gpus),
        ("operators", number_checks.operators),
        ("matrix products", number_checks.matrix_rows),
    ]
    return before, after


def examine(name: str, check: Check) -> Iterator[Finding]:
    """Run one check; an exception becomes a finding instead of ending the report."""
    try:
        yield from check()
    except UserError as error:
        yield Finding(name, "fail", str(error))
    except Exception as error:
        yield Finding(name, "fail", f"the check itself failed: {type(error).__name__}: {error}", "report this")


def mend(finding: Finding) -> Finding:
    """Apply the finding's fix; the finding comes back as ok, or says why the fix failed."""
    if finding.fix is None or finding.status == "ok":
        return finding
    try:
        finding.fix()
    except Exception as error:
        value = f"{finding.value}; --fix failed: {error}"
        return Finding(finding.name, "fail", value, finding.remedy, nodes=finding.nodes)
    value = f"mended: {finding.remedy} (was: {finding.value})"
    return Finding(finding.name, "ok", value, fixed=True, nodes=finding.nodes)
