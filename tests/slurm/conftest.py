"""The laboratory that must be up, a project to submit from, and the result that every job must have."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_jobs import ENDED, ROOT, Job, Project
from table import record

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
def undisturbed(project: Project, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the same job's result, read by one process without Slurm; several workers of pytest share it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    digest = folder / "undisturbed"
    with open(folder / "undisturbed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not digest.exists():
            run = ("run", "jobs/cpu-partition/job.toml", "-o", "runs/undisturbed")
            project.start(sys.executable, "-m", "rwkvmpi", *run, seconds=300)
            digest.write_text(content_digest(project.folder / "runs/undisturbed/results.h5"))
    return digest.read_text()


@pytest.fixture
def must_be_whole(undisturbed: str, request: pytest.FixtureRequest) -> Callable[[Job], None]:
    """Wait for the end of a job, which must be success with the undisturbed run's result."""

    def check(job: Job) -> None:
        job.wait_for(*ENDED, seconds=240)
        assert job.states[-1] == "COMPLETED", f"{job.states}\n{job.words()}"
        assert (job.run / "SUCCESS").exists()
        digest = content_digest(job.run / "results.h5")
        record(request, job, digest, digest == undisturbed)
        assert digest == undisturbed

    return check


@pytest.fixture(scope="session")
def mpich() -> Path:
    """A virtual environment with MPICH instead of Open MPI, and for the rest the packages of this one."""
    folder = ROOT / "build" / "mpich-venv"
    folder.parent.mkdir(exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers ask at once
        if not list(folder.glob("lib/libmpi.so.12")):
            subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
            pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet"]
            if subprocess.run([*pip, "mpich"], check=False, timeout=120).returncode:
                pytest.skip("MPICH could not be installed: pip install mpich")
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder
