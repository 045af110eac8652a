"""What the tests that start ranks share: the mpirun, the ranks' program and their environment."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import launching

import rwkvmpi

PROGRAM = Path(__file__).with_name("rank_program.py")
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def environment() -> dict[str, str]:
    """For ranks on any machine: as root, more ranks than cores, and with the package that is under test."""
    return launching.environment(PYTHONPATH=str(Path(rwkvmpi.__file__).parents[1]))


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Poll until the condition holds; an assertion fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
