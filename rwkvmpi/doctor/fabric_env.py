"""env.sh for jobs/: the fabric's settings for Open MPI, UCX and the verbs transport, with values found on this node."""

from __future__ import annotations

import platform
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rwkvmpi.cluster import device_probe, rdma
from rwkvmpi.cluster.rdma import SYS, Port
from rwkvmpi.doctor import fabric_counters

WIDTH = 118
RETRIES_LOSSLESS, RETRIES_LOSSY = 4, 6
ECN_CAPABLE = 2  # the low two bits of a traffic class: without them switches drop instead of marking

LOCKED_MEMORY = """
ulimit -S -l "$(ulimit -H -l)"
if [ "$(ulimit -l)" != unlimited ]; then
    echo "warning: only $(ulimit -l) KiB may be locked on $(hostname); RDMA may fail to start" >&2
fi
"""


class Fabric(NamedTuple):
    """What env.sh depends on."""

    node: str
    ports: list[Port]  # those to use
    others: list[Port]
    pfc: list[int] | None  # priorities with PFC; None: nobody can tell
    pfc_by: str  # who says so
    site_class: int | None  # the traffic class that the driver sets by itself
    cuda: list[str]  # UCX's transports for a GPU's memory, if sending it was seen to work


def look(root: Path = SYS) -> Fabric:
    """This node: of the ports that are up with a RoCE v2 address the fastest ones."""
    found = rdma.ports(root)
    good = [port for port in found if port.active and port.best_gid()]
    fastest = max((port.rate_gbps for port in good), default=0.0)
    chosen = [port for port in good if port.rate_gbps == fastest]
    pfc, pfc_by = _pfc(chosen, root)
    return Fabric(
        node=platform.node(),
        ports=chosen,
        others=[port for port in found if port not in chosen],
        pfc=pfc,
        pfc_by=pfc_by,
        site_class=next((kind for port in chosen if (kind := _site_class(port, root)) is not None), None),
        cuda=_cuda_transports() if chosen else [],
    )


def script(root: Path = SYS) -> str:
    """The text of env.sh, for bash; it can be sourced on any node like this one."""
    fabric = look(root)
    if not fabric.ports:
        return "\n".join(["# shellcheck shell=bash", *_nothing(fabric), ""])
    parts = [_head(fabric), _mpi(fabric), _ports(fabric), _gids(fabric), _traffic_class(fabric)]
    parts += [_retries(fabric), _verbs(), _memory()]
    return "\n".join(["# shellcheck shell=bash", *("\n".join(part) + "\n" for part in parts)])


def _nothing(fabric: Fabric) -> Iterator[str]:
    if fabric.others:
        yield from _said(
            f"Made on {fabric.node} by `rwkvmpi doctor --emit env`. Of its RDMA ports "
            f"({rdma.described(fabric.others)}) none is up with a RoCE v2 address, so there is nothing to set; "
            "`rwkvmpi doctor --fabric` says what to mend."
        )
        if any(port.active and port.link_layer == "InfiniBand" for port in fabric.others):
            yield from _said("InfiniBand needs no settings but this one: refuse to start rather than fall back to TCP.")
            yield "export OMPI_MCA_pml=ucx"
        return
    yield from _said(
        f"Made on {fabric.node} by `rwkvmpi doctor --emit env`: this node has no RDMA device, so there is nothing to "
        "set. Ranks on several nodes talk over TCP."
    )


def _head(fabric: Fabric) -> Iterator[str]:
    yield from _said(
        f"The fabric's settings as `rwkvmpi doctor --emit env` found them on {fabric.node}. Sourced by rwkvmpi.sbatch; "
        "jobs/launch.sh passes the variables to all ranks. Nodes that differ need a file each."
    )


def _mpi(fabric: Fabric) -> Iterator[str]:
    yield from _said(
        "MPI takes the RDMA ports, and refuses to start rather than fall back to TCP without a word. Leave this line "
        "out to have --transport auto use verbs between nodes."
    )
    yield "export OMPI_MCA_pml=ucx"
    if not _mlx(fabric):
        yield from _said("Open MPI knows only mlx5 by itself; here it has to take the others, too.")
        yield "export OMPI_MCA_pml_ucx_tls=any OMPI_MCA_pml_ucx_devices=any"
    if fabric.cuda:
        why = "and what UCX has for a GPU's memory: it was sent for a trial on this node, and came right"
    else:
        why = (
            "A GPU's memory would need cuda_copy and cuda_ipc; on this node that was not seen to work (`rwkvmpi doctor "
            "--fabric` says why), so it passes through the host's"
        )
    yield from _said(f"Reliable connections, shared memory inside a node{', ' if fabric.cuda else '. '}{why}.")
    transports = ["rc"] if _mlx(fabric) else ["rc_verbs", "ud_verbs:aux"]  # ud: for getting acquainted only
    yield f"export UCX_TLS={','.join([*transports, 'sm', 'self', *fabric.cuda])}"
    if _soft(fabric):
        yield from _said(
            "Soft-RoCE's datagrams fail UCX's check of their address, and a long RDMA READ stalls on it; so rendezvous "
            "goes by RDMA WRITE."
        )
        yield "export UCX_UD_VERBS_ETH_DGID_CHECK=n UCX_RNDV_SCHEME=put_zcopy"


def _ports(fabric: Fabric) -> Iterator[str]:
    rate = f"{fabric.ports[0].rate_gbps:g} Gb/s"
    left = (
        f" Left out: {', '.join(f'{p.name} ({_why_not(p, fabric)})' for p in fabric.others)}." if fabric.others else ""
    )
    yield from _said(
        f"The ports to use ({rate}); MPI and the verbs transport take of them the one nearest to the rank's GPU.{left}"
    )
    yield f"export {rdma.UCX_PORTS}={','.join(port.name for port in fabric.ports)}"


def _why_not(port: Port, fabric: Fabric) -> str:
    if not port.active:
        return port.state
    return f"{port.rate_gbps:g} Gb/s" if port.best_gid() else "no RoCE v2 address"


def _gids(fabric: Fabric) -> Iterator[str]:
    best = {port.name: gid for port in fabric.ports if (gid := port.best_gid()) is not None}
    indices = {gid.index for gid in best.values()}
    told = ", ".join(f"{name} {gid.ip}" for name, gid in best.items())
    if len(indices) == 1:
        yield from _said(
            f"The GID of type RoCE v2 with the port's own address ({told}). 0 is usually link-local, and wrong. It "
            "changes when addresses are added or removed; left out, both MPI and verbs look for it themselves."
        )
        yield f"export {rdma.UCX_GID_INDEX}={indices.pop()}"
    else:
        told = ", ".join(f"{name} {gid.index}" for name, gid in best.items())
        yield from _said(
            f"The GID index differs from port to port ({told}): not set, MPI and verbs look for it themselves."
        )


def _traffic_class(fabric: Fabric) -> Iterator[str]:
    what = f"DSCP * 4 + {ECN_CAPABLE} (so that switches may mark for ECN)"
    if fabric.site_class is not None:
        yield from _said(
            f"The traffic class that this node's driver gives to all RDMA ({fabric.ports[0].device}/tc): the site has "
            "chosen it, and the connections of MPI and verbs follow."
        )
        yield f"export {rdma.UCX_TRAFFIC_CLASS}={fabric.site_class}"
    elif fabric.pfc:
        priority = fabric.pfc[0]
        code = 8 * priority + 2
        yield from _said(
            f"A lossless fabric: PFC is on for priority {', '.join(map(str, fabric.pfc))} ({fabric.pfc_by}). The "
            f"traffic class has to lead there: {what}, here DSCP {code}, which the usual table maps to priority "
            f"{priority} (mlnx_qos -i {fabric.ports[0].interface} shows this node's, which must trust dscp). The "
            "switches must agree."
        )
        yield f"export {rdma.UCX_TRAFFIC_CLASS}={4 * code + ECN_CAPABLE}"
    else:
        seen = "PFC is off on all priorities" if fabric.pfc == [] else "whether PFC is on could not be seen"
        yield from _said(
            f"A lossy fabric, as far as can be told: {seen} (dcb pfc show dev {fabric.ports[0].interface}). Packets "
            "that find a full queue are dropped and sent again, which works, but slowly; ECN keeps queues short. Where "
            f"the site has a lossless class, set it here: {what}; 106 is a common choice."
        )
        yield f"# export {rdma.UCX_TRAFFIC_CLASS}=106"


def _retries(fabric: Fabric) -> Iterator[str]:
    lossless = bool(fabric.pfc)
    count = RETRIES_LOSSLESS if lossless else RETRIES_LOSSY
    why = (
        "Without loss a few tries are enough." if lossless else "With loss a try may be lost, too: the most that ends."
    )
    yield from _said(
        f"UCX's default of 7 tries means for ever: a dead link would hang the job instead of ending it. {why}"
    )
    names = ["RC_MLX5", "DC_MLX5"] if _mlx(fabric) else []
    yield "export " + " ".join(f"UCX_{name}_RETRY_COUNT={count}" for name in ["RC_VERBS", *names])


def _verbs() -> Iterator[str]:
    yield from _said(
        "The verbs transport follows the UCX lines above. Its own ones, where it shall differ: one port for all ranks, "
        "or a list that goes by the rank's number on its node; the GID index; the traffic class."
    )
    yield f"# export {rdma.PORTS}=... {rdma.GID_INDEX}=... {rdma.TRAFFIC_CLASS}=..."


def _memory() -> Iterator[str]:
    yield from _said(
        "RDMA needs locked memory. Slurm may pass on the login node's small limit: see "
        "PropagateResourceLimitsExcept=MEMLOCK."
    )
    yield LOCKED_MEMORY.strip()


def _said(text: str) -> Iterator[str]:
    """Lines of a comment."""
    return iter(textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False))


def _mlx(fabric: Fabric) -> bool:
    return all(port.device.startswith("mlx") for port in fabric.ports)


def _soft(fabric: Fabric) -> bool:
    return any(not port.pci for port in fabric.ports)


def _pfc(chosen: list[Port], root: Path) -> tuple[list[int] | None, str]:
    """Priorities with PFC: as set, else as counted."""
    known: list[int] | None = None
    for port in chosen:
        found = fabric_counters.pfc_priorities(port.interface) if root == SYS else None
        if found:
            return found, f"dcb pfc show dev {port.interface}"
        known = found if known is None else known
        if seen := fabric_counters.paused_priorities(fabric_counters.read(port, root)):
            return seen, f"{port.interface} has counted pauses"
    return known, ""


def _site_class(port: Port, root: Path) -> int | None:
    """The class that NVIDIA's own driver was told to use for all traffic: "Global tclass=106"."""
    path = root / "class/infiniband" / port.device / "tc" / str(port.number) / "traffic_class"
    try:
        match = re.search(r"Global tclass=(\d+)", path.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return None
    return int(match[1]) if match and int(match[1]) < 256 else None


def _cuda_transports() -> list[str]:
    """UCX's transports for a GPU's memory where this node has a GPU and a trial went well; it takes two seconds."""
    if not rdma.gpu_bus_id(0):
        return []
    tried = device_probe.in_child()
    return [name for name in tried.transports.split(", ") if name.startswith("cuda")] if tried.works else []
