"""The doctor on the login node and on the nodes of a job, under the laboratory's Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from slurm_jobs import Project

PMIX = ("--mpi=pmix", "env", "PMIX_SECURITY_MODE=native", "PMIX_GDS_MODULE=hash")


def examined(project: Project, *words: str) -> tuple[int, dict[str, dict]]:
    """The exit code, and the findings by their names, of WORDS rwkvmpi doctor --json."""
    environment = project.environment()
    programs, others = environment["PATH"].split(os.pathsep, 1)  # the environment that a job would have activated
    environment["PATH"] = os.pathsep.join([programs, str(Path(sys.executable).parent), others])
    done = subprocess.run(
        [*words, "--json", "--folder", str(project.folder)],
        cwd=project.folder, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.stdout.startswith("["), done.stderr
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)}


def test_all_ranks_of_two_nodes(project: Project) -> None:
    launch = ("srun", "-N2", "--ntasks-per-node=1", *PMIX)
    code, found = examined(project, *launch, "rwkvmpi", "doctor", "--all-ranks", "--model", "bundled")
    assert [finding for finding in found.values() if finding["status"] == "fail"] == []
    assert code == 0
    (first, second), ranks = found["nodes"]["nodes"], found["nodes"]["facts"]["ranks"]
    assert ranks == {first: [0], second: [1]}
    assert "started by srun" in found["nodes"]["value"]
    for name in ("program", "versions", "shared folder"):
        assert found[name]["nodes"] == [first, second]
    assert found["clocks"]["nodes"] == [second]
    assert "(both nodes)" in found["operators"]["value"]


def test_the_wrong_way_to_start_is_told(project: Project) -> None:
    """Open MPI under --mpi=pmi2: every task is rank 0 of 1."""
    code, found = examined(
        project, "srun", "-N2", "--ntasks-per-node=1", "--mpi=pmi2", "rwkvmpi", "doctor", "--all-ranks"
    )
    assert code == 1
    assert found["mpi"]["status"] == "fail"
    assert "srun --mpi=pmix with Open MPI" in found["mpi"]["value"]


def test_a_login_node(project: Project) -> None:
    """What may be started from here, and the command that goes on with the nodes, which works as it is told."""
    code, found = examined(project, "rwkvmpi", "doctor")
    assert code == 0
    assert {"batch", "urgent"} <= set(found["partitions"]["facts"]["partitions"])
    assert found["launcher"]["facts"]["plugin"] == "pmix"
    command = found["next"]["facts"]["command"].replace(" -N 2 ", " -N 1 ")
    code, found = examined(project, *command.split())
    assert code == 0
    assert found["nodes"]["value"] == "one rank was started: this report is about its machine"
    assert "SLURM_JOB_ID" not in os.environ
