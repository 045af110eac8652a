"""A tree of files as /sys has them for RDMA devices, written into a folder of the test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ZEROS = ":".join(["0000"] * 8)
LINK_LOCAL = "fe80:0000:0000:0000:0e42:a1ff:fe00:0001"


def mapped(address: str) -> str:
    """An IPv4 address as a GID: 10.77.0.1 -> 0000:...:ffff:0a4d:0001."""
    a, b, c, d = (int(part) for part in address.split("."))
    return ":".join(["0000"] * 5 + ["ffff", f"{a:02x}{b:02x}", f"{c:02x}{d:02x}"])


def roce_gids(address: str, interface: str) -> list[tuple[str, str, str]]:
    """What mlx5 shows for an interface with one IPv4 address: both versions of both addresses."""
    return [(gid, kind, interface) for gid in (LINK_LOCAL, mapped(address)) for kind in ("IB/RoCE v1", "RoCE v2")]


def write(path: Path, text: object) -> None:
    """A file with a line's end, as the kernel writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def add_interface(root: Path, name: str, mtu: int, counts: dict[str, int] | None = None) -> None:
    """A network interface."""
    write(root / "class/net" / name / "mtu", mtu)
    for key, value in (counts or {}).items():
        write(root / "class/net" / name / "statistics" / key, value)


def add_pci(root: Path, path: str, numa: int) -> Path:
    """A PCI device at a path below devices, with its link by bus id."""
    folder = root / "devices" / path
    write(folder / "numa_node", numa)
    link = root / "bus/pci/devices" / folder.name
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(folder)
    return folder


def add_port(
    root: Path,
    device: str,
    *,
    number: int = 1,
    state: str = "4: ACTIVE",
    layer: str = "Ethernet",
    rate: str = "100 Gb/sec (4X EDR)",
    gids: Sequence[tuple[str, str, str]] = (),
    pci: str = "",
    numa: int = -1,
    counters: dict[str, int] | None = None,
    hw_counters: dict[str, int] | None = None,
    free_gids: int = 4,
) -> Path:
    """One port of a device; `gids` are (address, type, interface), and entries not in use follow them."""
    folder = root / "class/infiniband" / device
    folder.mkdir(parents=True, exist_ok=True)
    if pci:
        target = add_pci(root, pci, numa)
        if not (folder / "device").is_symlink():
            (folder / "device").symlink_to(target)
    here = folder / "ports" / str(number)
    for name, text in (("state", state), ("link_layer", layer), ("rate", rate), ("phys_state", "5: LinkUp")):
        write(here / name, text)
    for index, (address, kind, interface) in enumerate(gids):
        write(here / "gids" / str(index), address)
        write(here / "gid_attrs/types" / str(index), kind)
        if interface:
            write(here / "gid_attrs/ndevs" / str(index), interface)
    for index in range(len(gids), len(gids) + free_gids):
        write(here / "gids" / str(index), ZEROS)
        # reading the others of an entry not in use is an error: a folder cannot be read either
        (here / "gid_attrs/types" / str(index)).mkdir(parents=True)
        (here / "gid_attrs/ndevs" / str(index)).mkdir(parents=True)
    for kind, counts in (("counters", counters), ("hw_counters", hw_counters)):
        for key, value in (counts or {}).items():
            write(here / kind / key, value)
    return here
