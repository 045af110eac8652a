"""ThreadSanitizer on the emulated kernels: no two threads touch the same memory without a barrier between them.

Threads of a block are fibers that only the kernel's own barriers order; blocks are not ordered at all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _emulated_kernels
import launchers
import pytest

HERE = Path(__file__).parent
PLANTED = sorted((HERE / "planted").glob("*.cu"))
RACES = {"blocks_in_order", "missing_barrier", "missing_empty_barrier", "missing_syncwarp"}
PROCESSES = 2

pytestmark = pytest.mark.thorough


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """A Python script under ThreadSanitizer, which needs memory laid out without randomness and its library first."""
    compiler = _emulated_kernels.compiler()
    preloaded = subprocess.run([*compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    environment = {**os.environ, "TSAN_OPTIONS": "report_thread_leaks=0 history_size=2"}
    script = [os.path.realpath(sys.executable), "-S", *map(str, command)]
    return subprocess.run(
        ["setarch", "-R", "env", f"LD_PRELOAD={preloaded.stdout.strip()}", *script],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False, env=environment,
    )  # fmt: skip


def races(report: str) -> int:
    return report.count("WARNING: ThreadSanitizer: data race")


@pytest.fixture(scope="module")
def sanitizer() -> None:
    for tool in (_emulated_kernels.compiler()[0], "setarch"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    done = run("-c", "print('alive')")
    if done.stdout != "alive\n":
        pytest.skip(f"ThreadSanitizer does not work here: {done.stdout.strip()[:200]}")


@pytest.fixture(scope="module")
def planted(sanitizer: None) -> Path:
    return _emulated_kernels.build("thread", PLANTED)


@pytest.fixture(scope="module")
def reports(sanitizer: None) -> dict[str, str]:
    """What was said about each launcher."""
    library = _emulated_kernels.build("thread")
    names = sorted(launchers.LAUNCHERS)
    with ThreadPoolExecutor(PROCESSES) as pool:
        done = list(pool.map(lambda i: run(HERE / "race_calls.py", library, *names[i::PROCESSES]), range(PROCESSES)))
    parts = [part for each in done for part in re.split(r"^launcher ", each.stdout, flags=re.MULTILINE)]
    return {part.split("\n", 1)[0]: part for part in parts}


@pytest.mark.parametrize("launcher", sorted(launchers.LAUNCHERS))
def test_kernels_have_no_races(reports: dict[str, str], launcher: str) -> None:
    report = reports.get(launcher, "an earlier launcher ended the process")
    assert races(report) == 0, report
    ran = re.search(r"^(\d+) of (\d+) calls ran$", report, re.MULTILINE)
    assert ran, report
    assert int(ran[1]) >= 2, report


@pytest.mark.parametrize("name", [path.stem for path in PLANTED])
def test_planted_races_are_found(planted: Path, name: str) -> None:
    right = run(HERE / "run_planted.py", planted, name, 0, 0)
    assert right.returncode == 0, right.stdout
    if name in RACES:
        wrong = run(HERE / "run_planted.py", planted, name, 1, 0)
        assert races(wrong.stdout) > 0, wrong.stdout
        assert f"planted/{name}.cu" in wrong.stdout  # it tells the line, too
