"""One RDMA port, opened: what all connections of a rank share (context, protection domain, completion queue)."""

from __future__ import annotations

import contextlib
import resource
from typing import Any

import numpy as np

from rwkvmpi.cluster.rdma import Gid, Port
from rwkvmpi.errors import UserError
from rwkvmpi.grid.verbs import words
from rwkvmpi.grid.verbs.door import pyverbs

MTU_BYTES = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}  # enum ibv_mtu


class Region:
    """Memory of this rank that the port may read, and the neighbours may write."""

    def __init__(self, region: Any, memory: np.ndarray) -> None:
        self.memory = memory  # stays as long as the registration
        self.address = memory.ctypes.data
        self.lkey: int = region.lkey
        self.rkey: int = region.rkey
        self._region = region

    def close(self) -> None:
        """End the registration."""
        self._region.close()


class Device:
    """The port that this rank talks through. UserError when it cannot be opened."""

    def __init__(self, port: Port, gid: Gid, traffic_class: int) -> None:
        self.port, self.gid, self.traffic_class = port, gid, traffic_class
        self.verbs = verbs = pyverbs()
        self.failure = verbs.pyverbs_error.PyverbsRDMAError
        if port.link_layer != "Ethernet":
            raise UserError(f"{port.name} is a port of {port.link_layer}, verbs is for RoCE v2; use --transport mpi")
        # Children would share the registered pages with us, and what the port writes would reach only one of us; new
        # kernels see to that themselves, and on some it is too late for it here.
        with contextlib.suppress(verbs.pyverbs_error.PyverbsError):
            verbs.fork.fork_init()
        try:
            self.context = verbs.device.Context(name=port.device)
            attributes = self.context.query_port(port.number)
            self.most_work: int = self.context.query_device().max_qp_wr
            self.domain = verbs.pd.PD(self.context)
        except verbs.pyverbs_error.PyverbsError as error:
            raise UserError(words.of_opening(port.device, number_of(error))) from None
        if attributes.state != verbs.enums.IBV_PORT_ACTIVE:
            raise UserError(f"the RDMA port {port.name} is not active; see `ip link` and `rdma link`")
        self.mtu: int = attributes.active_mtu
        self.completions: Any = None
        self._regions: list[Region] = []

    @property
    def address(self) -> str:
        """The port and the address it talks from, for sentences."""
        return f"{self.port.name} (GID {self.gid.index}, {self.gid.ip})"

    def register(self, memory: np.ndarray) -> Region:
        """Let the neighbours write into `memory` (whole pages of its own) until `close`."""
        enums = self.verbs.enums
        access = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
        try:
            region = self.verbs.mr.MR(self.domain, memory.nbytes, access, address=memory.ctypes.data)
        except self.failure as error:
            raise UserError(self.refusal(f"{-(-memory.nbytes >> 10)} KiB of memory", error)) from None
        self._regions.append(Region(region, memory))
        return self._regions[-1]

    def complete_into(self, entries: int) -> None:
        """Make the completion queue, for so many completions that nobody has looked at."""
        try:
            self.completions = self.verbs.cq.CQ(self.context, entries)
        except self.failure as error:
            raise UserError(self.refusal(f"a completion queue of {entries} entries", error)) from None

    def refusal(self, what: str, error: BaseException) -> str:
        """Why the port does not give or take `what`."""
        soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
        return words.of_refusal(self.port.name, what, limit, number_of(error))

    def close(self) -> None:
        """Give everything back, the queue pairs having gone before."""
        for region in self._regions:
            region.close()
        for item in (self.completions, self.domain, self.context):
            if item is not None:
                item.close()


def number_of(error: BaseException) -> int:
    """The errno in an error of pyverbs, 0 where it has none."""
    return abs(int(getattr(error, "error_code", 0) or 0))
