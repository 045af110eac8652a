"""Which transport a run uses, and why: what was asked for, what the nodes have, what a probe has seen to work."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkvmpi.errors import UserError
from rwkvmpi.grid.layout import Grid
from rwkvmpi.grid.mpi_transport import MpiTransport
from rwkvmpi.grid.transport import Receiver, Room, Sender, Terms, Transport

if TYPE_CHECKING:
    from rwkvmpi.models.device import Device

DEVICE_MEMORY = "RWKVMPI_DEVICE_MPI"  # 0: never give device memory to MPI
HOST_MEMORY = "MPI on host memory"


def choose_transport(
    comm: Any, grid: Grid, wanted: str, checksum: str, device: Device, terms: Terms, folder: Path
) -> tuple[Transport, str]:
    """The transport for these ranks, and a line that says which and why. Collective over `comm`.

    `wanted`: auto, mpi or verbs; `checksum`: auto, on or off; `folder`: the run's. UserError on all ranks where verbs
    were asked for and some rank cannot use them.
    """
    checked = replace(terms, summed=checksum != "off")
    terms = replace(terms, summed=checksum == "on")
    nodes = comm.allgather(platform.node())
    several = len(set(nodes)) > 1
    if wanted == "verbs":
        _require_verbs(comm, nodes)
        return _verbs(comm, device, checked), "RDMA verbs, as asked for"
    mpi, why = _over_mpi(comm, grid, device, terms, folder)
    if wanted == "mpi":
        return mpi, f"{why} (--transport mpi)"
    if not several:
        return mpi, f"{why} (all ranks are on one node)"
    if os.environ.get("OMPI_MCA_pml") == "ucx":  # noqa: SIM112 - Open MPI's own spelling
        return mpi, f"{why} (OMPI_MCA_pml=ucx: the site has set MPI up for its fabric)"
    lacking = _without_verbs(comm, nodes)
    if lacking:
        return mpi, f"{why} (no RDMA verbs: {lacking})"
    return MixedTransport(comm.rank, nodes, mpi, _verbs(comm, device, checked)), (
        f"RDMA verbs between nodes, {why} within them"
    )


def _over_mpi(comm: Any, grid: Grid, device: Device, terms: Terms, folder: Path) -> tuple[Transport, str]:
    if device.kind == "cpu":
        return MpiTransport(comm, terms), HOST_MEMORY
    if terms.summed:
        return MpiTransport(comm, terms), f"{HOST_MEMORY}, for checksums of what lies in a GPU's memory are not made"
    from rwkvmpi.cluster.device_probe import probe_between_neighbours
    from rwkvmpi.grid.device_transport import DeviceTransport

    if os.environ.get(DEVICE_MEMORY) == "0":
        why = f"{DEVICE_MEMORY}=0"
    else:
        why = probe_between_neighbours(comm, device, sorted(grid.neighbours(comm.rank)), folder)
    if why:
        return DeviceTransport(comm, device, terms, staged=True), f"{HOST_MEMORY}, page-locked, in pieces: {why}"
    return DeviceTransport(comm, device, terms), "MPI on device memory, seen to work between all neighbours"


def _verbs(comm: Any, device: Device, terms: Terms) -> Transport:
    from rwkvmpi.cluster import rdma
    from rwkvmpi.cluster.launcher import launch_facts
    from rwkvmpi.grid.verbs.transport import VerbsTransport

    gpu = rdma.gpu_bus_id(device.target.index or 0) if device.kind == "cuda" else ""
    return VerbsTransport(comm.Dup(), terms, launch_facts().local_rank, gpu)


def _without_verbs(comm: Any, nodes: list[str]) -> str:
    """Why some rank cannot use verbs: the first one's reason, with its node; '' if all can."""
    from rwkvmpi.grid.verbs.door import reason

    reasons = comm.allgather(reason())
    return next((f"{why} on {node}" for why, node in zip(reasons, nodes, strict=True) if why), "")


def _require_verbs(comm: Any, nodes: list[str]) -> None:
    if why := _without_verbs(comm, nodes):
        raise UserError(f"--transport verbs: {why}; use --transport mpi, or auto")


class MixedTransport(Transport):
    """One transport for neighbours on the same node, another for those on other nodes."""

    def __init__(self, rank: int, nodes: list[str], inside: Transport, between: Transport) -> None:
        super().__init__(rank, inside.terms)
        self.name = f"{between.name} and {inside.name}"
        self._parts = inside, between
        self._by_peer = [inside if node == nodes[rank] else between for node in nodes]

    def receiver(self, source: int, tag: int, room: Room, depth: int, label: str) -> Receiver:
        return self._by_peer[source].receiver(source, tag, room, depth, label)

    def sender(self, dest: int, tag: int, room: Room, depth: int, label: str) -> Sender:
        return self._by_peer[dest].sender(dest, tag, room, depth, label)

    def connect(self) -> None:
        for part in self._parts:
            part.connect()

    def tick(self) -> None:
        for part in self._parts:
            part.tick()

    @property
    def way(self) -> str:
        return "; ".join(part.way for part in self._parts if part.way)

    def silence_s(self, peer: int) -> float:
        return self._by_peer[peer].silence_s(peer)

    def where(self, peer: int) -> str:
        return self._by_peer[peer].where(peer)

    def close(self) -> None:
        for part in self._parts:
            part.close()
