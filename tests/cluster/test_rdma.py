"""RDMA ports as /sys shows them, on trees of every kind of device, and which port becomes a rank's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sysfs_tree import LINK_LOCAL, add_interface, add_pci, add_port, mapped, roce_gids, write

from rwkvmpi.cluster import rdma
from rwkvmpi.errors import UserError

ROOT_A, ROOT_B = "pci0000:15/0000:15:01.0", "pci0000:97/0000:97:01.0"
GPU_A, GPU_B = f"{ROOT_A}/0000:16:00.0/0000:17:00.0/0000:18:00.0", f"{ROOT_B}/0000:98:00.0/0000:99:00.0/0000:9a:00.0"


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """Two GPUs, each behind a switch with an mlx5 device, a third device for storage, and one whose link is down."""
    for number, (root, numa) in enumerate(((ROOT_A, 0), (ROOT_B, 1))):
        bus = "16" if number == 0 else "98"
        add_interface(tmp_path, f"eth{number}", 9000)
        add_port(
            tmp_path, f"mlx5_{number}", rate="400 Gb/sec (4X NDR)", gids=roce_gids(f"10.1.{number}.7", f"eth{number}"),
            pci=f"{root}/0000:{bus}:00.0/0000:{bus}:01.0", numa=numa,
            counters={"port_rcv_errors": 3, "port_xmit_packets": 500}, hw_counters={"np_ecn_marked_roce_packets": 9},
        )  # fmt: skip
    add_interface(tmp_path, "eth10", 1500)
    add_port(tmp_path, "mlx5_10", gids=roce_gids("10.9.0.7", "eth10"), pci="pci0000:30/0000:30:01.0", numa=0)
    add_port(tmp_path, "mlx5_2", state="1: DOWN", rate="40 Gb/sec (4X QDR)", pci="pci0000:31/0000:31:01.0", numa=0)
    add_pci(tmp_path, GPU_A, 0)
    add_pci(tmp_path, GPU_B, 1)
    return tmp_path


def test_ports_as_mlx5_shows_them(node: Path) -> None:
    found = rdma.ports(node)
    assert [port.name for port in found] == ["mlx5_0:1", "mlx5_1:1", "mlx5_2:1", "mlx5_10:1"]
    first = found[0]
    assert (first.state, first.link_layer, first.rate_gbps) == ("ACTIVE", "Ethernet", 400.0)
    assert (first.interface, first.active_mtu, first.numa) == ("eth0", 4096, 0)
    assert first.pci == f"{ROOT_A}/0000:16:00.0/0000:16:01.0"
    assert [str(gid) for gid in first.gids] == [
        "0: fe80::e42:a1ff:fe00:1 RoCE v1", "1: fe80::e42:a1ff:fe00:1 RoCE v2",
        "2: 10.1.0.7 RoCE v1", "3: 10.1.0.7 RoCE v2",
    ]  # fmt: skip
    best = first.best_gid()
    assert best is not None
    assert (best.index, best.address, best.interface) == (3, mapped("10.1.0.7"), "eth0")
    assert rdma.counters(first, node) == {
        "port_rcv_errors": 3, "port_xmit_packets": 500, "np_ecn_marked_roce_packets": 9,
    }  # fmt: skip
    assert found[3].active_mtu == 1024  # of an interface with 1500
    down = found[2]
    assert (down.active, down.gids, down.best_gid(), down.active_mtu) == (False, (), None, 0)


def test_a_machine_without_rdma(tmp_path: Path) -> None:
    assert rdma.ports(tmp_path) == []
    (tmp_path / "class/infiniband").mkdir(parents=True)
    assert rdma.ports(tmp_path) == []
    with pytest.raises(UserError, match="no RDMA port; use --transport mpi"):
        rdma.choose_port([], 0)


def test_infiniband_and_two_ports_of_a_device(tmp_path: Path) -> None:
    """mlx4: one PCI device with an InfiniBand port and an Ethernet port, which has no address yet."""
    where = "pci0000:00/0000:00:03.0/0000:04:00.0"
    ib = [("fe80:0000:0000:0000:0002:c903:00a0:0001", "IB/RoCE v1", "")]
    add_port(tmp_path, "mlx4_0", layer="InfiniBand", rate="56 Gb/sec (4X FDR)", gids=ib, pci=where, numa=0)
    add_port(tmp_path, "mlx4_0", number=2, rate="40 Gb/sec (4X QDR)", pci=where, numa=0)
    for name, number in (("ib0", 0), ("eth7", 1)):
        write(tmp_path / "devices" / where / "net" / name / "dev_port", number)
    add_interface(tmp_path, "eth7", 4200)
    one, two = rdma.ports(tmp_path)
    assert (one.name, one.interface, one.active_mtu, one.gids[0].kind, one.best_gid()) == (
        "mlx4_0:1", "ib0", 0, "IB", None
    )  # fmt: skip
    assert (two.name, two.interface, two.active_mtu) == ("mlx4_0:2", "eth7", 4096)
    with pytest.raises(UserError, match=r"mlx4_0:2 has no GID.*only nothing; .*dev eth7\), or set RWKVMPI_RDMA_GID_IN"):
        rdma.choose_gid(two)


def test_soft_roce(tmp_path: Path) -> None:
    """rxe has no PCI device; its port shows its interface even while that has no address."""
    add_interface(tmp_path, "v0", 4200)
    gids = [(LINK_LOCAL, "RoCE v2", "v0"), (mapped("10.77.0.1"), "RoCE v2", "v0")]
    add_port(tmp_path, "rxe0", rate="10 Gb/sec (1X FDR10)", gids=gids, hw_counters={"sent_pkts": 5, "lifespan": 10})
    add_port(tmp_path, "rxe1", rate="2.5 Gb/sec (1X SDR)", state="1: DOWN")
    write(tmp_path / "class/infiniband/rxe1/parent", "v1")
    one, two = rdma.ports(tmp_path)
    assert (one.pci, one.numa, one.interface, one.rate_gbps, one.active_mtu) == ("", -1, "v0", 10.0, 4096)
    assert (two.interface, two.rate_gbps, two.active_mtu) == ("v1", 2.5, 0)
    assert rdma.counters(one, tmp_path) == {"sent_pkts": 5}
    assert rdma.choose_gid(one).index == 1
    assert rdma.choose_gid(one, 0).address == LINK_LOCAL
    with pytest.raises(UserError, match=r"rxe0:1 has no GID of index 7; its table holds 0: fe80.*, 1: 10.77.0.1 RoCE"):
        rdma.choose_gid(one, 7)


def test_the_best_gid_is_never_link_local(tmp_path: Path) -> None:
    ipv6 = "2001:0db8:0000:0000:0000:0000:0000:0007"
    entries = [(LINK_LOCAL, "RoCE v2", "e"), (mapped("169.254.3.1"), "RoCE v2", "e"), (ipv6, "IB/RoCE v1", "e")]
    add_port(tmp_path, "a", gids=entries)
    add_port(tmp_path, "b", gids=[*entries, (ipv6, "RoCE v2", "e")])
    add_port(tmp_path, "c", gids=[*entries, (ipv6, "RoCE v2", "e"), (mapped("10.0.0.1"), "RoCE v2", "e")])
    best = [port.best_gid() for port in rdma.ports(tmp_path)]
    assert [gid and gid.index for gid in best] == [None, 3, 4]


def test_the_port_next_to_the_gpu(node: Path) -> None:
    found = rdma.ports(node)

    def chosen(rank: int, gpu: str, wanted: str = "") -> str:
        return rdma.choose_port(found, rank, gpu, wanted, node).name

    assert [chosen(rank, gpu) for rank in (0, 1) for gpu in (GPU_A, GPU_B)] == ["mlx5_0:1", "mlx5_1:1"] * 2
    assert chosen(0, "00000000:9A:00.0") == "mlx5_1:1"  # as NVIDIA's tools write it
    assert [chosen(rank, "") for rank in range(3)] == ["mlx5_0:1", "mlx5_1:1", "mlx5_0:1"]  # the fast ones, in turn
    add_pci(node, "pci0000:c0/0000:c0:01.0", 1)  # a GPU under a root of its own: the NUMA node decides
    assert chosen(0, "0000:c0:01.0") == "mlx5_1:1"
    assert [chosen(rank, GPU_A, "mlx5_10:1,mlx5_1") for rank in range(3)] == ["mlx5_10:1", "mlx5_1:1", "mlx5_10:1"]
    with pytest.raises(UserError, match="no RDMA port mlx5_7:1 on this machine, only mlx5_0:1 Ethernet ACTIVE, "):
        chosen(0, "", "mlx5_7:1")
    with pytest.raises(UserError, match="the RDMA port mlx5_2:1 is DOWN"):
        chosen(0, "", "mlx5_2:1")
    with pytest.raises(UserError, match=r"no RDMA port is up \(mlx5_2:1 Ethernet DOWN\)"):
        rdma.choose_port(found[2:3], 0)


def test_the_environment_decides(node: Path) -> None:
    def chosen(rank: int, **environ: str) -> str:
        return rdma.port_of_rank(rank, GPU_A, node, environ).name

    assert chosen(0) == "mlx5_0:1"
    assert chosen(0, UCX_NET_DEVICES="all") == "mlx5_0:1"
    assert chosen(0, UCX_NET_DEVICES="mlx5_10:1,mlx5_1:1,eth3") == "mlx5_10:1"  # of the two, on the GPU's NUMA node
    assert chosen(1, RWKVMPI_RDMA_PORTS="mlx5_10:1,mlx5_1:1", UCX_NET_DEVICES="mlx5_0:1") == "mlx5_1:1"
    with pytest.raises(UserError, match="UCX_NET_DEVICES=mlx5_8:1, but there are only mlx5_0:1"):
        chosen(0, UCX_NET_DEVICES="mlx5_8:1")
    assert rdma.wanted_gid_index({}) is None
    assert rdma.wanted_gid_index({"UCX_IB_GID_INDEX": "auto"}) is None
    assert rdma.wanted_gid_index({"UCX_IB_GID_INDEX": "3"}) == 3
    assert rdma.wanted_gid_index({"UCX_IB_GID_INDEX": "3", "RWKVMPI_RDMA_GID_INDEX": "1"}) == 1
    assert rdma.wanted_traffic_class({"UCX_IB_TRAFFIC_CLASS": "106"}) == 106
    with pytest.raises(UserError, match="RWKVMPI_RDMA_TRAFFIC_CLASS=high is not a number from 0 to 255"):
        rdma.wanted_traffic_class({"RWKVMPI_RDMA_TRAFFIC_CLASS": "high"})


ports = st.builds(
    lambda number, up, numa, rate, branch: rdma.Port(
        f"mlx5_{number}", 1, "ACTIVE" if up else "DOWN", "Ethernet", rate, 1024, "", numa, f"{branch}/{number}", ()
    ),
    st.integers(0, 20), st.booleans(), st.integers(-1, 1), st.sampled_from([100.0, 400.0]),
    st.sampled_from([ROOT_A, ROOT_B, "pci0000:00"]),
)  # fmt: skip


@given(
    st.lists(ports, min_size=1, max_size=8, unique_by=lambda port: port.name),
    st.sampled_from([GPU_A, GPU_B, "", "nonsense"]),
)
def test_whatever_there_is_the_choice_is_up_and_none_is_nearer(found: list[rdma.Port], gpu: str) -> None:
    up = [port for port in found if port.active]
    if not up:
        with pytest.raises(UserError):
            rdma.choose_port(found, 0, gpu)
        return
    chosen = [rdma.choose_port(found, rank, gpu) for rank in range(len(up))]
    for port in chosen:
        assert port in up
        assert rdma.shared_path(port.pci, gpu) == max(rdma.shared_path(other.pci, gpu) for other in up)
    turns = Counter(chosen).values()
    assert max(turns) - min(turns) <= 1  # ranks of one node spread over all that are as good


@given(st.ip_addresses(v=4))
def test_every_ipv4_address_survives_the_table(address: object) -> None:
    gid = rdma.Gid(0, mapped(str(address)), "RoCE v2", "e")
    assert gid.ip == address
