"""Hops between neighbours over every transport that can be used here, beside raw verbs on the same link."""

from __future__ import annotations

import platform
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkvmpi.bench import hops, perftest
from rwkvmpi.bench.timing import FULL, QUICK
from rwkvmpi.cluster import gpu, mpi, rdma
from rwkvmpi.cluster.launcher import launch_facts
from rwkvmpi.cluster.waiting import quiet_bcast
from rwkvmpi.config import DEFAULT_CHUNK
from rwkvmpi.errors import UserError
from rwkvmpi.grid import figures
from rwkvmpi.grid.choose import choose_transport
from rwkvmpi.grid.layout import Grid
from rwkvmpi.grid.mpi_transport import MpiTransport
from rwkvmpi.grid.transport import Room, Terms
from rwkvmpi.grid.verbs import door
from rwkvmpi.models import cost
from rwkvmpi.models.device import Device, open_device
from rwkvmpi.models.schema import ModelShape

SIZES = {"64 B": 64, "4 KiB": 4 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20, "16 MiB": 16 << 20}
MOST_QUICK = 1 << 20

Say = Callable[[str], None]


def run(comm: Any, shape: ModelShape, quick: bool, say: Say) -> dict[str, Any] | None:
    """Measure; collective. Rank 0 gets everything as plain values, the others None when rank 0 is done.

    `transports` has each transport's hops as hops.measure_hops gives them, `absent` why others were not measured.
    """
    device = _device(comm)
    sizes = {name: nbytes for name, nbytes in SIZES.items() if not quick or nbytes <= MOST_QUICK}
    rooms = {name: Room(0, nbytes, on_device=True) for name, nbytes in sizes.items()}
    rooms |= {name: room for name, room in hops.message_rooms(shape, DEFAULT_CHUNK).items() if name != "small"}
    terms = Terms(comm.bcast(secrets.randbits(62)), pin=device.pin)
    line = Grid(1, comm.size, 1)
    found: dict[str, list[dict[str, Any]]] = {}
    absent: dict[str, str] = {}
    if why := _first(comm, door.reason()):
        absent["verbs"] = why
    with tempfile.TemporaryDirectory(prefix="rwkvmpi-bench-") as folder:
        for name, make in {
            "mpi": lambda: (MpiTransport(comm.Dup(), terms), ""),
            "mpi-device": lambda: choose_transport(comm.Dup(), line, "mpi", "auto", device, terms, Path(folder)),
            "verbs": lambda: choose_transport(comm.Dup(), line, "verbs", "auto", device, terms, Path(folder)),
        }.items():
            if name in absent:
                continue
            say(name)
            try:
                transport, why = make()
                if transport.name == name:
                    found[name] = hops.measure_hops(comm, transport, rooms, QUICK if quick else FULL)
                else:
                    absent[name] = "no GPU can be used here" if device.kind == "cpu" else why
            except UserError as error:  # on all ranks
                absent[name] = str(error)
    say("perftest")
    raw, failed = perftest.measure(comm, sizes, launch_facts().local_rank, _bus_id(device))
    result = None
    if comm.rank == 0:
        if failed:
            absent["perftest"] = failed
        model = {"version": shape.version, "n_layer": shape.n_layer, "n_embd": shape.n_embd}
        result = {
            "ranks": comm.size,
            "mpi": mpi.library_version(),
            "device": device.name,
            "model": {**model, "state_bytes": cost.state_bytes(shape), "chunk": DEFAULT_CHUNK},
            "transports": found,
            "perftest": raw,
            "absent": absent,
            "stored": _store(found),
        }
    quiet_bcast(comm, 0)
    return result


def _device(comm: Any) -> Device:
    """The GPU where every rank has one, else the CPU."""
    usable = all(comm.allgather(gpu.usable()))
    return open_device("cuda" if usable else "cpu", launch_facts().local_rank)


def _first(comm: Any, reason: str) -> str:
    """The reason of the first rank that has one, on all ranks."""
    return next(filter(None, comm.allgather(f"{reason} ({platform.node()})" if reason else "")), "")


def _bus_id(device: Device) -> str:
    """Where the rank's GPU sits; "" without."""
    return rdma.gpu_bus_id(int(device.name.rpartition(":")[2])) if device.kind == "cuda" else ""


def _store(found: dict[str, list[dict[str, Any]]]) -> str | None:
    """Put the hops where `plan` and the choice of a grid look; the file's path, None where it cannot be written."""

    def change(known: figures.Figures) -> None:
        for name, measured in found.items():
            hops.keep(known, name, measured)

    path = figures.update(change)
    return None if path is None else str(path)
