"""The laboratory that must be up, a project to submit from, and the result that every job must have."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_jobs import ROOT, Job, Project

from rwkvmpi.store.digest import content_digest


@pytest.fixture(scope="session", autouse=True)
def laboratory_is_up() -> None:
    folder = os.environ.get("SLURM_LAB", "")
    if not folder or os.environ.get("SLURM_CONF") != f"{folder}/slurm.conf":
        pytest.skip("needs a laboratory: scripts/slurm_lab.sh run -- .venv/bin/python -m pytest tests/slurm")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("slurm")
    programs = folder / "bin"  # found where the environment that a job activates has no rwkvmpi installed
    programs.mkdir()
    program = programs / "rwkvmpi"
    program.write_text('#!/bin/sh\nexec python -m rwkvmpi "$@"\n')
    program.chmod(0o755)
    return Project(folder / "project", programs)


@pytest.fixture(scope="session")
def undisturbed(project: Project) -> str:
    """The digest of the same job's result, read by one process without Slurm."""
    command = [sys.executable, "-m", "rwkvmpi", "run", "jobs/cpu-partition/job.toml", "-o", "runs/undisturbed"]
    subprocess.run(command, cwd=project.folder, env=project.environment(), check=True, timeout=120)
    return content_digest(project.folder / "runs/undisturbed/results.h5")


@pytest.fixture
def must_be_whole(undisturbed: str) -> Callable[[Job], None]:
    """Wait for the end of a job, which must be success with the undisturbed run's result."""

    def check(job: Job) -> None:
        job.wait_for("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=120)
        assert job.states[-1] == "COMPLETED", f"{job.states}\n{job.words()}"
        assert (job.run / "SUCCESS").exists()
        digest = content_digest(job.run / "results.h5")
        print(f"job {job.number} {job.run.name}: {' '.join(job.states)}, {job.restarts()} restarts, {digest[:16]}")
        assert digest == undisturbed

    return check


@pytest.fixture(scope="session")
def mpich() -> Path:
    """A virtual environment with MPICH instead of Open MPI, and for the rest the packages of this one."""
    folder = ROOT / "build" / "mpich-venv"
    if not list(folder.glob("lib/libmpi.so.12")):
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet"]
        if subprocess.run([*pip, "mpich"], check=False, timeout=120).returncode:
            pytest.skip("MPICH could not be installed: pip install mpich")
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder
