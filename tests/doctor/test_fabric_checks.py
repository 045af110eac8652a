"""What the doctor says of a fabric: on trees of every kind of device, and for real on this machine."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from launching import mpirun
from sysfs_tree import LINK_LOCAL, add_interface, add_pci, add_port, mapped, roce_gids, write

from rwkvmpi.cluster import device_probe, rdma
from rwkvmpi.doctor import diagnosis, fabric_checks, fabric_counters, fabric_env, fabric_library, fabric_pairs
from rwkvmpi.doctor.diagnosis import Finding
from rwkvmpi.doctor.fabric_library import Library
from rwkvmpi.doctor.fabric_pairs import Place

SWITCH = "pci0000:15/0000:15:01.0"
NIC, GPU = f"{SWITCH}/0000:16:00.0/0000:16:01.0", f"{SWITCH}/0000:17:00.0"
OPEN_MPI = Library("Open MPI v5.0.11", "/lib/libmpi.so", "ucx", "1.20.1", "/lib/libucp.so")


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fast port that is up with an address, and no word of the environment."""
    for name in fabric_library.settings():
        monkeypatch.delenv(name)
    add_interface(tmp_path, "eth0", 9000)
    add_port(
        tmp_path, "mlx5_0", rate="400 Gb/sec (4X NDR)", gids=roce_gids("10.1.0.7", "eth0"), pci=NIC, numa=0,
        counters={"port_xmit_packets": 5_000_000, "port_rcv_packets": 5_000_000},
        hw_counters={"local_ack_timeout_err": 2, "np_ecn_marked_roce_packets": 12},
    )  # fmt: skip
    for name, value in (("current_link_speed", "32.0 GT/s PCIe"), ("current_link_width", "16")):
        write(tmp_path / "devices" / NIC / name, value)
    return tmp_path


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def ports_of(root: Path) -> dict[str, Finding]:
    return by_name(fabric_checks.ports(rdma.ports(root), root))


def test_a_good_port(node: Path) -> None:
    found = ports_of(node)
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["port mlx5_0:1"].value == (
        "up, Ethernet 400 Gb/s, RoCE, eth0 with MTU 9000 (RDMA 4096), NUMA node 0, PCIe 32 GT/s x16"
    )
    assert found["GIDs mlx5_0:1"].value.startswith("use index 3 (10.1.0.7, RoCE v2); the table: 0: fe80::")
    assert found["counts mlx5_0:1"].value == "10,000,000 packets; ECN at work: np_ecn_marked_roce_packets 12"


def test_what_is_wrong_with_a_port(node: Path) -> None:
    add_interface(node, "eth1", 1500)
    add_port(
        node, "mlx5_1", gids=[(LINK_LOCAL, "RoCE v2", "eth1")], pci="pci0000:40/0000:40:00.0", numa=1,
        counters={"port_rcv_packets": 1000, "symbol_error": 80},
        hw_counters={"out_of_sequence": 40, "rx_prio3_pause": 7},
    )  # fmt: skip
    write(node / "devices/pci0000:40/0000:40:00.0/current_link_speed", "16.0 GT/s PCIe")
    write(node / "devices/pci0000:40/0000:40:00.0/current_link_width", "4")
    add_port(node, "mlx5_2", state="1: DOWN")
    found = list(fabric_checks.ports([port for port in rdma.ports(node) if port.device != "mlx5_0"], node))
    assert [(f.name, f.status) for f in found] == [
        ("port mlx5_1:1", "warn"), ("GIDs mlx5_1:1", "warn"),
        ("counts mlx5_1:1", "warn"), ("counts mlx5_1:1", "warn"), ("port mlx5_2:1", "warn"),
    ]  # fmt: skip
    link, gid, bad, lost, down = found
    assert link.value.endswith("MTU 1500 (RDMA 1024), NUMA node 1, PCIe 16 GT/s x4: slower than the port")
    assert gid.remedy == "as root: ip addr add ADDRESS/24 dev eth1"
    assert bad.value == "bad frames: symbol_error 80; 1,000 packets; PFC at work: rx_prio3_pause 7"
    assert lost.value.startswith("lost or sent again: out_of_sequence 40; ")
    assert "mlnx_qos -i eth1" in lost.remedy
    assert "DOWN" in down.value
    write(node / "devices/pci0000:40/0000:40:00.0/current_link_width", "16")
    assert ports_of(node)["port mlx5_1:1"].remedy.startswith("ip link set eth1 mtu 9000")


def test_what_this_rank_would_take(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = fabric_checks.choice(node)
    assert (finding.status, finding.value) == ("ok", "mlx5_0:1, GID index 3 (10.1.0.7), traffic class not set")
    monkeypatch.setenv("UCX_IB_GID_INDEX", "2")
    monkeypatch.setenv("UCX_IB_TRAFFIC_CLASS", "106")
    (finding,) = fabric_checks.choice(node)
    assert (finding.status, finding.remedy) == (
        "warn", "unset RWKVMPI_RDMA_GID_INDEX UCX_IB_GID_INDEX, or set 3"
    )  # fmt: skip
    assert finding.value == "mlx5_0:1, GID index 2 (10.1.0.7), traffic class 106: RoCE v1 and not routable"


def test_nothing_to_take_is_a_mistake_only_where_it_was_asked_for(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(node / "class/infiniband/mlx5_0/ports/1/state", "1: DOWN")
    (finding,) = fabric_checks.choice(node)
    assert (finding.status, finding.value[:31]) == ("warn", "nothing: no RDMA port is up (ml")
    monkeypatch.setenv("RWKVMPI_RDMA_PORTS", "mlx5_3:1")
    (finding,) = fabric_checks.choice(node)
    assert (finding.status, finding.value[:37]) == ("fail", "nothing: there is no RDMA port mlx5_3")


def test_device_files(node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, devices = rdma.ports(node), tmp_path / "dev"

    def finding() -> Finding:
        (only,) = fabric_checks.access(found, node, devices)
        return only

    assert "modprobe ib_uverbs" in finding().remedy
    write(node / "class/infiniband_verbs/uverbs0/ibdev", "mlx5_0")
    write(node / "class/infiniband_verbs/uverbs7/ibdev", "other")
    assert finding().value == f"missing: {devices}/uverbs0"
    write(devices / "uverbs0", "")
    assert (finding().status, finding().value) == (
        "ok", f"{devices}/uverbs0 may be opened, not rdma_cm, which is not needed"
    )  # fmt: skip
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may always
    assert finding().value == f"not for this user: {devices}/uverbs0"


def test_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def finding(soft: int, hard: int, user: int = 1000) -> Finding:
        monkeypatch.setattr(resource, "getrlimit", lambda what: (soft, hard))
        monkeypatch.setattr(os, "geteuid", lambda: user)
        (only,) = fabric_checks.locked_memory()
        return only

    assert finding(resource.RLIM_INFINITY, resource.RLIM_INFINITY).status == "ok"
    assert finding(8 << 20, resource.RLIM_INFINITY).remedy.startswith("ulimit -l unlimited")
    assert "PropagateResourceLimitsExcept=MEMLOCK" in finding(8 << 20, 8 << 20).remedy
    assert finding(8 << 20, 8 << 20, user=0).status == "ok"


def test_how_mpi_would_send(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def findings(library: Library | str, **settings: str) -> dict[str, Finding]:
        monkeypatch.setattr(fabric_library, "find", lambda: library)
        monkeypatch.setattr(fabric_library, "settings", lambda: settings)
        return by_name(fabric_checks.mpi(rdma.ports(node)))

    good = findings(OPEN_MPI, UCX_RC_VERBS_RETRY_COUNT="4", UCX_RC_MLX5_RETRY_COUNT="6")
    assert {finding.status for finding in good.values()} == {"ok"}
    bad = findings(Library("Open MPI v4.1", "/l", "ob1", "", ""))
    assert (bad["MPI"].status, bad["MPI"].remedy) == ("warn", "load an Open MPI with UCX, or --transport verbs")
    endless = findings(OPEN_MPI, UCX_RC_VERBS_RETRY_COUNT="7", UCX_RC_MLX5_RETRY_COUNT="3")
    assert endless["UCX retries"].remedy == "export UCX_RC_VERBS_RETRY_COUNT=4"
    assert findings("mpi4py is not installed")["MPI"].status == "warn"


def test_gpus_beside_the_port(node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_pci(node, GPU, 0)
    add_pci(node, "pci0000:c0/0000:c0:01.0", 1)
    seen = ["0000:17:00.0", "0000:c0:01.0"]
    monkeypatch.setattr(rdma, "gpu_bus_id", lambda number: seen[number] if number < len(seen) else "")
    first, second, direct = fabric_checks.gpus(rdma.ports(node), node)
    assert (first.status, first.value) == ("ok", "0000:17:00.0: mlx5_0:1, behind the same PCIe switch")
    assert (second.status, second.value) == ("warn", "0000:c0:01.0: mlx5_0:1, on NUMA node 0, the GPU on 1")
    assert direct.status == "warn"
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06\n")
    assert fabric_checks.gpu_direct(node, driver).value == "dma-buf (open driver)"
    (node / "module/nvidia_peermem").mkdir(parents=True)
    assert fabric_checks.gpu_direct(node, tmp_path / "none").value == "peer memory by nvidia_peermem"


def test_whether_mpi_takes_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_probe, "in_child", lambda: device_probe.Probe(True, False, "cuda_copy", 2, ""))
    (finding,) = fabric_checks.cuda_aware()
    assert finding.value == (
        "MPI's own word: says no; UCX for CUDA: cuda_copy; trial: a GPU's memory was sent and came right"
    )
    monkeypatch.setattr(device_probe, "in_child", lambda: device_probe.Probe(False, None, "", 2, "it crashed"))
    (finding,) = fabric_checks.cuda_aware()
    assert finding.value.endswith("trial: it crashed; so messages pass through page-locked host memory")


def test_no_check_falls_over(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabric_library, "find", lambda: OPEN_MPI)
    found = [finding for name, check in fabric_checks.checks(node) for finding in diagnosis.examine(name, check)]
    assert not [finding.value for finding in found if finding.status == "fail"]
    assert {"port mlx5_0:1", "device files", "pyverbs", "rank 0 takes", "MPI", "settings"} <= set(by_name(found))


def test_a_device_without_its_driver(tmp_path: Path) -> None:
    assert fabric_checks.nothing_here(tmp_path)
    write(tmp_path / "bus/pci/devices/0000:16:00.0/vendor", "0x15b3")
    write(tmp_path / "bus/pci/devices/0000:16:00.0/class", "0x020000")
    assert not fabric_checks.nothing_here(tmp_path)
    (finding,) = fabric_checks.ports([], tmp_path)
    assert (finding.status, finding.remedy) == ("warn", "as root: modprobe mlx5_ib; else install rdma-core")
    (finding,) = fabric_checks.in_short(tmp_path)
    assert finding.value == "no device; ranks on several nodes talk over TCP"


def test_counts_of_several_drivers() -> None:
    heaps = fabric_counters.heaps(
        {
            "sent_pkts": 50, "rcvd_pkts": 50, "completer_retry_err": 3, "ack_deferred": 9, "lifespan": 10,  # rxe
            "rx_prio3_pause": 5, "tx_prio3_pause": 0, "rx_discards_phy": 2, "rx_prio3_pause_duration": 99,  # mlx5
            "cnpHandled": 4, "RxECNMrkd": 1, "rx_roce_discard_pkts": 6,  # irdma, bnxt_re
        }
    )  # fmt: skip
    assert heaps.packets == 100
    assert heaps.lost == {"completer_retry_err": 3, "rx_discards_phy": 2, "rx_roce_discard_pkts": 6}
    assert heaps.pauses == {"rx_prio3_pause": 5}
    assert heaps.congestion == {"cnpHandled": 4, "RxECNMrkd": 1}
    assert heaps.worth_a_warning
    assert not fabric_counters.heaps({"sent_pkts": 10**9, "duplicate_request": 900}).worth_a_warning


def test_the_interface_counts_of_this_machine() -> None:
    for folder in Path("/sys/class/net").iterdir():
        counts = fabric_counters.interface_counters(folder.name)
        assert all(name.isprintable() and value >= 0 for name, value in counts.items())
    assert fabric_counters.interface_counters("none") == {}


def place(rank: int, **differing: object) -> Place:
    same = {
        "host": f"n{rank}", "port": "mlx5_0:1", "why_not": "", "rate_gbps": 100.0, "mtu": 4096, "gid": "10.1.0.7",
        "gid_index": 3, "hardware": True, "gpu": "", "library": "Open MPI, ucx", "settings": (),
    }  # fmt: skip
    return Place(rank=rank, **(same | differing))  # type: ignore[arg-type]


def test_ranks_that_differ() -> None:
    assert list(fabric_pairs._differences([place(0), place(1)])) == []
    settings = (("UCX_IB_GID_INDEX", "3"),)
    found = list(fabric_pairs._differences([place(0), place(1, mtu=1024), place(2, port="", settings=settings)]))
    assert [finding.value for finding in found] == [
        "no RDMA port for rank 2 on n2",
        "mtu: RDMA MTU 4096: rank 0; RDMA MTU 1024: rank 1",
        "settings: none: rank 0, rank 1; UCX_IB_GID_INDEX=3: rank 2",
    ]


def test_a_pair_beside_its_ports_rate() -> None:
    quiet, busy = fabric_counters.heaps({}), fabric_counters.heaps({"port_xmit_packets": 5000})
    places = [place(0), place(1)]

    def judged(gbps: float, heaps: fabric_counters.Heaps) -> Finding:
        large = {"bytes": 4 << 20, "seconds": 8 * (4 << 20) / (gbps * 1e9)}
        hop = {"ranks": [0, 1], "latency_s": 4e-6, "sizes": {"large": large}}
        return fabric_pairs._judged("verbs", hop, places, [heaps, heaps])

    good = judged(90, busy)
    assert good.value == ("verbs: 4.0 us, 90 Gb/s at 4 MiB through mlx5_0:1 and mlx5_0:1, of 100 Gb/s nominal")
    assert (good.status, good.facts["nominal_gbps"]) == ("ok", 100.0)
    assert judged(10, busy).status == "warn"
    assert judged(90, quiet).value.endswith("between n0 and n1, not through the RDMA ports: no packet passed them")


def test_env_for_a_lossless_fabric(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_interface(node, "eth1", 9000)
    add_port(node, "mlx5_1", gids=roce_gids("10.9.0.7", "eth1"))  # slower: for storage
    write(node / "class/infiniband/mlx5_0/ports/1/hw_counters/tx_prio4_pause", 8)
    values = sourced(fabric_env.script(node))
    assert values == {
        "OMPI_MCA_pml": "ucx", "UCX_TLS": "rc,sm,self", "UCX_NET_DEVICES": "mlx5_0:1", "UCX_IB_GID_INDEX": "3",
        "UCX_IB_TRAFFIC_CLASS": str((4 * 8 + 2) * 4 + 2), "UCX_RC_VERBS_RETRY_COUNT": "4",
        "UCX_RC_MLX5_RETRY_COUNT": "4", "UCX_DC_MLX5_RETRY_COUNT": "4",
    }  # fmt: skip
    assert "Left out: mlx5_1:1 (100 Gb/s)." in fabric_env.script(node).replace("\n# ", " ")
    monkeypatch.setattr(rdma, "gpu_bus_id", lambda number: "0000:17:00.0")
    probe = device_probe.Probe(True, False, "cuda_copy, cuda_ipc", 2, "")
    monkeypatch.setattr(device_probe, "in_child", lambda: probe)
    assert sourced(fabric_env.script(node))["UCX_TLS"] == "rc,sm,self,cuda_copy,cuda_ipc"
    write(node / "class/infiniband/mlx5_0/tc/1/traffic_class", "Global tclass=160")
    assert sourced(fabric_env.script(node))["UCX_IB_TRAFFIC_CLASS"] == "160"


def test_env_for_soft_roce_and_ports_that_differ(tmp_path: Path) -> None:
    gids = [(LINK_LOCAL, "RoCE v2", "v0"), (mapped("10.77.0.1"), "RoCE v2", "v0")]
    add_port(tmp_path, "rxe0", gids=gids)
    add_port(tmp_path, "rxe1", gids=gids[1:])
    values = sourced(fabric_env.script(tmp_path))
    assert values == {
        "OMPI_MCA_pml": "ucx", "OMPI_MCA_pml_ucx_tls": "any", "OMPI_MCA_pml_ucx_devices": "any",
        "UCX_TLS": "rc_verbs,ud_verbs:aux,sm,self", "UCX_UD_VERBS_ETH_DGID_CHECK": "n",
        "UCX_RNDV_SCHEME": "put_zcopy", "UCX_NET_DEVICES": "rxe0:1,rxe1:1", "UCX_RC_VERBS_RETRY_COUNT": "6",
    }  # fmt: skip


def test_env_where_there_is_nothing(tmp_path: Path) -> None:
    assert sourced(fabric_env.script(tmp_path)) == {}
    add_port(tmp_path, "mlx5_0", state="1: DOWN")
    assert "mlx5_0:1 Ethernet DOWN" in fabric_env.script(tmp_path)
    assert sourced(fabric_env.script(tmp_path)) == {}


def sourced(script: str) -> dict[str, str]:
    """What the script exports, as bash sees it; shellcheck looks at it where there is one."""
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    assert max(map(len, script.splitlines())) <= 120
    command = ["bash", "-eu", "-c", f"{script}\nenv"]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True)
    pairs = dict(line.split("=", 1) for line in done.stdout.splitlines())
    return {name: value for name, value in pairs.items() if name.startswith(("UCX_", "OMPI_", "RWKVMPI_"))}


here_is_nothing = pytest.mark.skipif(
    bool(rdma.ports()) or bool(rdma.gpu_bus_id(0)), reason="this machine has RDMA or a GPU"
)


@here_is_nothing
def test_three_lines_where_there_is_nothing(rwkvmpi: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = rwkvmpi("doctor", "--fabric")
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", "RDMA"], ["ok", "GPU"], ["ok", "MPI"]]
    names = [finding["name"] for finding in json.loads(rwkvmpi("doctor", "--fabric", "--json").stdout)]
    assert names == ["RDMA", "GPU", "MPI"]
    assert sourced(rwkvmpi("doctor", "--emit", "env").stdout) == {}
    assert "leave --fix out" in rwkvmpi("doctor", "--fabric", "--fix", code=2).stderr


@pytest.mark.parallel
@here_is_nothing
def test_neighbours_are_timed(rwkvmpi: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = rwkvmpi("doctor", "--fabric", "--json", ranks=2)
    *_, pair = json.loads(done.stdout)
    assert (pair["name"], pair["status"]) == ("ranks 0-1", "ok")
    assert 0 < pair["facts"]["latency_s"] < 0.1
    assert pair["facts"]["bytes_per_second"] > 1e6


def test_the_library_that_a_run_would_load_is_found() -> None:
    if mpirun() is None:
        pytest.skip("needs an MPI library: the extra [mpi]")
    library = fabric_library.find()
    assert isinstance(library, Library), library
    assert Path(library.path).exists()
