"""Every way in which a queue may treat a job, tried in a real Slurm on this machine: what was seen, and are the results
the same bits as those of an undisturbed run.

    python scripts/slurm_scenarios.py                                 the scenarios of tests/slurm
    python scripts/slurm_scenarios.py --random 30 --seed 1            and 30 runs interrupted at random
    python scripts/slurm_scenarios.py --random 30 --only random       those alone
    python scripts/slurm_scenarios.py --short                         a few, in a minute

Starts the laboratory of scripts/slurm_lab.sh, prints a table, writes it as JSON with --json, and exits 1 when anything
differs or fails, 126 where the laboratory cannot be had.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "slurm"), str(ROOT / "tests")]
LABORATORY = ROOT / "scripts" / "slurm_lab.sh"
SHORT = (
    "test_launchers.py::test_mpirun",
    "test_launchers.py::test_srun_pmix_after_a_look_at_the_nodes",
    "test_launchers.py::test_srun_pmi2_with_mpich",
    "test_interruptions.py::test_the_time_limit",
    "test_arrays_and_chains.py::test_an_array_and_its_merge",
    "test_arrays_and_chains.py::test_a_chain_and_one_whose_first_link_fails",
)
COLUMNS = ("scenario", "action", "launcher", "grids", "states", "restarts", "exit_code", "sha256", "same", "seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=0, metavar="N", help="so many runs interrupted at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["tests", "random"])
    parser.add_argument("--side-by-side", type=int, default=4, help="jobs at a time (4); they wait more than they work")
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--short", action="store_true", help="a few scenarios")
    arguments = parser.parse_args()
    laboratory = os.environ.get("SLURM_LAB", "")
    if not laboratory or os.environ.get("SLURM_CONF") != f"{laboratory}/slurm.conf":
        command = [str(LABORATORY), "run", "-n", "12", "--", sys.executable, *sys.argv]
        os.execv(command[0], command)
    parts: dict[str, Part] = {}
    if arguments.only != "random":
        parts["tests"] = tested(arguments.side_by_side, SHORT if arguments.short else ("",))
    if arguments.random and arguments.only != "tests":
        parts["random"] = interrupted(arguments.random, arguments.seed, arguments.side_by_side)
    for name, part in parts.items():
        show(part.rows)
        print(f"{name}: {part.same} of {part.compared} results are those of an undisturbed run, {part.failed} failures")
    if arguments.json:
        write(arguments.json, parts)
    return 0 if all(part.good for part in parts.values()) else 1


@dataclass
class Part:
    """The rows of the tests, or of the runs interrupted at random."""

    rows: list[dict[str, Any]]
    failed: int
    seconds: float

    @property
    def same(self) -> int:
        return sum(row["identical"] is True for row in self.rows)

    @property
    def compared(self) -> int:
        return sum(row["identical"] is not None for row in self.rows)

    @property
    def good(self) -> bool:
        return not self.failed and self.same == self.compared


class Collector:
    """A plugin of pytest that keeps what the tests recorded (tests/slurm/table.py)."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.failed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed += report.failed
        if report.when != "call":
            return
        name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        for key, value in report.user_properties:
            if key == "job":
                self.rows.append({"scenario": name, "action": "", **value, "seconds": round(report.duration, 1)})


def tested(side_by_side: int, names: Sequence[str]) -> Part:
    """Run tests/slurm; a row per job that a test has followed to its end."""
    import pytest

    begun = time.monotonic()
    collector = Collector()
    tests = [str(ROOT / "tests" / "slurm" / name) for name in names]
    words = ["-q", "-n", str(side_by_side), "--dist", "worksteal", "--durations", "10", *tests]
    code = pytest.main(words, plugins=[collector])
    return Part(collector.rows, collector.failed or int(code), round(time.monotonic() - begun, 1))


def interrupted(count: int, seed: int, side_by_side: int) -> Part:
    """Runs that are interrupted at random; a row for each."""
    from _slurm_random import RandomRuns
    from slurm_jobs import Project

    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rwkvmpi-slurm-") as name:
        folder = Path(name)
        programs = folder / "bin"
        programs.mkdir()
        program = programs / "rwkvmpi"
        program.write_text('#!/bin/sh\nexec python -m rwkvmpi "$@"\n')
        program.chmod(0o755)
        mpich = ROOT / "build" / "mpich-venv"  # made by the tests
        project = Project(folder / "project", programs)
        runs = RandomRuns(folder, project, mpich if mpich.exists() else None, side_by_side)
        rows = runs.run(count, seed, lambda row: print(in_a_line(row), flush=True))
    return Part(rows, sum("error" in row for row in rows), round(time.monotonic() - begun, 1))


def write(file: Path, parts: Mapping[str, Part]) -> None:
    """Put the parts into the JSON file, beside what another call has put there."""
    known = json.loads(file.read_text()) if file.exists() else {}
    for name, part in parts.items():
        known[name] = {
            "command": f"python scripts/slurm_scenarios.py {' '.join(sys.argv[1:])}",
            "slurm": subprocess.run(["scontrol", "--version"], capture_output=True, text=True).stdout.strip(),
            "cores": os.cpu_count(),
            "seconds": part.seconds,
            "identical": f"{part.same} of {part.compared}",
            "failures": part.failed,
            "rows": part.rows,
        }
    file.write_text(json.dumps(known, indent=1) + "\n")


def in_a_line(row: dict[str, Any]) -> str:
    same = {True: "identical", False: "DIFFERS", None: "no results"}[row["identical"]]
    return f"{row['scenario']}: {row['action']}; {row['states']}; {same} {row.get('error', '')}"


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table, columns as wide as what is in them."""
    same = {True: "yes", False: "NO", None: "-"}
    lines = [list(COLUMNS)]
    for row in rows:
        cells = row | {"sha256": row["sha256"][:16], "same": same[row["identical"]]}
        lines.append([str(cells.get(column, "")) for column in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
