"""The doctor's checks of the fabric between ranks: do the nodes agree, and how long does a message take?

Collective: all ranks come here together, and the findings are rank 0's.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rwkvmpi.cluster import rdma
from rwkvmpi.cluster.launcher import launch_facts
from rwkvmpi.cluster.rdma import Port
from rwkvmpi.cluster.waiting import quiet_barrier
from rwkvmpi.doctor import diagnosis, fabric_checks, fabric_counters, fabric_library
from rwkvmpi.doctor.diagnosis import Finding
from rwkvmpi.doctor.fabric_counters import Heaps
from rwkvmpi.errors import UserError

SHOWN_RANKS = 16
SMALL_BYTES, LARGE_BYTES, SOFT_BYTES = 64, 4 << 20, 768 << 10  # the last without hardware, which takes long
SILENCE_S = 30.0
ENOUGH_PACKETS = 100  # fewer in the measurement are somebody else's
FAIR_SHARE = 0.3  # of a port's rate: less than that for large messages is worth a look


@dataclass(frozen=True)
class Place:
    """What one rank says of itself."""

    rank: int
    host: str
    port: str  # "" without RDMA
    why_not: str  # the sentence where there are ports but none for this rank
    rate_gbps: float
    mtu: int
    gid: str
    gid_index: int
    hardware: bool
    gpu: str
    library: str
    settings: tuple[tuple[str, str], ...]


def between_ranks(comm: Any) -> Iterator[Finding]:
    """Everything that takes all ranks: every rank has to iterate to the end."""
    port, here = _place(comm.rank)
    places: list[Place] = comm.allgather(here)
    yield from _of_other_nodes(comm, places)
    yield from _ports(places)
    yield from _differences(places)
    for name in ("MPI", "verbs") if _have_verbs(comm, places) else ("MPI",):
        before = fabric_counters.read(port) if port else {}
        quiet_barrier(comm)
        try:
            hops = _measure(comm, name, places)
        except UserError as error:  # on all ranks alike
            if comm.rank == 0:
                yield Finding(name, "fail", str(error))
            continue
        counts = fabric_counters.grown(before, fabric_counters.read(port)) if port else {}
        heaps = comm.gather(fabric_counters.heaps(counts))
        if comm.rank == 0:
            for hop in hops:
                yield _judged(name, hop, places, heaps)
            yield from _lost_meanwhile(name, places, heaps)


def _place(rank: int) -> tuple[Port | None, Place]:
    """The port and the GID that this rank would take, and what else has to fit between ranks."""
    facts = launch_facts()
    gpu, why_not, port, gid = _gpu(facts.local_rank), "", None, None
    if rdma.ports():
        try:
            port = rdma.port_of_rank(facts.local_rank, gpu)
            if port.link_layer != "InfiniBand":
                gid = rdma.choose_gid(port, rdma.wanted_gid_index())
        except UserError as error:
            why_not = str(error)
    library = fabric_library.loaded()
    return port, Place(
        rank=rank,
        host=platform.node(),
        port=port.name if port else "",
        why_not=why_not,
        rate_gbps=port.rate_gbps if port else 0.0,
        mtu=port.active_mtu if port else 0,
        gid=str(gid.ip) if gid else "",
        gid_index=gid.index if gid else -1,
        hardware=bool(port and port.pci),
        gpu=f"GPU {gpu} {fabric_checks.distance(port, gpu)[0]}" if gpu and port else "",
        library=f"{library.name}, {library.pml or '?'}, UCX {library.ucx or 'none'}",
        settings=tuple(
            (name, value)
            for name, value in fabric_library.settings().items()
            if name not in (rdma.PORTS, rdma.UCX_PORTS)  # which may differ from rank to rank
        ),
    )


def _gpu(local_rank: int) -> str:
    """The bus id of the GPU that a run gives to this rank: one after the other."""
    count = 0
    while rdma.gpu_bus_id(count):
        count += 1
    return rdma.gpu_bus_id(local_rank % count) if count else ""


def _of_other_nodes(comm: Any, places: list[Place]) -> Iterator[Finding]:
    """The checks of one machine on every other one; what is fine there is not repeated."""
    firsts: dict[str, int] = {}
    for place in places:
        firsts.setdefault(place.host, place.rank)
    findings: list[Finding] = []
    if comm.rank != 0 and firsts[platform.node()] == comm.rank:
        for name, check in fabric_checks.checks():
            findings += [finding for finding in diagnosis.examine(name, check) if finding.status != "ok"]
    gathered = comm.gather([(f.name, f.status, f.value, f.remedy) for f in findings])
    if comm.rank != 0:
        return
    alike: dict[tuple[Any, ...], list[str]] = {}
    for place, told in zip(places, gathered, strict=True):
        for finding in told:
            alike.setdefault(finding, []).append(place.host)
    for (name, status, value, remedy), hosts in alike.items():
        yield Finding(name, status, f"{_few(hosts)}: {value}", remedy)
    fine = len(firsts) - 1 - len({host for hosts in alike.values() for host in hosts})
    if fine:
        yield Finding("other nodes", "ok", f"{fine} of {len(firsts) - 1} have no finding")


def _ports(places: list[Place]) -> Iterator[Finding]:
    """The port of every rank."""
    for place in places[:SHOWN_RANKS]:
        name = f"rank {place.rank}"
        if place.why_not:
            yield Finding(name, "warn", f"{place.host}: {place.why_not}", "until then MPI, over TCP between nodes")
        elif place.port:
            gid = f" GID index {place.gid_index} ({place.gid})" if place.gid else ""
            gpu = f", {place.gpu}" if place.gpu else ""
            yield Finding(name, "ok", f"{place.host}: {place.port}{gid}{gpu}")
    if len(places) > SHOWN_RANKS and any(place.port for place in places):
        yield Finding("more ranks", "ok", f"{len(places) - SHOWN_RANKS} are not shown")


def _differences(places: list[Place]) -> Iterator[Finding]:
    """What has to be the same everywhere."""
    with_port = [place for place in places if place.port]
    if with_port and len(with_port) < len(places):
        without = _few([f"rank {place.rank} on {place.host}" for place in places if not place.port])
        yield Finding(
            "ranks differ", "warn", f"no RDMA port for {without}", "leave these nodes out, or --transport mpi"
        )
    remedies = {
        "mtu": "ip link set INTERFACE mtu 9000 on all nodes and switches alike: large messages get lost otherwise",
        "library": "load one MPI on all nodes",
        "settings": "export them where all ranks get them: mpirun -x NAME, or env.sh in the batch script",
    }
    for what, remedy in remedies.items():
        among = with_port if what == "mtu" else places
        kinds: dict[Any, list[str]] = {}
        for place in among:
            kinds.setdefault(getattr(place, what), []).append(f"rank {place.rank}")
        if len(kinds) > 1:
            value = "; ".join(f"{_told(what, kind)}: {_few(ranks)}" for kind, ranks in kinds.items())
            yield Finding("ranks differ", "warn", f"{what}: {value}", remedy)


def _told(what: str, kind: Any) -> str:
    if what == "settings":
        return " ".join(f"{name}={value}" for name, value in kind) or "none"
    return f"RDMA MTU {kind}" if what == "mtu" else str(kind)


def _have_verbs(comm: Any, places: list[Place]) -> bool:
    """Whether the verbs transport can be tried: every rank has a port and what drives it."""
    from rwkvmpi.grid.verbs import door

    mine = bool(places[comm.rank].gid) and not door.reason()
    return all(comm.allgather(mine))


def _measure(comm: Any, name: str, places: list[Place]) -> list[dict[str, Any]]:
    """Times between every rank and the next as the benchmark measures them; rank 0 gets them."""
    from rwkvmpi.bench.hops import measure_hops
    from rwkvmpi.bench.timing import QUICK
    from rwkvmpi.grid.mpi_transport import MpiTransport
    from rwkvmpi.grid.transport import Room, Terms, Transport
    from rwkvmpi.grid.verbs.transport import VerbsTransport

    terms, own = Terms(deadline_s=SILENCE_S), comm.Dup()
    transport: Transport
    if name == "MPI":
        transport = MpiTransport(own, terms)
    else:
        local_rank = launch_facts().local_rank
        transport = VerbsTransport(own, terms, local_rank, _gpu(local_rank))
    large = LARGE_BYTES if all(place.hardware for place in places) else SOFT_BYTES
    return measure_hops(comm, transport, {"small": Room(0, SMALL_BYTES), "large": Room(0, large)}, QUICK)


def _judged(transport: str, hop: dict[str, Any], places: list[Place], heaps: list[Heaps]) -> Finding:
    """A pair's latency and bandwidth beside the rate of its ports, if it went that way."""
    first, second = hop["ranks"]
    one, other = places[first], places[second]
    large = hop["sizes"]["large"]
    gbps = 8e-9 * large["bytes"] / large["seconds"]
    value = f"{transport}: {1e6 * hop['latency_s']:,.1f} us, {gbps:,.3g} Gb/s at {large['bytes'] / 2**20:.3g} MiB"
    by_port = min(heaps[first].packets, heaps[second].packets) >= ENOUGH_PACKETS
    if one.host == other.host and transport == "MPI":  # other pairs' packets may have passed the port, too
        by_port = by_port and len({place.host for place in places}) == 1
    name = f"ranks {first}-{second}"
    facts = {"ranks": [first, second], "transport": transport, "latency_s": hop["latency_s"]}
    facts |= {"bytes": large["bytes"], "bytes_per_second": large["bytes"] / large["seconds"]}
    if by_port:
        rate = min(one.rate_gbps, other.rate_gbps)
        value += f" through {one.port} and {other.port}, of {rate:g} Gb/s nominal"
        facts |= {"ports": [one.port, other.port], "nominal_gbps": rate}
        if one.hardware and other.hardware and gbps < FAIR_SHARE * rate and one.host != other.host:
            remedy = (
                "compare ib_write_bw between the two nodes: if it is slow too, the fabric; else MTU, NUMA, PCIe above"
            )
            return Finding(name, "warn", value, remedy, facts=facts)
        return Finding(name, "ok", value, facts=facts)
    if one.host == other.host:
        return Finding(name, "ok", f"{value} inside {one.host}", facts=facts)
    value += f" between {one.host} and {other.host}"
    if one.port and other.port:
        remedy = "export OMPI_MCA_pml=ucx (rwkvmpi doctor --emit env has the lines), or --transport verbs"
        return Finding(name, "warn", f"{value}, not through the RDMA ports: no packet passed them", remedy, facts=facts)
    return Finding(name, "ok", f"{value} over TCP", facts=facts)


def _lost_meanwhile(transport: str, places: list[Place], heaps: list[Heaps]) -> Iterator[Finding]:
    """What ports lost while the ranks measured: that is of now, not of the past."""
    for place, counted in zip(places, heaps, strict=True):
        if place.port and counted.worth_a_warning:
            value = fabric_counters.listed(counted.lost | counted.bad_frames)
            remedy = "the fabric loses packets now: PFC or ECN at both ends and in the switches, cables, MTU"
            yield Finding(
                f"rank {place.rank}", "warn", f"{place.host}: {place.port} meanwhile, over {transport}: {value}", remedy
            )


def _few(names: list[str]) -> str:
    """Some of many names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
