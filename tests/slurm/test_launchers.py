"""The job of jobs/cpu-partition as shipped, under each launcher; and the launch that cannot work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slurm_jobs import Job, Project


def test_mpirun(project: Project, must_be_whole: Callable[[Job], None]) -> None:
    must_be_whole(project.submit("mpirun", "--ntasks-per-node=2", launch="mpirun"))


def test_srun_pmix(project: Project, must_be_whole: Callable[[Job], None]) -> None:
    must_be_whole(project.submit("pmix", launch="pmix", arguments=("--ring", "2")))


def test_srun_pmi2_with_mpich(project: Project, mpich: Path, must_be_whole: Callable[[Job], None]) -> None:
    must_be_whole(project.submit("pmi2", launch="pmi2", venv=mpich))


def test_a_launch_of_single_ranks_is_stopped_with_the_remedy(project: Project) -> None:
    job = project.submit("wrong", launch="pmi2")  # which Open MPI does not speak: every task is rank 0 of 1
    job.wait_for("FAILED", "COMPLETED")
    assert job.states[-1] == "FAILED", job.words()
    assert job.facts()["ExitCode"] in ("2:0", "143:0")  # srun's is the highest, and it terminates the other tasks
    assert "srun started 2 ranks, but the world of Open MPI" in job.words()
    assert "use srun --mpi=pmix with Open MPI" in job.words()
    assert not (job.run / "SUCCESS").exists()
