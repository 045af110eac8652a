"""What was measured on this machine, for `plan`: the speed that finished runs reached.

A run that computed for long enough notes the floating-point operations per second of one rank, by data type and
threads. The file is $XDG_CACHE_HOME/rwkvmpi/figures.json (~/.cache by default); losing it loses nothing else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from rwkvmpi.grid.plan import Machine

SHORTEST_RUN_S = 10.0


def figures_path() -> Path:
    """Where the figures of this machine lie."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "rwkvmpi" / "figures.json"


def load_machine(device: str, dtype: str, threads: int) -> Machine:
    """The measured figures for this kind of rank, or defaults that are marked as not measured."""
    try:
        entry = json.loads(figures_path().read_text())[f"{device} {dtype} {threads}"]
        return Machine(flops_per_second=float(entry["flops_per_second"]), measured=True)
    except (OSError, ValueError, KeyError, TypeError):
        return Machine()


def note_speed(device: str, dtype: str, threads: int, flops: float, seconds: float) -> None:
    """Remember that a rank did `flops` operations in `seconds` of computing; too short a run says nothing."""
    if seconds < SHORTEST_RUN_S or flops <= 0:
        return
    path = figures_path()
    try:
        figures = json.loads(path.read_text())
    except (OSError, ValueError):
        figures = {}
    figures[f"{device} {dtype} {threads}"] = {"flops_per_second": flops / seconds}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(figures, indent=1))
        temporary.replace(path)
    except OSError:
        pass  # a home folder that cannot be written is no reason to trouble a finished run
