"""jobs/array and jobs/chain as shipped: parts and links that fail, are queued again and run again; one result."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from disturbing import hold_while_reading, signal_batch_script
from slurm_jobs import ENDED, Job, Project
from table import record

from rwkvmpi.store.digest import content_digest

SMALL = {"SBATCH_OPTIONS": "--nodes=1 --ntasks-per-node=1 --cpus-per-task=1", "LAUNCH": "mpirun"}
CORPUS = {"argparse": 9000, "bisect": None, "colorsys": None, "heapq": 9000, "stat": None, "textwrap": 12000}


def rwkvmpi(project: Project, *arguments: object) -> str:
    """The program as one process without Slurm; its words."""
    return project.start(sys.executable, "-m", "rwkvmpi", *map(str, arguments))


def numbers(words: str) -> dict[str, int]:
    """What a submit.sh said: the name of a job, and its number."""
    return {name: int(number) for name, number in re.findall(r"^(\w+) (\d+)\b", words, re.MULTILINE)}


def element(project: Project, array: int, index: int, run: Path) -> Job:
    output = project.folder / f"rwkvmpi-{array}_{index}.out"
    return Job(f"{array}_{index}", output, run / f"part-{index:05d}", "mpirun")


def link(project: Project, name: str, number: int, run: Path) -> Job:
    return Job(number, project.folder / f"rwkvmpi-{name}-{number}.out", run, "mpirun")


def must_end(job: Job, state: str) -> None:
    job.wait_for(*ENDED, seconds=240)
    assert job.states[-1] == state, f"{job.states}\n{job.words()}"


def test_an_array_and_its_merge(project: Project, request: pytest.FixtureRequest) -> None:
    """Part 2 fails at first; the element whose number is the whole array's is told to stop, and queued again alone."""
    project.documents("corpus", CORPUS)
    run = project.folder / "runs/array"
    run.mkdir(parents=True)
    broken = run / "part-00002"
    broken.touch()  # a run folder cannot be made here
    settings = SMALL | {"SHARDS": "3", "RUN": str(run)}
    first = numbers(project.start("jobs/array/submit.sh", "--commit-every", "2c", variables=settings))
    parts = [element(project, first["array"], index, run) for index in (1, 2, 3)]
    merge = link(project, "merge", first["merge"], run / "all")
    same = parts[2]
    hold_while_reading(same)
    assert same.facts()["JobId"] == str(first["array"])
    signal_batch_script(same)
    same.wait_for_words("told to stop", 20)
    same.continue_ranks()
    rwkvmpi(project, "run", "jobs/array/job.toml", "-o", "runs/whole")  # undisturbed, meanwhile
    for part, state, restarts in zip(parts, ("COMPLETED", "FAILED", "COMPLETED"), (0, 0, 1), strict=True):
        must_end(part, state)
        assert part.restarts() == restarts
        record(request, part)
    must_end(merge, "CANCELLED")
    assert merge.facts()["Reason"] == "DependencyNeverSatisfied"
    assert not (run / "all").exists()

    broken.unlink()
    state = json.loads(rwkvmpi(project, "status", run, "--json"))
    assert state["array"] == "2"
    again = numbers(project.start("jobs/array/submit.sh", variables=settings))
    part = element(project, again["array"], 2, run)
    merge = link(project, "merge", again["merge"], run / "all")
    must_end(merge, "COMPLETED")
    assert part.state() == "COMPLETED"
    assert not (project.folder / f"rwkvmpi-{again['array']}_1.out").exists()  # which was done
    digest = content_digest(run / "all/results.h5")
    expected = content_digest(project.folder / "runs/whole/results.h5")
    record(request, merge, digest, digest == expected)
    assert digest == expected


def test_a_chain_and_one_whose_first_link_fails(project: Project, request: pytest.FixtureRequest) -> None:
    """The first link of the good one is queued again: the others wait until it has succeeded."""
    project.documents("some", {"argparse": 12000, "bisect": None})
    project.documents("grown", {"argparse": 20000, "bisect": None, "colorsys": None})
    runs = project.folder / "runs"

    def submit(name: str, *arguments: str) -> dict[str, int]:
        settings = SMALL | {"RUN": str(runs / name)}
        return numbers(project.start("jobs/chain/submit.sh", *arguments, variables=settings))

    bad, good = submit("bad", "--chunk", "7"), submit("good", "--commit-every", "2c")
    read = link(project, "read", good["read"], runs / "good/read")
    score = link(project, "score", good["score"], runs / "good/score")
    export = link(project, "export", good["export"], runs / "good")
    hold_while_reading(read)
    signal_batch_script(read)
    read.wait_for_words("told to stop", 20)
    read.continue_ranks()
    rwkvmpi(project, "run", "jobs/chain/read.toml", "-o", runs / "read")
    rwkvmpi(project, "run", "jobs/chain/score.toml", "-o", runs / "score", "--from", runs / "read")
    must_end(export, "COMPLETED")
    assert (read.state(), score.state()) == ("COMPLETED", "COMPLETED")
    assert read.restarts() == 1
    for job in (read, score):
        digest = content_digest(job.run / "results.h5")
        expected = content_digest(runs / job.run.name / "results.h5")
        record(request, job, digest, digest == expected)
        assert digest == expected
    lines = [json.loads(line) for line in (runs / "good/scores.jsonl").read_text().splitlines()]
    assert [line["bytes"] > 0 for line in lines] == [True, False, True]  # bisect has not grown

    first = link(project, "read", bad["read"], runs / "bad/read")
    must_end(first, "FAILED")
    record(request, first)
    assert "chunk" in first.words()
    for name in ("score", "export"):
        job = link(project, name, bad[name], runs / "bad")
        must_end(job, "CANCELLED")
        assert job.facts()["Reason"] == "DependencyNeverSatisfied"
