"""The jobs of jobs/cpu-partition and jobs/gpu-roce as shipped, under each launcher; and launches that cannot work."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_jobs import ENDED, Job, Project, wait_until
from table import record

from rwkvmpi.models.random_weights import random_weights, write_pth
from rwkvmpi.ops.cuda.library import EMULATION_VARIABLE
from rwkvmpi.store.digest import content_digest


def test_mpirun(project: Project, must_be_whole: Callable[[Job], None]) -> None:
    job = project.submit("mpirun", "--ntasks-per-node=2", "--cpus-per-task=3", launch="mpirun")
    shown = ["scontrol", "show", "step", f"{job.number}.0"]

    def step() -> str:
        return subprocess.run(shown, capture_output=True, text=True, check=False).stdout

    # mpirun's own processes, in which all ranks of a node live, must have all of the job's cores
    wait_until(lambda: "Name=prted" in step(), 60, "a step of mpirun's")
    assert re.search(r" CPUs=12 ", step()), step()
    must_be_whole(job)


def test_srun_pmix_after_a_look_at_the_nodes(project: Project, must_be_whole: Callable[[Job], None]) -> None:
    job = project.submit("pmix", launch="pmix", arguments=("--ring", "2"), variables={"DOCTOR": "1"})
    must_be_whole(job)
    assert re.search(r"\d+ findings, 0 wrong", job.words())


def test_srun_pmi2_with_mpich(project: Project, mpich: Path, must_be_whole: Callable[[Job], None]) -> None:
    must_be_whole(project.submit("pmi2", launch="pmi2", venv=mpich))


def test_a_launch_of_single_ranks_is_stopped_with_the_remedy(project: Project, request: pytest.FixtureRequest) -> None:
    job = project.submit("wrong", launch="pmi2")  # which Open MPI does not speak: every task is rank 0 of 1
    job.wait_for(*ENDED)
    record(request, job)
    assert job.states[-1] == "FAILED", job.words()
    assert job.facts()["ExitCode"] in ("2:0", "143:0")  # srun's is the highest, and it terminates the other tasks
    assert "srun started 2 ranks, but the world of Open MPI" in job.words()
    assert "use srun --mpi=pmix with Open MPI" in job.words()
    assert not (job.run / "SUCCESS").exists()


def test_gpu_nodes(project: Project, emulated_kernels: Path, request: pytest.FixtureRequest) -> None:
    """GPUs as Slurm counts them, their kernels emulated; no RDMA, so that UCX has only shared memory to offer."""
    write_pth(project.folder / "small.pth", random_weights("7", n_layer=2, n_embd=64, vocab_size=256, head_size=64))
    project.documents("few", {"argparse": 300, "bisect": 200})
    emulated = {EMULATION_VARIABLE: str(emulated_kernels)}
    without_rdma = emulated | {"OMPI_MCA_pml_ucx_tls": "any", "OMPI_MCA_pml_ucx_devices": "any"}

    def submit(name: str, nodes: int, launch: str, variables: dict[str, str], place: str = "gpu-roce") -> Job:
        each = 2 // nodes
        options = (f"--nodes={nodes}", f"--gpus-per-node={each}", f"--ntasks-per-node={each}")
        arguments = ("--chunk", "256", "--ring", "2")
        return project.submit(name, *options, launch=launch, arguments=arguments, place=place, variables=variables)

    jobs = [submit("gpu", 1, "mpirun", without_rdma)]
    refused = submit("gpu-no-rdma", 2, "mpirun", emulated)
    project.copy_place("gpu-roce", "gpu-tcp")
    settings = project.start(sys.executable, "-m", "rwkvmpi", "doctor", "--emit", "env")
    (project.folder / "jobs/gpu-tcp/env.sh").write_text(settings)
    jobs.append(submit("gpu-tcp", 2, "pmix", emulated, "gpu-tcp"))
    run = ("run", "jobs/gpu-roce/job.toml", "--chunk", "256", "-o", "runs/gpu-undisturbed")
    project.start(sys.executable, "-m", "rwkvmpi", *run, variables=emulated)
    expected = content_digest(project.folder / "runs/gpu-undisturbed/results.h5")
    for job in jobs:
        job.wait_for(*ENDED)
        assert job.states[-1] == "COMPLETED", job.words()
        assert "gres:gpu:" in job.facts()["TresPerNode"]
        digest = content_digest(job.run / "results.h5")
        record(request, job, digest, digest == expected)
        assert digest == expected
    refused.wait_for(*ENDED)
    record(request, refused)
    assert refused.states[-1] == "FAILED"  # rather than to fall back to TCP without a word
    assert refused.restarts() == 0
    assert "transport 'rc' is not available" in refused.words()
