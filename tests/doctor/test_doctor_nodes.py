"""The doctor on several nodes: what is alike, what differs and where, a folder that all see, and nobody who waits."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import launching
import pytest

import rwkvmpi
from rwkvmpi.doctor import (
    diagnosis,
    node_copies,
    node_disks,
    node_leftovers,
    node_slurm,
    nodes_compare,
    nodes_judged,
    nodes_network,
)
from rwkvmpi.doctor.diagnosis import Finding

PACKAGE = Path(rwkvmpi.__file__).parent
FORBID = """
import ctypes, struct
from rwkvmpi.doctor import node_copies
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 310), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
class Filter(ctypes.Structure):
    _fields_ = [("steps", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges, which a filter asks for
assert libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(code))), 0, 0) == 0
"""
LIMIT_S = 240  # for three ranks that import torch on a busy machine


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def odd(findings) -> dict[str, tuple[str, ...]]:
    """What is not fine, and the nodes it is about."""
    return {finding.name: finding.nodes for finding in findings if finding.status != "ok"}


def fact(rank: int, node: str, **others) -> dict:
    own = {"host": node, "boot": node, "launcher": "srun", "limits": {"nofile": 1024, "memlock": -1}}
    return {"rank": rank, "node": node, **own, "environment": {"PATH": "/a:/b"}, "cpus": [rank], "threads": 1, **others}


def test_layout_and_host_names() -> None:
    ranks = [fact(0, "n1"), fact(1, "n1"), fact(2, "n2")]
    (finding,) = nodes_compare.layout(ranks)
    assert "2 nodes, 3 ranks" in finding.value
    assert "n1 (ranks 0-1), n2 (rank 2)" in finding.value
    twins = nodes_compare.layout([fact(0, "n1", host="pc"), fact(1, "n1 (2)", host="pc", boot="other")])
    assert by_name(twins)["host names"].value == "2 machines call themselves pc"


def test_what_differs_is_told_with_its_nodes() -> None:
    rows = {f"n{i}": {"python": "3.11.7", "torch": "2.13.0", "rich": "15"} for i in range(1, 5)}
    (alike,) = nodes_compare.table("versions", rows, "mend it", "fail")
    assert (alike.status, alike.value) == ("ok", "alike on 4 nodes: python 3.11.7, torch 2.13.0, rich 15")
    rows["n3"] = {"python": "3.11.7", "torch": "2.12.1", "rich": "14"}
    same, torch, rich = nodes_compare.table("versions", rows, "mend it", "fail", mild=("rich",))
    assert same.value == "alike on 4 nodes: python 3.11.7"
    assert (torch.status, torch.nodes, torch.remedy) == ("fail", ("n3",), "mend it")
    assert torch.value == "torch: n1, n2, n4: 2.13.0; n3: 2.12.1"
    assert rich.status == "warn"


def test_a_stale_copy_is_told_by_its_files() -> None:
    nodes = {name: {"package": "/opt/rwkvmpi", "files": {"a.py": "1", "b.py": "2"}} for name in ("n1", "n2", "n3")}
    assert odd(nodes_compare.installations(nodes)) == {}
    nodes["n2"]["files"] = {"a.py": "1", "b.py": "9", "c.py": "3"}
    (finding,) = nodes_compare.installations(nodes)
    assert finding.nodes == ("n2",)
    assert finding.facts["files"] == ["b.py", "c.py"]
    assert "n2: rwkvmpi in /opt/rwkvmpi has other files than n1, n3" in finding.value


def test_limits_environment_and_cores_of_ranks() -> None:
    ranks = [fact(0, "n1"), fact(1, "n1"), fact(2, "n2"), fact(3, "n2")]
    assert odd(nodes_compare.limits(ranks)) == {}
    assert odd(nodes_compare.environments(ranks)) == {}
    assert odd(nodes_compare.affinities(ranks)) == {}
    ranks[2]["limits"] = ranks[3]["limits"] = {"nofile": 256, "memlock": 65536}
    ranks[3]["environment"] = {"PATH": "/a:/c", "UCX_TLS": "tcp"}
    assert "memlock: n1: unlimited; n2: 64 KiB" in [f.value for f in nodes_compare.limits(ranks)]
    path, ucx = nodes_compare.environments(ranks)
    assert path.value == "PATH: n1, rank 2 on n2: part 2 /b; rank 3 on n2: part 2 /c"
    assert (ucx.value, ucx.nodes) == ("UCX_TLS: n1, rank 2 on n2: not set; rank 3 on n2: tcp", ("n2",))
    for one in ranks:
        one |= {"cpus": [0] if one["node"] == "n2" else [one["rank"]], "cpus_of_node": 8}
    (crowded,) = nodes_compare.affinities(ranks)
    assert crowded.nodes == ("n2",)
    assert "ranks 2-3 are bound to the same cores, 0 of 8" in crowded.value


def test_clocks() -> None:
    fine, late = {"n2": (0.002, 0.001), "n3": (-0.01, 0.02)}, {"n4": (-3700.0, 0.001)}
    assert odd(nodes_compare.clocks(fine, "n1")) == {}
    warned, _ = nodes_compare.clocks(fine | late, "n1")
    assert (warned.status, warned.nodes, warned.value) == ("warn", ("n4",), "n4 is 3700.0 s behind n1")
    assert "chrony" in warned.remedy


def test_model_files() -> None:
    def row(nbytes: int) -> dict:
        return {"model": {"path": "/m.pth", "bytes": nbytes}}

    sizes = {"n1": row(10), "n2": row(10), "n3": row(10)}
    digests = {node: {"model": "aa"} for node in sizes}
    (alike,) = nodes_compare.files(sizes, digests)
    assert (alike.status, alike.value) == ("ok", "alike on 3 nodes: 10 bytes, SHA-256 aa")
    (unlike,) = nodes_compare.files(sizes, digests | {"n3": {"model": "bb"}})
    assert (unlike.status, unlike.nodes) == ("fail", ("n3",))
    (shorter,) = nodes_compare.files(sizes | {"n2": row(9)}, {})
    assert (shorter.nodes, shorter.value) == (("n2",), "bytes: n1, n3: 10; n2: 9")
    (absent,) = nodes_compare.files(sizes | {"n2": {"model": {"path": "/m.pth", "error": "no such file"}}}, {})
    assert (absent.nodes, absent.value) == (("n2",), "n2: /m.pth: no such file")


def test_a_folder_that_all_see_late_or_without_locks() -> None:
    fine = {"seen": True, "new": [0.01, 0.02], "replaced": [0.01], "reads": 90, "missing": 0, "torn": 0}
    fine |= {"lock": "refused", "run_lock": "refused", "freed": True, "mount": "nfs4 from s:/x"}
    reports = {"n1": {"mount": "nfs4 from s:/x", "file_clock": 0.0}, "n2": fine, "n3": dict(fine)}
    assert odd(nodes_judged.shared_folder("/runs", reports, "n1")) == {}
    reports["n3"] |= {"new": [31.0], "lock": "taken", "torn": 2}
    found = odd(nodes_judged.shared_folder("/runs", reports, "n1"))
    assert found == {"visibility": ("n3",), "rename": ("n3",), "locks": ("n3",)}
    reports["n3"] |= {"run_lock": "taken"}
    assert by_name(nodes_judged.shared_folder("/runs", reports, "n1"))["locks"].status == "fail"
    reports["n3"] = {"seen": False, "mount": "ext4 from /dev/sda1"}
    finding = by_name(nodes_judged.shared_folder("/runs", reports, "n1"))["shared folder"]
    assert (finding.status, finding.nodes) == ("fail", ("n3",))
    assert "there it is nfs4 from s:/x, here ext4 from /dev/sda1" in finding.value
    reports["n1"]["file_clock"] = 90.0
    assert "file server's clock" in odd(nodes_judged.shared_folder("/runs", reports, "n1"))


def test_each_nodes_own_findings() -> None:
    told = {n: [Finding("disk", "ok", f"{n} GiB"), Finding("cpu", "ok", "fast")] for n in ("1", "2", "3")}
    disk, cpu = nodes_judged.of_each_node(told, "2")
    assert (disk.value, cpu.value) == ("2 GiB (2; fine on all 3 nodes)", "fast (all 3 nodes)")
    told["2"][0] = Finding("disk", "warn", "full", "empty it", nodes_judged.elsewhere)
    good, bad, _ = nodes_judged.of_each_node(told, "2")
    assert good.value == "1 GiB (1; fine on 1, 3)"
    assert (bad.value, bad.nodes, bad.as_json()["fixable"]) == ("2: full", ("2",), True)


def test_the_mount_of_a_folder(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
        "30 22 0:40 / /home rw - nfs4 server:/home rw,vers=4.2,local_lock=none\n"
        "31 30 0:41 / /home/with\\040blank rw - lustre mgs@tcp:/fs rw,localflock\n"
    )
    assert node_disks.mount_of(Path("/homes/x"), mounts).kind == "ext4"
    there = node_disks.mount_of(Path("/home/x"), mounts)
    assert (there.kind, there.source, there.over_network) == ("nfs4", "server:/home", True)
    assert node_disks._without_locks(there) == ""
    assert node_disks._without_locks(node_disks.mount_of(Path("/home/with blank"), mounts)) == "localflock"
    (finding,) = node_disks.file_system(tmp_path)
    assert finding.facts["free"] > 0
    listing = "Disk quotas for user x (uid 7):\n Filesystem blocks quota limit grace files quota limit grace\n"
    listing += " server:/home 99614720* 104857600 209715200 0 17 0 0 0\n"
    words, share = node_disks.quota_in(listing, "server:/home") or ("", 0)
    assert (words, share) == ("quota 95 of 100 GiB used", 0.95)


def test_left_over_session_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"prterun-x@0.0;tcp4://127.0.0.1:{server.getsockname()[1]}\n"
        live, dead, other = (tmp_path / name for name in (f"ompi.{os.getpid()}", f"ompi.{gone.pid}", "ompi.4194305"))
        old = tmp_path / f"ompi.host.{os.getuid()}"
        for folder in (live, dead / "0" / "0", other, old / f"pid.{gone.pid}", tmp_path / "ompi.x"):
            folder.mkdir(parents=True)
        (other / "pmix.host.tool").write_text(address)  # its process has another number here, but it listens
        monkeypatch.setattr(node_leftovers.tempfile, "gettempdir", lambda: str(tmp_path))
        (finding,) = node_leftovers.session_folders()
        assert finding.facts["folders"] == [str(dead), str(old / f"pid.{gone.pid}")]
        assert "code 213" in finding.value
        assert diagnosis.mend(finding).fixed
        assert not dead.exists()
        assert live.exists()
        assert other.exists()
        (finding,) = node_leftovers.session_folders()
        assert finding.status == "ok"


def test_the_copy_between_processes_is_tried() -> None:
    (finding,) = node_copies.single_copy()
    assert finding.value.startswith("ranks of this node may")
    assert (finding.status == "ok") == ("errno" not in finding.facts)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter names a system call by its number on x86_64")
def test_a_kernel_that_forbids_the_copy() -> None:
    """As a container's filter does: process_vm_readv ends with EPERM."""
    done = subprocess.run(
        [sys.executable, "-c", FORBID + "print(*(f.status + f.value + f.remedy for f in node_copies.single_copy()))"],
        env=launching.environment(PYTHONPATH=str(PACKAGE.parent)), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("warn")
    assert "EPERM" in done.stdout
    assert "--cap-add SYS_PTRACE" in done.stdout


def test_what_srun_offers() -> None:
    listing = "MPI plugin types are...\n\tnone\n\tpmi2\n\tpmix\nspecific pmix plugin versions available: pmix_v4\n"
    assert node_slurm.plugins(listing) == ["none", "pmi2", "pmix"]
    assert node_slurm.fitting("Open MPI v5.0.11", ["none", "pmi2", "pmix"]) == "pmix"
    assert node_slurm.fitting("Open MPI v5.0.11", ["none", "pmi2", "pmix_v4"]) == "pmix_v4"
    assert node_slurm.fitting("Open MPI v5.0.11", ["none", "pmi2"]) == ""
    assert node_slurm.fitting("MPICH Version: 4.3", ["none", "pmi2", "pmix"]) == "pmi2"
    there = node_slurm.partitions("cpu*|4|64|2-00:00:00|(null)\ngpu|2|32|1:00:00|gpu:4\ngpu|1|48|1:00:00|gpu:8\n")
    assert [str(one) for one in there] == [
        "cpu* (4 nodes of 64 CPUs, 2-00:00:00)",
        "gpu (3 nodes of 48 CPUs, gpu:8, 1:00:00)",
    ]
    assert "srun --mpi=pmix -N 2 --ntasks-per-node=1 env PMIX" in node_slurm.next_command("pmix", there)
    assert node_slurm.next_command("", there[1:]).startswith("salloc -N 2 --ntasks-per-node=1 -p gpu mpirun -n 2")


def test_the_way_to_a_host() -> None:
    door = nodes_network.Door()
    assert nodes_network.reach(door.address)["name"] == ""
    told = {**door.address, "host": "no-such-host.invalid"}
    assert "cannot be resolved" in nodes_network.reach(told)["name"]
    door.close()


def test_one_process_under_a_launcher_of_two(tmp_path: Path) -> None:
    """Rank 0 of 1, as srun with the wrong --mpi makes it."""
    environment = launching.environment(PMI_SIZE="2", PMI_RANK="0", MPI_LOCALNRANKS="2", PYTHONPATH=str(PACKAGE.parent))
    done = subprocess.run(
        launching.command(1, "doctor", "--all-ranks", "--json"),
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (finding,) = json.loads(done.stdout)
    assert "started 2 ranks, but the world of" in finding["value"]


@pytest.mark.parallel
def test_nobody_waits_for_a_rank_that_hangs_or_is_lost() -> None:
    program = Path(__file__).with_name("circle_program.py")
    done = subprocess.run(
        [str(launching.mpirun()), "-n", "3", sys.executable, str(program)],
        env=launching.environment(PYTHONPATH=str(PACKAGE.parent)), capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (large, told, slow, hung, broken, clocks, number, gathered, last), lost = json.loads(done.stdout.splitlines()[0])
    assert large == [[1_000_000 + rank, ""] for rank in range(3)]
    assert told == {"told": 0}
    assert slow == [[None, ""]] * 3
    assert hung == [[None, ""], [None, "hung: not done within 1 s"], [None, ""]]
    assert broken[2] == [None, "ZeroDivisionError: integer division or modulo by zero"]
    assert (clocks, number, gathered) == ([True, True], 7, [0, 1, 2])
    assert last[:2] == [[0, ""], [1, ""]]
    assert "silent for more than 5 s, at lost" in last[2][1]
    assert lost == {"2": "lost"}


def examined(tmp_path: Path, *nodes: tuple[int, list[object], list[str]]) -> tuple[int, list[dict]]:
    """`rwkvmpi doctor --all-ranks --json` by ranks that take themselves for nodes n1, n2, ...: for each the number of
    its ranks, the doctor's further arguments, and words that stand before the command."""
    command = [str(launching.mpirun())]
    for number, (ranks, arguments, before) in enumerate(nodes, 1):
        command += [":"] if number > 1 else []
        program = [sys.executable, "-m", "rwkvmpi", "doctor", "--all-ranks", "--json", *map(str, arguments)]
        command += ["-n", str(ranks), "env", f"SLURMD_NODENAME=n{number}", *before, *program]
    environment = launching.environment(PYTHONPATH=str(PACKAGE.parent))
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout.startswith("["), done.stderr
    return done.returncode, json.loads(done.stdout[: done.stdout.rindex("]") + 1])


@pytest.mark.parallel
def test_nodes_that_are_alike(tmp_path: Path) -> None:
    arguments = ["--model", "bundled", "--folder", tmp_path / "runs", "--fix"]
    code, found = examined(tmp_path, (1, arguments, []), (2, arguments, []))
    assert [finding for finding in found if finding["status"] == "fail"] == []
    assert code == 0
    findings = {finding["name"]: finding for finding in found}
    (mended,) = (finding for finding in found if finding["fixed"])
    assert mended["value"].startswith("mended: create")
    assert findings["nodes"]["facts"]["ranks"] == {"n1": [0], "n2": [1, 2]}
    for name in ("program", "versions", "libraries", "kernels", "shared folder", "environment", "limits of ranks"):
        assert (findings[name]["status"], findings[name]["nodes"]) == ("ok", ["n1", "n2"]), name
    for name in ("clocks", "way to rank 0", "visibility", "rename", "locks"):
        assert (findings[name]["status"], findings[name]["nodes"]) == ("ok", ["n2"]), findings[name]
    assert "RWKV-7" in findings["model"]["value"]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parallel
def test_a_node_that_differs_is_named(tmp_path: Path) -> None:
    """Node n2 has a stale copy of the program, another model file, few open files, a wrong clock, a folder of its own,
    and a setting of its own."""
    stale = tmp_path / "stale"
    shutil.copytree(PACKAGE, stale / "rwkvmpi", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for library in (PACKAGE / "ops").glob("*.so"):
        (stale / "rwkvmpi" / "ops" / library.name).symlink_to(library)
    with (stale / "rwkvmpi" / "__init__.py").open("a") as file:
        file.write('\n__version__ = "0.0.9"\n')
    (stale / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 100\n")
    models = [tmp_path / f"model-{node}.safetensors" for node in (1, 2)]
    for path in models:
        shutil.copy(next((PACKAGE / "data").glob("*.safetensors")), path)
    with models[1].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3c")
    folders = [tmp_path / f"runs-{node}" for node in (1, 2)]
    arguments: list[list[object]] = []
    for model, folder in zip(models, folders, strict=True):
        folder.mkdir()
        arguments.append(["--model", model, "--folder", folder])
    before = [f"PYTHONPATH={stale}", "UCX_TLS=tcp", "bash", "-c", 'ulimit -Sn 512; exec "$0" "$@"']
    code, found = examined(tmp_path, (1, arguments[0], []), (1, arguments[1], before))
    assert code == 1
    told = {
        finding["name"] + " " + finding["facts"].get("key", ""): finding
        for finding in found
        if finding["nodes"] == ["n2"]
    }
    assert "__init__.py" in told["program "]["value"]
    assert f"n1: {rwkvmpi.__version__}; n2: 0.0.9" in told["versions rwkvmpi"]["value"]
    assert "nofile: n1: " in told["limits of ranks nofile"]["value"]
    assert "UCX_TLS: n1: not set; n2: tcp" in told["environment UCX_TLS"]["value"]
    assert told["environment PYTHONPATH"]["status"] == "warn"
    assert 99 < told["clocks "]["facts"]["seconds"] < 101
    assert told["model SHA-256"]["status"] == "fail"
    assert told["shared folder "]["status"] == "fail"
    assert "n2 does not see what n1 writes" in told["shared folder "]["value"]
    assert all(list(folder.iterdir()) == [] for folder in folders)
