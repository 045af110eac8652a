"""A hop between two ranks whose bodies lie in GPU memory, by size, and which way the bytes went. Run by _gpu_fabric.py:

    mpirun -n 2 python scripts/_gpu_fabric_hops.py --way straight --json FILE

A hop begins with the bytes in the sender's GPU and ends with them in the receiver's. Ways: `host`, copied as a whole to
page-locked memory, sent, and copied up; `pieces`, the same in pieces that overlap; `straight`, MPI on device memory;
`bare`, MPI on device memory without this program's transport, for comparison.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from rwkvmpi.cluster import mpi
from rwkvmpi.cluster.device_probe import memory_at, probe_between_neighbours
from rwkvmpi.cluster.launcher import launch_facts
from rwkvmpi.errors import UserError
from rwkvmpi.grid.device_transport import DeviceTransport
from rwkvmpi.grid.mpi_transport import MpiTransport
from rwkvmpi.grid.transport import Room, Terms
from rwkvmpi.models.device import Device, as_tensor, open_device

SIZES = (64, 4096, 65536, 262144, 1 << 20, 4 << 20, 16 << 20, 32 << 20)
PROFILED = (1 << 20, 32 << 20)
PROFILED_ROUNDS = 10
WARM_UP = 5


class Hop:
    """Messages of one size through a transport of this program."""

    def __init__(self, transport: MpiTransport, device: Device, peer: int, tag: int, nbytes: int) -> None:
        room = Room(64, nbytes, on_device=True)
        self._receiver = transport.receiver(peer, tag, room, 1, "a hop")
        self._sender = transport.sender(peer, tag, room, 1, "a hop")
        self._device, self._nbytes = device, nbytes
        self._here = device.message_memory(nbytes)
        self._sent = self._received = 0

    def send(self) -> None:
        """Begin to send one."""
        body = self._sender.buffer().body
        if isinstance(body, np.ndarray):
            self._device.fetch((self._here, body)).wait()
        self._sender.send(self._sent, self._nbytes)
        self._sent += 1

    def receive(self) -> None:
        """Returns when one is in the device's memory."""
        body = self._receiver.wait(self._received).body
        if isinstance(body, np.ndarray):
            self._here.copy_(as_tensor(body), non_blocking=True)
        self._device.ticket().wait()
        self._receiver.release()
        self._received += 1

    def close(self) -> None:
        """No more of them."""
        self._sender.flush()
        self._sender.close()
        self._receiver.close()


class BareHop:
    """The same with two persistent requests on device memory, and nothing else."""

    def __init__(self, comm: Any, device: Device, peer: int, tag: int, nbytes: int) -> None:
        self._held = device.message_memory(nbytes), device.message_memory(nbytes)
        device.ticket().wait()
        out, into = (memory_at(memory.data_ptr(), nbytes) for memory in self._held)
        self._give = comm.Send_init(out, dest=peer, tag=tag)
        self._take = comm.Recv_init(into, source=peer, tag=tag)
        self._take.Start()

    def send(self) -> None:
        """See Hop."""
        self._give.Wait()
        self._give.Start()

    def receive(self) -> None:
        """See Hop."""
        self._take.Wait()
        self._take.Start()

    def close(self) -> None:
        """See Hop."""
        self._give.Wait()
        self._take.Cancel()
        self._take.Wait()


def play(comm: Any, hop: Hop | BareHop, rounds: int) -> list[float]:
    """Seconds of a hop, of each round there and back."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        if comm.rank == 0:
            hop.send()
            hop.receive()
        else:
            hop.receive()
            hop.send()
        found.append((time.perf_counter() - start) / 2)
    return found


def copies_during(device: Device, work: Callable[[], object]) -> dict[str, int] | None:
    """Bytes that this process copied meanwhile, by kind ("Memcpy DtoH (Device -> Pinned)"), as CUPTI saw them."""
    if device.target.type == "cpu":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    copied: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "gpu_memcpy":
            copied[event["name"]] += int(event["args"].get("bytes", 0))
    return dict(copied)


def measure(way: str, seconds: float, most: int) -> dict[str, Any]:
    """Everything about one way; rank 0's result counts."""
    comm = mpi.world()
    if comm is None or comm.size != 2:
        raise UserError("this measures between two ranks: mpirun -n 2")
    peer = 1 - comm.rank
    device = open_device("cuda", launch_facts().local_rank)
    if way in ("straight", "bare") and (why := probe_between_neighbours(comm, device, [peer])):
        return {"reason": why}
    comm = comm.Dup()
    terms = Terms(pin=device.pin)
    sizes = [size for size in SIZES if size <= most]
    if way == "host":
        transport: MpiTransport = MpiTransport(comm, terms)
    else:
        transport = DeviceTransport(comm, device, terms, staged=way == "pieces")
    terms.idle = transport.tick
    hops: dict[int, Hop | BareHop] = {
        size: BareHop(comm, device, peer, tag, size) if way == "bare" else Hop(transport, device, peer, tag, size)
        for tag, size in enumerate(sizes)
    }
    if way != "bare":
        transport.connect()
    result: dict[str, Any] = {"us": {}, "copies": {}}
    for size, hop in hops.items():
        once = comm.bcast(max(play(comm, hop, WARM_UP)[1:]))
        rounds = max(10, min(2000, round(seconds / (2 * once))))
        result["us"][size] = 1e6 * statistics.median(play(comm, hop, rounds))
    for size in PROFILED:
        if size in hops:
            own = copies_during(device, lambda hop=hops[size]: play(comm, hop, PROFILED_ROUNDS))  # type: ignore[misc]
            both = comm.gather(own)
            if both and None not in both:
                total = Counter(both[0])
                total.update(both[1])
                result["copies"][size] = {"moved": 2 * PROFILED_ROUNDS * size, **total}
    comm.Barrier()
    for hop in hops.values():
        hop.close()
    transport.close()
    return result


@click.command(help=__doc__)
@click.option("--way", type=click.Choice(["host", "pieces", "straight", "bare"]), required=True)
@click.option("--seconds", type=float, default=0.5, show_default=True, help="For each size.")
@click.option("--most", type=int, default=SIZES[-1], show_default=True, help="Bytes of the largest hop.")
@click.option("--json", "path", type=click.Path(path_type=Path), required=True)
def main(way: str, seconds: float, most: int, path: Path) -> None:
    with torch.inference_mode():
        result = measure(way, seconds, most)
    if launch_facts().rank == 0:
        path.write_text(json.dumps(result))


if __name__ == "__main__":
    mpi.guard(lambda: main.main(standalone_mode=False))
