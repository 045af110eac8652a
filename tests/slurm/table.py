"""What a test observed of a job, kept with the test's report: scripts/slurm_scenarios.py makes a table of it."""

from __future__ import annotations

import re

import pytest
from slurm_jobs import Job

KEY = "job"
_GRID = re.compile(r"(\d+) stages x (\d+) ring x (\d+) replicas")


def grids(job: Job) -> list[tuple[int, ...]]:
    """Stages, ring and replicas of every start of a job that came to reading."""
    return [tuple(map(int, match.groups())) for match in _GRID.finditer(job.words())]


def observed(job: Job, digest: str, identical: bool | None) -> dict[str, object]:
    """A row of the table; `identical` is None where a job has no results to compare."""
    facts = job.facts()
    return {
        "launcher": job.launch,
        "grids": " ".join("x".join(map(str, grid)) for grid in grids(job)),
        "states": " ".join(job.states),
        "restarts": int(facts["Restarts"]),
        "exit_code": facts["ExitCode"],
        "sha256": digest,
        "identical": identical,
    }


def record(request: pytest.FixtureRequest, job: Job, digest: str = "", identical: bool | None = None) -> None:
    """Keep a row with the report of the test that asks."""
    request.node.user_properties.append((KEY, observed(job, digest, identical)))
