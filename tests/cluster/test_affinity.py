"""Cores and threads, on files as the kernel writes them and on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rwkvmpi.cluster import affinity
from rwkvmpi.cluster.launcher import LaunchFacts

RANK_OF_2 = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_quota_of_cgroup_2_is_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    process = tmp_path / "proc"
    write(process, "0::/job/step\n")
    write(tmp_path / "cg/job/step/cpu.max", "max 100000\n")
    write(tmp_path / "cg/job/cpu.max", "350000 100000\n")
    assert affinity.cgroup_quota(tmp_path / "cg", process) == 3.5
    write(tmp_path / "cg/job/step/cpu.max", "150000 100000\n")
    assert affinity.cgroup_quota(tmp_path / "cg", process) == 1.5


def test_quota_of_cgroup_1(tmp_path: Path) -> None:
    process = tmp_path / "proc"
    write(process, "5:memory:/x\n4:cpu,cpuacct:/job\n")
    write(tmp_path / "cg/cpu,cpuacct/job/cpu.cfs_quota_us", "200000\n")
    write(tmp_path / "cg/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n")
    assert affinity.cgroup_quota(tmp_path / "cg", process) == 2.0
    write(tmp_path / "cg/cpu,cpuacct/job/cpu.cfs_quota_us", "-1\n")
    assert affinity.cgroup_quota(tmp_path / "cg", process) is None


def test_hardware_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(8):  # two packages of two cores; cpu and cpu + 4 share a core
        write(tmp_path / f"cpu{cpu}/topology/core_id", f"{cpu % 2}\n")
        write(tmp_path / f"cpu{cpu}/topology/physical_package_id", f"{cpu % 4 // 2}\n")
    monkeypatch.setattr(affinity, "CPUS", tmp_path)
    assert affinity.core_groups(list(range(8))) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert affinity.physical_cores({0, 4, 1}) == 2


def test_every_rank_gets_cores_of_its_own() -> None:
    groups = [[cpu, cpu + 8] for cpu in range(8)]
    facts = [LaunchFacts("slurm", rank, 4, rank, 4, "n") for rank in range(4)]
    slices = [affinity.own_slice(groups, fact, 2) for fact in facts]
    assert slices[0] == {0, 8, 1, 9}
    assert set().union(*filter(None, slices)) == set(range(16))
    assert affinity.own_slice(groups, facts[0], 3) is None


def test_share_of_this_machine() -> None:
    alone = affinity.threads_per_rank(environ={})
    assert alone == affinity.cores_available({}) <= len(os.sched_getaffinity(0))
    assert affinity.threads_per_rank(environ=RANK_OF_2) == max(1, alone // 2)
    assert affinity.threads_per_rank(local_size=10_000, environ=RANK_OF_2) == 1
    assert affinity.threads_per_rank(environ=RANK_OF_2 | {"OMP_NUM_THREADS": "5,2"}) == 5


def test_pin_leaves_a_shared_machine_alone() -> None:
    before = os.sched_getaffinity(0)
    assert affinity.pin(1, RANK_OF_2) is None
    assert affinity.pin(1, RANK_OF_2 | {"SLURM_CPUS_ON_NODE": str(len(before) + 1)}) is None
    assert os.sched_getaffinity(0) == before
