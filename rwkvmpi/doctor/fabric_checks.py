"""The doctor's checks of the fabric on one machine: RDMA ports, the way to them, GPUs beside them, MPI on top of them.

Between ranks see fabric_pairs.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from rwkvmpi.cluster import rdma
from rwkvmpi.cluster.rdma import SYS, Port
from rwkvmpi.doctor import fabric_counters, fabric_library
from rwkvmpi.doctor.diagnosis import Check, Finding
from rwkvmpi.doctor.fabric_library import Library
from rwkvmpi.errors import UserError

DEVICES = Path("/dev/infiniband")
DRIVER = Path("/proc/driver/nvidia/version")
CONNECTX, NETWORK = "0x15b3", "0x02"  # the maker of the commonest RDMA devices, and the class of network devices
GOOD_MTU = 4096
SLOW_GBPS = 25  # below it the MTU does not matter
DMABUF_KERNEL = (5, 12)
ENDLESS_RETRY = 7


def in_short(root: Path = SYS) -> Iterator[Finding]:
    """One line for the report on the whole machine."""
    found = rdma.ports(root)
    more = "rwkvmpi doctor --fabric says more"
    if not found:
        yield Finding("rdma", "ok", "no device; ranks on several nodes talk over TCP")
    elif not any(port.active for port in found):
        yield Finding("rdma", "warn", f"no port is up: {rdma.described(found)}", more)
    else:
        yield Finding("rdma", "ok", f"{rdma.described(found)}; {more}")


def nothing_here(root: Path = SYS) -> bool:
    """Neither RDMA nor a GPU: then there is nothing to set up, and three lines say so."""
    return not rdma.ports(root) and not _unused_device(root) and not rdma.gpu_bus_id(0)


def of_a_bare_machine() -> Iterator[Finding]:
    """The three lines."""
    yield Finding("RDMA", "ok", "no device on this machine: ranks on several nodes talk over TCP")
    yield Finding("GPU", "ok", "none on this machine: messages come from and go to the host's memory")
    library = fabric_library.find()
    if isinstance(library, str):
        yield Finding("MPI", "ok", f"{library}: one process only; nothing to set for a fabric")
    else:
        yield Finding("MPI", "ok", f"{_described(library)}; nothing to set for a fabric")


def checks(root: Path = SYS, devices: Path = DEVICES) -> list[tuple[str, Check]]:
    """Everything about this machine that needs no other rank, each with the name it reports under if it falls over."""
    found = rdma.ports(root)
    parts: list[tuple[str, Check]] = [("RDMA", lambda: ports(found, root))]
    if found:
        parts += [
            ("device files", lambda: access(found, root, devices)),
            ("locked memory", locked_memory),
            ("pyverbs", pyverbs),
            ("rank 0 takes", lambda: choice(root)),
        ]
    parts += [("MPI", lambda: mpi(found)), ("GPU", lambda: gpus(found, root))]
    return [*parts, ("CUDA-aware MPI", cuda_aware)] if rdma.gpu_bus_id(0) else parts


def ports(found: list[Port], root: Path = SYS) -> Iterator[Finding]:
    """Every port: state, link, MTU, the GID to use, and what its counters tell."""
    if not found:
        if unused := _unused_device(root):
            value = f"no RDMA device, but a ConnectX at {unused}: its driver for RDMA is not loaded"
            yield Finding("RDMA", "warn", value, "as root: modprobe mlx5_ib; else install rdma-core")
        else:
            yield Finding("RDMA", "ok", "no device on this machine: ranks on several nodes talk over TCP")
    for port in found:
        yield _link(port, root)
        if port.active:
            yield _gid(port)
            yield from _counts(port, root)


def access(found: list[Port], root: Path = SYS, devices: Path = DEVICES) -> Iterator[Finding]:
    """The files through which a program reaches the devices, and whether this user may."""
    ours = {port.device for port in found}
    files = {
        folder.name: (folder / "ibdev").read_text(encoding="ascii", errors="replace").strip()
        for folder in sorted((root / "class/infiniband_verbs").glob("uverbs*"))
    }
    wanted = [devices / name for name, device in files.items() if device in ours]
    missing = [path for path in wanted if not path.exists()]
    closed = [path for path in wanted if path.exists() and not os.access(path, os.R_OK | os.W_OK)]
    if not wanted:
        value = "the kernel gives programs no way to the devices (no uverbs)"
        yield Finding("device files", "warn", value, "as root: modprobe ib_uverbs rdma_ucm")
    elif missing:
        value = f"missing: {', '.join(map(str, missing))}"
        remedy = f"in a container: docker run --device={devices} --cap-add=IPC_LOCK --ulimit memlock=-1"
        yield Finding("device files", "warn", value, remedy)
    elif closed:
        value = f"not for this user: {', '.join(map(str, closed))}"
        remedy = f"as root: chmod 666 {' '.join(map(str, closed))}; for good by a udev rule (rdma-core has one)"
        yield Finding("device files", "warn", value, remedy)
    else:
        manager = devices / "rdma_cm"
        extra = "rdma_cm too" if os.access(manager, os.R_OK | os.W_OK) else "not rdma_cm, which is not needed"
        yield Finding("device files", "ok", f"{', '.join(map(str, wanted))} may be opened, {extra}")


def locked_memory() -> Iterator[Finding]:
    """RDMA locks what it sends from; a small limit ends a job where it registers its buffers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        yield Finding("locked memory", "ok", "as much as there is")
        return
    value = f"{soft / 2**20:,.0f} MiB at most"
    if os.geteuid() == 0:
        yield Finding("locked memory", "ok", f"{value} for users; root has no limit")
    elif hard == resource.RLIM_INFINITY:
        yield Finding("locked memory", "warn", value, "ulimit -l unlimited (allowed here; env.sh of jobs/ does it)")
    else:
        remedy = (
            "the administrator: memlock unlimited in /etc/security/limits.conf; under Slurm LimitMEMLOCK=infinity "
            "for slurmd and PropagateResourceLimitsExcept=MEMLOCK; in a container --ulimit memlock=-1"
        )
        yield Finding("locked memory", "warn", f"{value}, and no more is allowed", remedy)


def pyverbs() -> Iterator[Finding]:
    """Whether the verbs transport finds what it needs."""
    from rwkvmpi.grid.verbs import door

    if why := door.reason():
        value, _, remedy = why.partition("; ")
        yield Finding("pyverbs", "warn", f"--transport verbs cannot be used: {value}", remedy)
    else:
        yield Finding(
            "pyverbs", "ok", f"in {Path(door.pyverbs().device.__file__).parent}: --transport verbs can be used"
        )


def choice(root: Path = SYS) -> Iterator[Finding]:
    """The port and the GID that this machine's first rank would take, by what is set and what is there."""
    try:
        port = rdma.port_of_rank(0, rdma.gpu_bus_id(0), root)
    except UserError as error:
        asked_for = os.environ.get(rdma.PORTS) or os.environ.get(rdma.UCX_PORTS)
        yield Finding("rank 0 takes", "fail" if asked_for else "warn", f"nothing: {error}")
        return
    if port.link_layer == "InfiniBand":
        yield Finding("rank 0 takes", "ok", f"{port.name}, InfiniBand: MPI uses it, --transport verbs wants RoCE v2")
        return
    gid = rdma.choose_gid(port, rdma.wanted_gid_index())
    kind = rdma.wanted_traffic_class()
    value = f"{port.name}, GID index {gid.index} ({gid.ip}), traffic class {'not set' if kind is None else kind}"
    if gid.routable:
        yield Finding("rank 0 takes", "ok", value)
    else:
        best = port.best_gid()
        remedy = f"unset {rdma.GID_INDEX} {rdma.UCX_GID_INDEX}" + (f", or set {best.index}" if best else "")
        yield Finding("rank 0 takes", "warn", f"{value}: {gid.kind} and not routable", remedy)


def gpus(found: list[Port], root: Path = SYS) -> Iterator[Finding]:
    """GPUs, the port next to each, and whether the NIC can reach into their memory."""
    number = 0
    while bus := rdma.gpu_bus_id(number):
        if any(port.active for port in found):
            port = rdma.choose_port(found, number, bus, root=root)
            how, near = distance(port, bus, root)
            remedy = (
                "" if near else "a GPU and a NIC of one socket are faster: see nvidia-smi topo -m, and bind ranks so"
            )
            yield Finding(f"GPU {number}", "ok" if near else "warn", f"{bus}: {port.name}, {how}", remedy)
        else:
            yield Finding(f"GPU {number}", "ok", f"{bus}: no RDMA port beside it")
        number += 1
    if number and found:
        yield gpu_direct(root)


def distance(port: Port, gpu_bus_id: str, root: Path = SYS) -> tuple[str, bool]:
    """How a port lies to a GPU, in words, and whether that is near."""
    gpu = rdma.pci_path(gpu_bus_id, root)
    if not gpu or not port.pci:
        return "how far is not known", True
    if rdma.shared_path(port.pci, gpu) > 1:
        return "behind the same PCIe switch", True
    if rdma.shared_path(port.pci, gpu) == 1:
        return "at the same PCIe root", True
    node, other = rdma.numa_of(gpu, root), port.numa
    if -1 in (node, other):
        return "at another PCIe root", True
    return ("at another PCIe root of the same NUMA node", True) if node == other else (
        f"on NUMA node {other}, the GPU on {node}", False
    )  # fmt: skip


def gpu_direct(root: Path = SYS, driver: Path = DRIVER) -> Finding:
    """Whether a NIC may read and write GPU memory itself: a module for peer memory, or dma-buf."""
    module = next((name for name in ("nvidia_peermem", "nv_peer_mem") if (root / "module" / name).is_dir()), "")
    kernel = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    try:
        is_open = "Open Kernel Module" in driver.read_text(encoding="utf-8", errors="replace")
    except OSError:
        is_open = False
    dmabuf = is_open and kernel >= DMABUF_KERNEL
    ways = [f"peer memory by {module}"] * bool(module) + ["dma-buf (open driver)"] * dmabuf
    if ways:
        return Finding("GPUDirect", "ok", " and ".join(ways))
    why = (
        "the driver is not the open one"
        if not is_open
        else f"dma-buf needs kernel {DMABUF_KERNEL[0]}.{DMABUF_KERNEL[1]}"
    )
    remedy = "as root: modprobe nvidia_peermem; until then messages pass through the host's memory"
    return Finding("GPUDirect", "warn", f"no module for peer memory, and {why}", remedy)


def mpi(found: list[Port]) -> Iterator[Finding]:
    """The MPI library: by which way it would send, what it says of CUDA, and the settings that it obeys."""
    library = fabric_library.find()
    if isinstance(library, str):
        yield Finding(
            "MPI", "warn", f"{library}: one process only", "load the site's module, or pip install 'rwkvmpi[mpi]'"
        )
        return
    usable = any(port.active for port in found)
    env = fabric_library.settings()
    value = f"{_described(library)}, from {Path(library.ucx_path or library.path).parent}"
    if usable and library.is_open_mpi and library.pml not in ("ucx", "cm"):
        remedy = "export OMPI_MCA_pml=ucx (rwkvmpi doctor --emit env has the lines), or --transport verbs"
        if not library.ucx:
            remedy = "load an Open MPI with UCX, or --transport verbs"
        yield Finding("MPI", "warn", f"{value}: it does not use the RDMA ports", remedy)
    else:
        yield Finding("MPI", "ok", value)
    if usable and library.ucx:
        yield _retries(library, found, env)
    shown = ", ".join(f"{name}={value}" for name, value in env.items())
    yield Finding(
        "settings", "ok", shown or "none of UCX_, OMPI_MCA_, RWKVMPI_RDMA_: the libraries decide by themselves"
    )


def cuda_aware() -> Iterator[Finding]:
    """Whether MPI takes a GPU's memory: its own word, and what a trial in a child of two ranks saw."""
    from rwkvmpi.cluster import device_probe

    tried = device_probe.in_child()
    word = {True: "says yes", False: "says no", None: "says nothing"}[tried.library_says]
    value = f"MPI's own word: {word}; UCX for CUDA: {tried.transports or 'none loaded'}; trial: "
    if tried.works:
        alone = "" if tried.ranks > 1 else " (to itself, without mpirun)"
        yield Finding("CUDA-aware MPI", "ok", f"{value}a GPU's memory was sent and came right{alone}")
    else:
        yield Finding(
            "CUDA-aware MPI", "ok", f"{value}{tried.reason}; so messages pass through page-locked host memory"
        )


def _described(library: Library) -> str:
    pml = f", sends by {library.pml}" if library.pml else ""
    return f"{library.name}{pml}, {f'UCX {library.ucx}' if library.ucx else 'no UCX'}"


def _retries(library: Library, found: list[Port], env: dict[str, str]) -> Finding:
    """UCX tries for ever by default, so that a dead link hangs a job where only MPI knows of it."""
    names = ["UCX_RC_MLX5_RETRY_COUNT"] if any(port.device.startswith("mlx5") for port in found) else []
    names.append("UCX_RC_VERBS_RETRY_COUNT")
    endless = [name for name in names if not env.get(name, "").isdigit() or int(env[name]) >= ENDLESS_RETRY]
    if not endless:
        return Finding("UCX retries", "ok", ", ".join(f"{name}={env[name]}" for name in names))
    remedy = f"export {' '.join(f'{name}=4' for name in endless)}"
    return Finding("UCX retries", "warn", "without end (7): MPI waits for ever on a dead link", remedy)


def _link(port: Port, root: Path) -> Finding:
    where = f", NUMA node {port.numa}" if port.numa >= 0 else ""
    name = f"port {port.name}"
    if not port.active:
        value = f"{port.link_layer} {port.state}{f', interface {port.interface}' if port.interface else ''}{where}"
        up = f"ip link set {port.interface} up; then " if port.interface else ""
        return Finding(name, "warn", value, f"{up}see the cable and rdma link show")
    value = f"up, {port.link_layer} {port.rate_gbps:g} Gb/s"
    if port.link_layer == "Ethernet":
        mtu = _interface_mtu(port, root)
        value += f", RoCE, {port.interface or 'interface not known'} with MTU {mtu} (RDMA {port.active_mtu})"
    value += where if port.pci else ", Soft-RoCE or alike, no hardware"
    gbps, said = _pcie(port, root)
    value += f", {said}" if said else ""
    if port.pci and 0 < gbps < port.rate_gbps:
        remedy = "see the slot and the BIOS: lspci -vv shows LnkCap and LnkSta"
        return Finding(name, "warn", f"{value}: slower than the port", remedy)
    if 0 < port.active_mtu < GOOD_MTU and port.rate_gbps >= SLOW_GBPS:
        remedy = f"ip link set {port.interface} mtu 9000, at all nodes and switches alike, if the fabric can"
        return Finding(name, "warn", f"{value}: a larger MTU is faster", remedy)
    return Finding(name, "ok", value)


def _gid(port: Port) -> Finding:
    name = f"GIDs {port.name}"
    table = ", ".join(map(str, port.gids)) or "none"
    if port.link_layer == "InfiniBand":
        return Finding(name, "ok", f"{table}; InfiniBand, not RoCE: --transport verbs does not use it")
    best = port.best_gid()
    if best is not None:
        return Finding(name, "ok", f"use index {best.index} ({best.ip}, {best.kind}); the table: {table}")
    versions = {gid.kind for gid in port.gids}
    value = f"none of RoCE v2 with a routable address; the table: {table}"
    if versions == {"RoCE v1"}:
        remedy = f"as root: cma_roce_mode -d {port.device} -p {port.number} -m 2, or a driver that does RoCE v2"
    else:
        remedy = f"as root: ip addr add ADDRESS/24 dev {port.interface or 'INTERFACE'}"
    return Finding(name, "warn", value, remedy)


def _counts(port: Port, root: Path) -> Iterator[Finding]:
    """Lost packets and bad frames are findings; pauses and marks only tell how the fabric keeps order."""
    counted = fabric_counters.heaps(fabric_counters.read(port, root))
    name = f"counts {port.name}"
    said = [f"{counted.packets:,} packets"]
    if counted.pauses:
        said.append(f"PFC at work: {fabric_counters.listed(counted.pauses)}")
    if counted.congestion:
        said.append(f"ECN at work: {fabric_counters.listed(counted.congestion)}")
    if not counted.worth_a_warning:
        yield Finding(name, "ok", "; ".join(said))
        return
    if counted.bad_frames:
        value = f"bad frames: {fabric_counters.listed(counted.bad_frames)}; {'; '.join(said)}"
        remedy = f"a cable or transceiver: ethtool -S {port.interface or 'INTERFACE'}, mlxlink -d {port.device} -c"
        yield Finding(name, "warn", value, remedy)
    if counted.lost:
        value = f"lost or sent again: {fabric_counters.listed(counted.lost)}; {'; '.join(said)}"
        remedy = (
            "if it grows: is PFC on at both ends and in the switches, and is the traffic class the one it is on for "
            f"(mlnx_qos -i {port.interface or 'INTERFACE'}); on a lossy fabric, is ECN on"
        )
        yield Finding(name, "warn", value, remedy)


def _interface_mtu(port: Port, root: Path) -> str:
    try:
        return (root / "class/net" / port.interface / "mtu").read_text(encoding="ascii").strip()
    except OSError:
        return "?"


def _pcie(port: Port, root: Path) -> tuple[float, str]:
    """(Gb/s that the slot carries now, in words), (0, "") where nobody says."""
    words = []
    for name in ("current_link_speed", "current_link_width"):
        try:
            words.append((root / "devices" / port.pci / name).read_text(encoding="ascii", errors="replace"))
        except OSError:
            return 0.0, ""
    numbers = [re.match(r"[\d.]+", word) for word in words]
    if not port.pci or numbers[0] is None or numbers[1] is None:
        return 0.0, ""
    speed, width = float(numbers[0][0]), int(float(numbers[1][0]))
    # two of ten bits keep the clock up to 5 GT/s, two of 130 above; a tenth goes to the packets' headers
    return speed * width * (0.8 if speed <= 5 else 128 / 130) * 0.9, f"PCIe {speed:g} GT/s x{width}"


def _unused_device(root: Path) -> str:
    """The bus id of an RDMA-capable network device whose RDMA driver is not there; "" if there is none."""
    for folder in sorted((root / "bus/pci/devices").glob("*")):
        try:
            maker, kind = ((folder / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if maker == CONNECTX and kind.startswith(NETWORK):
            return folder.name
    return ""
