"""Cores and threads, on files as the kernel writes them and on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mpirun_ranks import MPIRUN, environment

from rwkvmpi.cluster import affinity, pinning
from rwkvmpi.cluster.launcher import LaunchFacts
from rwkvmpi.cluster.pinning import Neighbour, Placement

RANK_OF_2 = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
CPUS = sorted(os.sched_getaffinity(0))
TWO_CORES = pytest.mark.skipif(affinity.physical_cores(CPUS) < 2, reason="needs two cores")
# binds its threads, computes with as many, starts background threads and tells where each of them may run
BOUND = """
import json, os, sys, threading
from concurrent.futures import ThreadPoolExecutor
import torch
from rwkvmpi import ops
from rwkvmpi.cluster import affinity, pinning
threads = int(sys.argv[1])
torch.set_num_threads(threads)
early = ThreadPoolExecutor(1)
early.submit(int).result()
x = torch.rand(512, 1024)
with pinning.settle(None, threads) as pinned:
    begun = pinning.where(threads)
    said = affinity.describe(threads)[2]
    for _ in range(3):
        ops.layer_norm(x, x[0], x[1], 1e-5), torch.exp(x), x @ x.T
    late = ThreadPoolExecutor(1, initializer=pinning.free_this_thread)
    background = [list(pool.submit(os.sched_getaffinity, 0).result()) for pool in (early, late)]
    ended = pinning.where(threads)
    mask = affinity.rank_mask()
after = pinning.where(threads)
print(json.dumps({"begun": list(map(list, begun)), "ended": list(map(list, ended)), "after": list(map(list, after)),
                  "background": background, "mask": list(mask), "said": said, "placement": str(pinned.placement)}))
"""


def bound(*before: str, threads: int, **extra: str) -> dict:
    """What BOUND tells, started by `before`."""
    command = [*before, sys.executable, "-c", BOUND, str(threads)]
    done = subprocess.run(command, env=environment() | extra, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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


def test_hardware_threads_are_shown_as_taskset_takes_them() -> None:
    assert affinity.shown({0, 1, 2, 3, 8, 10, 11}) == "0-3,8,10-11"
    assert affinity.shown({5}) == "5"
    assert affinity.shown(set()) == ""


def test_whose_the_cores_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's word, Slurm's, or a launcher's: fewer cores than the process that started this one has."""
    assert not affinity.is_own_mask({})
    assert affinity.is_own_mask({"RWKVMPI_PIN_THREADS": "1"})
    assert affinity.is_own_mask({"SLURM_CPUS_ON_NODE": str(len(CPUS))})
    assert not affinity.is_own_mask({"SLURM_CPUS_ON_NODE": str(len(CPUS)), "RWKVMPI_PIN_THREADS": "0"})
    assert not affinity.is_own_mask({"SLURM_CPUS_ON_NODE": str(len(CPUS) + 1)})
    monkeypatch.setattr(affinity, "rank_mask", lambda: set())
    assert affinity.is_own_mask({})


@pytest.fixture
def four_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardware threads 0-7 of four cores: c and c + 4 share one."""
    for cpu in range(8):
        write(tmp_path / f"cpu{cpu}/topology/core_id", f"{cpu % 4}\n")
        write(tmp_path / f"cpu{cpu}/topology/physical_package_id", "0\n")
    monkeypatch.setattr(affinity, "CPUS", tmp_path)
    monkeypatch.setattr(affinity, "cgroup_quota", lambda: None)


@pytest.mark.usefixtures("four_cores")
def test_a_thread_gets_a_core_of_the_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"RWKVMPI_PIN_THREADS": "1"}
    monkeypatch.setattr(affinity, "rank_mask", lambda: {0, 1, 4, 5})
    alone = [Neighbour(0, frozenset({0, 1, 4, 5}), 2), Neighbour(1, frozenset({2, 3, 6, 7}), 2)]
    assert pinning.placement(2, alone, own).cores == (frozenset({0, 4}), frozenset({1, 5}))
    assert pinning.placement(1, alone, own).cores == (frozenset({0, 4}),)
    assert str(pinning.placement(2, alone, own)) == "threads on cores 0,4 1,5"
    crowded = pinning.placement(3, alone, own)
    assert (crowded.cores, crowded.reason) == ((), "3 threads on 2 cores (0-1,4-5)")
    shared = pinning.placement(1, [*alone, Neighbour(2, frozenset({5, 6}), 1)], own)
    assert (shared.cores, shared.reason) == ((), "2 ranks share the cores 0-1,4-5")
    assert "mpirun --bind-to core --map-by slot:PE=T" in shared.remedy
    strangers = pinning.placement(2, alone, own | {"RWKVMPI_PIN_THREADS": "0"})
    assert strangers.cores == ()
    assert "nobody has set the cores 0-1,4-5 aside" in strangers.reason


@pytest.mark.usefixtures("four_cores")
def test_more_threads_than_cores_on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = frozenset(range(8))
    assert pinning.crowding([Neighbour(0, whole, 4)]) == ""
    assert pinning.crowding([Neighbour(0, frozenset({0, 4}), 1), Neighbour(1, frozenset({1, 5}), 1)]) == ""
    assert pinning.crowding([Neighbour(0, whole, 3), Neighbour(1, whole, 2)]).startswith(
        "2 ranks with 5 threads in all on 4 cores of "
    )
    monkeypatch.setattr(affinity, "cgroup_quota", lambda: 2.5)
    assert "1 rank with 3 threads in all on 2 cores" in pinning.crowding([Neighbour(0, whole, 3)])


def test_nothing_is_touched_where_nothing_is_placed() -> None:
    before = os.sched_getaffinity(0)
    with pinning.Pinned(Placement((), "of a test", "none needed")):
        assert os.sched_getaffinity(0) == before
        assert affinity.describe(3)[1:] == [
            "1 rank on this node, threads per rank: 3",
            "threads are not bound: of a test; none needed",
        ]
    assert affinity.describe()[2] == "threads are not bound: no work has begun"


@TWO_CORES
def test_threads_of_a_process_are_bound_and_its_background_is_free() -> None:
    groups = affinity.core_groups(CPUS)[:2]
    found = bound(threads=2, RWKVMPI_PIN_THREADS="1")
    assert found["begun"] == found["ended"] == groups
    assert found["background"] == [CPUS, CPUS]
    assert found["after"] == [CPUS, CPUS]
    assert found["mask"] == CPUS
    assert found["said"] == found["placement"] == "threads on cores " + " ".join(map(affinity.shown, groups))


@TWO_CORES
def test_taskset_makes_cores_the_own_ones() -> None:
    group = affinity.core_groups(CPUS)[1]
    found = bound("taskset", "-c", affinity.shown(group), threads=1)
    assert found["begun"] == found["ended"] == [group]
    unbound = bound(threads=1)
    assert unbound["begun"] == [CPUS]
    assert "nobody has set the cores" in unbound["said"]


@TWO_CORES
@pytest.mark.parallel
def test_ranks_are_bound_where_the_launcher_bound_them() -> None:
    program = (
        "import json\n"
        "from rwkvmpi.cluster import mpi\n"
        "from rwkvmpi.doctor import mpi_checks\n"
        "def main():\n"
        "    found = list(mpi_checks.mpi_library())\n"
        "    if mpi.world().rank == 0: print(json.dumps([f.as_json() for f in found]))\n"
        "mpi.guard(main)\n"
    )
    cores = [affinity.shown(group) for group in affinity.core_groups(CPUS)]
    for how, status in (("core", "ok"), ("none", "warn")):
        command = [str(MPIRUN), "-n", "2", "--bind-to", how, sys.executable, "-c", program]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (threads,) = [finding for finding in json.loads(done.stdout) if finding["name"] == "threads"]
        assert threads["status"] == status
        if how == "core":
            assert f"rank 0: threads on cores {cores[0]}; rank 1: threads on cores {cores[1]}" in threads["value"]
        else:
            assert threads["value"].count("threads are not bound: 2 ranks share the cores") == 2
            assert "--bind-to core" in threads["remedy"]
