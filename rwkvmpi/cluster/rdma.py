"""The RDMA ports of this machine as the kernel describes them below /sys: which there are, which one is a rank's.

Everything is read from files; no RDMA library is needed, and nothing is opened that a transport would use. `root` is
the folder in place of /sys.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rwkvmpi.errors import UserError

SYS = Path("/sys")
PORTS, GID_INDEX, TRAFFIC_CLASS = "RWKVMPI_RDMA_PORTS", "RWKVMPI_RDMA_GID_INDEX", "RWKVMPI_RDMA_TRAFFIC_CLASS"
# what counts where ours is not set, so that one line in env.sh serves Open MPI and this program
UCX_PORTS, UCX_GID_INDEX, UCX_TRAFFIC_CLASS = "UCX_NET_DEVICES", "UCX_IB_GID_INDEX", "UCX_IB_TRAFFIC_CLASS"
MTUS = (4096, 2048, 1024, 512, 256)
# what the kernel takes off an interface's MTU: IPv6 40, UDP 8, BTH 12, XRC 4, atomics 28, CRC 4
HEADERS_BYTES = 96


@dataclass(frozen=True)
class Gid:
    """One entry of a port's table of addresses."""

    index: int
    address: str  # 8 groups of 4 hexadecimal digits, as sysfs and verbs write it
    kind: str  # "RoCE v2", "RoCE v1", "IB"
    interface: str  # the network interface whose address it is; "" on InfiniBand

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The address as IP writes it; an IPv4 address where it is one in IPv6's clothes."""
        address = ipaddress.IPv6Address(self.address)
        return address.ipv4_mapped or address

    @property
    def routable(self) -> bool:
        """RoCE v2 with an address that may be used beyond one cable: neither link-local nor loopback."""
        return self.kind == "RoCE v2" and not self.ip.is_link_local and not self.ip.is_loopback

    def __str__(self) -> str:
        return f"{self.index}: {self.ip} {self.kind}"


@dataclass(frozen=True)
class Port:
    """One port of an RDMA device."""

    device: str
    number: int
    state: str  # "ACTIVE", "DOWN", "INIT", "ARMED"
    link_layer: str  # "Ethernet", "InfiniBand"
    rate_gbps: float
    active_mtu: int  # bytes; by the interface's MTU, since sysfs does not tell it; 0 unknown, as on InfiniBand
    interface: str  # the network interface of the port, "" unknown
    numa: int  # -1 unknown
    pci: str  # the path below /sys/devices, "" for software devices
    gids: tuple[Gid, ...]

    @property
    def name(self) -> str:
        """As UCX and others write it: mlx5_0:1."""
        return f"{self.device}:{self.number}"

    @property
    def active(self) -> bool:
        """Whether messages can pass."""
        return self.state == "ACTIVE"

    def best_gid(self) -> Gid | None:
        """The entry to talk from: RoCE v2 with an IPv4 address, else with a global IPv6 one; never link-local."""
        good = [gid for gid in self.gids if gid.routable]
        return min(good, key=lambda gid: (gid.ip.version, gid.index), default=None)


def ports(root: Path = SYS) -> list[Port]:
    """All ports of all RDMA devices, in the order of their names; [] on a machine without RDMA."""
    found = [_port(folder, root) for folder in (root / "class/infiniband").glob("*/ports/*") if folder.name.isdigit()]
    return sorted(found, key=lambda port: (*_natural(port.device), port.number))


def choose_port(found: list[Port], local_rank: int, gpu_pci: str = "", wanted: str = "", root: Path = SYS) -> Port:
    """The port for the rank that is number `local_rank` on its node; UserError names what there is.

    wanted  ports by name ("mlx5_0:1,mlx5_1:1"): one for all, or a list whose turn goes by the local rank.
    gpu_pci the rank's GPU, as a bus id (0000:1b:00.0) or as a path below /sys/devices.

    Without `wanted`: of the ports that are up (of these the ones with a RoCE v2 address, if any) the nearest to the
    GPU, by the switches that they share, then by NUMA node; of equals the fastest; of equals still, in turn.
    """
    if not found:
        raise UserError("this machine has no RDMA port; use --transport mpi, or load the driver (rdma link show)")
    if names := [name.strip() for name in wanted.split(",") if name.strip()]:
        return _named(found, names[local_rank % len(names)])
    up = [port for port in found if port.active]
    if not up:
        raise UserError(f"no RDMA port is up ({described(found)}); see ip link and rdma link, or use --transport mpi")
    up = [port for port in up if port.best_gid()] or up
    gpu = pci_path(gpu_pci, root)
    node = numa_of(gpu, root)
    distances = [(-shared_path(port.pci, gpu), node not in (-1, port.numa), -port.rate_gbps) for port in up]
    nearest = [port for port, distance in zip(up, distances, strict=True) if distance == min(distances)]
    return nearest[local_rank % len(nearest)]


def port_of_rank(
    local_rank: int, gpu_pci: str = "", root: Path = SYS, environ: Mapping[str, str] | None = None
) -> Port:
    """The port of this rank with what the environment says: RWKVMPI_RDMA_PORTS decides; UCX_NET_DEVICES is a set."""
    env = os.environ if environ is None else environ
    found, wanted = ports(root), env.get(PORTS, "").strip()
    if not wanted:
        # "all", "^mlx5_1:1" and interfaces of the kernel's network (eth0) say nothing about RDMA ports
        names = [name.strip() for name in env.get(UCX_PORTS, "").split(",")]
        if allowed := [name for name in names if re.fullmatch(r"[\w.-]+:\d+", name)]:
            there = [port for port in found if port.name in allowed]
            if found and not there:
                raise UserError(f"{UCX_PORTS}={','.join(allowed)}, but there are only {described(found)}; name one")
            found = there
    return choose_port(found, local_rank, gpu_pci, wanted, root)


def choose_gid(port: Port, wanted: int | None = None) -> Gid:
    """The port's GID of index `wanted`, else its best one; UserError names what the table holds."""
    chosen = port.best_gid() if wanted is None else next((gid for gid in port.gids if gid.index == wanted), None)
    if chosen is not None:
        return chosen
    held = ", ".join(map(str, port.gids)) or "nothing"
    if wanted is not None:
        raise UserError(f"{port.name} has no GID of index {wanted}; its table holds {held}; name one in {GID_INDEX}")
    interface = port.interface or "INTERFACE"
    remedy = f"give it one (ip addr add ADDRESS/24 dev {interface}), or set {GID_INDEX}"
    raise UserError(f"{port.name} has no GID of type RoCE v2 with a routable address, only {held}; {remedy}")


def wanted_gid_index(environ: Mapping[str, str] | None = None) -> int | None:
    """RWKVMPI_RDMA_GID_INDEX, else UCX_IB_GID_INDEX; None where neither says a number."""
    return _setting(GID_INDEX, UCX_GID_INDEX, environ)


def wanted_traffic_class(environ: Mapping[str, str] | None = None) -> int | None:
    """RWKVMPI_RDMA_TRAFFIC_CLASS, else UCX_IB_TRAFFIC_CLASS (DSCP * 4 + ECN bits); None where neither says a number."""
    return _setting(TRAFFIC_CLASS, UCX_TRAFFIC_CLASS, environ)


def counters(port: Port, root: Path = SYS) -> dict[str, int]:
    """What the driver counts for the port, by the driver's names: packets, errors, discards, PFC, ECN marks.

    mlx5 and others have both `counters` and `hw_counters`, Soft-RoCE only the latter.
    """
    device = root / "class/infiniband" / port.device
    here = device / "ports" / str(port.number)
    found = {}
    for folder in (device / "hw_counters", here / "counters", here / "hw_counters"):
        for path in sorted(folder.glob("*")):
            value = _word(path)
            if path.name != "lifespan" and value.isdigit():  # how long the kernel keeps what it read, in ms
                found[path.name] = int(value)
    return found


def described(found: list[Port]) -> str:
    """The ports and their states in a line."""
    return ", ".join(f"{port.name} {port.link_layer} {port.state}" for port in found)


def pci_path(bus_id: str, root: Path = SYS) -> str:
    """Where a PCI device lies below /sys/devices, by its bus id; a path stays as it is; "" where there is none.

    NVIDIA's tools write the domain with eight digits and letters in capitals.
    """
    if "/" in bus_id:
        return bus_id
    match = re.fullmatch(r"(?:([0-9a-f]*)([0-9a-f]{4}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f])", bus_id.strip().lower())
    if match is None or (match[1] or "").strip("0"):
        return ""
    return _below(root / "bus/pci/devices" / f"{match[2] or '0000'}:{match[3]}", root)


def numa_of(pci: str, root: Path = SYS) -> int:
    """The NUMA node of the PCI device at this path below /sys/devices; -1 unknown."""
    return _integer(_word(root / "devices" / pci / "numa_node"), -1) if pci else -1


def shared_path(one: str, other: str) -> int:
    """Steps from the root that two PCI devices have in common: 0 different roots, 2 and more a bridge or switch."""
    count = 0
    for mine, its in zip(one.split("/"), other.split("/"), strict=False):
        if not mine or mine != its:
            break
        count += 1
    return count


def gpu_bus_id(device: int) -> str:
    """The PCI bus id of the GPU that this process sees under this number; "" where the driver shows none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    handle, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device):
        return ""
    return "" if driver.cuDeviceGetPCIBusId(text, len(text), handle) else text.value.decode().lower()


def _port(folder: Path, root: Path) -> Port:
    device = folder.parent.parent
    layer = _word(folder / "link_layer")
    gids = tuple(_gids(folder, layer))
    interface = _interface(device, folder.name, gids)
    mtu = _integer(_word(root / "class/net" / interface / "mtu"), 0) if interface and layer == "Ethernet" else 0
    pci = _below(device / "device", root)
    return Port(
        device=device.name,
        number=int(folder.name),
        state=_word(folder / "state").split(":")[-1].strip(),
        link_layer=layer,
        rate_gbps=float((re.match(r"[\d.]+", _word(folder / "rate")) or ["0"])[0]),
        active_mtu=next((size for size in MTUS if size <= mtu - HEADERS_BYTES), 0),
        interface=interface,
        numa=numa_of(pci, root),
        pci=pci,
        gids=gids,
    )


def _gids(folder: Path, layer: str) -> Iterator[Gid]:
    """The entries in use. Reading one that is not gives zeros or EINVAL, by the kernel's age."""
    try:
        indices = sorted(int(name) for name in os.listdir(folder / "gids") if name.isdigit())
    except OSError:
        return
    for index in indices:
        address = _word(folder / "gids" / str(index))
        if not address.strip("0:"):
            continue
        kind = _word(folder / "gid_attrs/types" / str(index))  # "RoCE v2", or "IB/RoCE v1" for either
        if "v2" not in kind:
            kind = "IB" if layer == "InfiniBand" else "RoCE v1"
        yield Gid(index, address, kind, _word(folder / "gid_attrs/ndevs" / str(index)))


def _interface(device: Path, number: str, gids: tuple[Gid, ...]) -> str:
    """The network interface of a port: by its addresses, else by what lies on the same PCI device."""
    by_gid = next((gid.interface for gid in gids if gid.interface), "")
    if by_gid:
        return by_gid
    beside = sorted((device / "device/net").glob("*"))
    same = [path.name for path in beside if _integer(_word(path / "dev_port"), 0) == int(number) - 1]
    return same[0] if same else _word(device / "parent")  # Soft-RoCE names its interface there


def _named(found: list[Port], name: str) -> Port:
    for port in found:
        if port.name == name or (":" not in name and port.device == name):
            if not port.active:
                others = f"of {described(found)} name one that is up in {PORTS}"
                raise UserError(f"the RDMA port {name} is {port.state or '?'}; {others}, or see ip link and rdma link")
            return port
    raise UserError(f"there is no RDMA port {name} on this machine, only {described(found)}; name one in {PORTS}")


def _setting(ours: str, theirs: str, environ: Mapping[str, str] | None) -> int | None:
    env = os.environ if environ is None else environ
    text = env.get(ours, "").strip()
    if text:
        if not text.isascii() or not text.isdigit() or int(text) > 255:
            raise UserError(f"{ours}={text} is not a number from 0 to 255; unset it or give one")
        return int(text)
    text = env.get(theirs, "").strip()
    return int(text) if text.isascii() and text.isdigit() else None  # "auto"


def _below(link: Path, root: Path) -> str:
    """Where a link of sysfs leads, from root/devices on; "" where it is none or leads elsewhere."""
    try:
        path = link.resolve(strict=True).relative_to((root / "devices").resolve())
    except (OSError, ValueError):
        return ""
    return "" if path.parts[:1] == ("virtual",) else path.as_posix()


def _natural(name: str) -> tuple[str, int]:
    """mlx5_2 comes before mlx5_10."""
    stem = name.rstrip("0123456789")
    return stem, _integer(name[len(stem) :], -1)


def _integer(text: str, default: int) -> int:
    try:
        return int(text)
    except ValueError:
        return default


def _word(path: Path) -> str:
    """A file's text, with few calls of the kernel: a table of GIDs may have a thousand files."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(handle, 4096).decode("ascii", errors="replace").strip()
    except OSError:
        return ""
    finally:
        os.close(handle)
