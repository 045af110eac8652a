"""Every launcher called with null, misaligned and odd arguments, in a process under AddressSanitizer and UBSan.

What comes back is a code, never a crash; inputs and everything around the buffers stay as they are.
RWKVMPI_FUZZ_CALLS=20000 makes a campaign of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import _emulated_kernels
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import launchers

PROGRAM = Path(__file__).with_name("fuzz_launchers.py")
CALLS = int(os.environ.get("RWKVMPI_FUZZ_CALLS", "60"))
SECONDS = 60 + CALLS  # a launcher gets
MOST_CRASHES = 5  # after so many the rest is not looked at
# Tokens after which a finding is told apart from the call that led to it.
REPORTS = ("runtime error:", "ERROR: AddressSanitizer", "WRONG in call", "Error: ", "CUDA emulation:")
SKIPPED = launchers.NOT_LAUNCHERS | launchers.NUMBERS


def test_the_table_knows_every_launcher() -> None:
    assert launchers.unknown() == []


@pytest.fixture(scope="session")
def guarded() -> tuple[Path, dict[str, str]]:
    """The emulated kernels with sanitizers, and the environment that a process needs to load them."""
    compiler = _emulated_kernels.compiler()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no compiler {compiler[0]}")
    runtimes = []
    for name in ("libasan.so", "libstdc++.so"):
        found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(found.stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"{compiler[0]} has no {name}")
        runtimes.append(str(path))
    flags = ["-O0" if flag == "-O1" else flag for flag in _emulated_kernels.FLAGS]  # with sanitizers -O1 takes minutes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_emulated_kernels, "FLAGS", flags)
        library = _emulated_kernels.build(sanitizer="address,undefined")
    variables = {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    return library, os.environ | variables


@pytest.mark.thorough
@pytest.mark.parametrize("launcher", sorted(launchers.signatures().keys() - SKIPPED))
def test_a_launcher_withstands_anything(launcher: str, guarded: tuple[Path, dict[str, str]]) -> None:
    library, environment = guarded
    findings: list[str] = []
    first = 0
    while first < CALLS and len(findings) < MOST_CRASHES:
        command = [sys.executable, str(PROGRAM), str(library), launcher, str(first), str(CALLS - first)]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=SECONDS,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        findings += [line for line in lines if any(word in line for word in REPORTS)]
        if done.returncode == 0:
            assert lines[-1].endswith("guarded by a sanitizer: True")
            break
        calls = [line for line in lines if line.startswith("call ")]
        last = calls[-1] if calls else "before the first call"
        findings.append(f"ended with code {done.returncode} in {last}")
        assert calls, done.stdout
        first = int(calls[-1].split()[1].rstrip(":")) + 1
    assert not findings, "\n".join(findings)
