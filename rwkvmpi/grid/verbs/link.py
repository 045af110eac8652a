"""The connection with one neighbour: a reliable queue pair that carries all channels between the two, both ways.

What arrives announces itself by the 32 bits of immediate data that go with a write:

    kind (2 bits) | channel's tag (14 bits) | number of the slot (16 bits)

A MESSAGE lies in this slot of ours; RELEASED: the neighbour's slot, into which we wrote, may be written again. Every
immediate uses up a posted receive; as many are posted as can be on their way, since a slot is written once before it
is released, and released once after it was written. So nobody ever finds the other side not ready.
"""

from __future__ import annotations

import random
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rwkvmpi.grid.transport import PAGE, aligned_bytes
from rwkvmpi.grid.verbs.device import MTU_BYTES, Device, Region, number_of

MESSAGE, RELEASED, GREETING = 0, 1, 2

# How long a lost packet is repeated: 7 times 268 ms, and up to 4 times that where the hardware is slow. A switch may
# forget us for a second; a dead link is known soon after. 7 retries would mean "for ever" to some drivers.
ACK_TIMEOUT = 16  # 4.096 us * 2^16
RETRIES = 6
RNR_TIMER, RNR_RETRIES = 12, 6  # 0.64 ms; never needed
HOP_LIMIT = 64  # RoCE v2 is routed

SIGNAL_EVERY = 16  # one completion for so many releases: without any, the driver could not use their places again
SPARE = 2 * SIGNAL_EVERY + 4  # releases not known to have left, signs of life, greetings
GREETING_BYTES = 2 * MTU_BYTES[5]  # more than one packet of any size
_COUNTER, _CELL, _NOWHERE = 0, 64, 128  # places in the link's own page
_GREETING_AT = PAGE


def immediate(kind: int, tag: int, slot: int) -> int:
    """The immediate data as it travels, in the network's order of bytes."""
    assert 0 <= tag < 1 << 14
    assert 0 <= slot < 1 << 16
    return socket.htonl(kind << 30 | tag << 16 | slot)


class Write(NamedTuple):
    """A prepared write, to be posted as often as wanted; `piece.length` bytes of it."""

    work: Any
    piece: Any


class Link:
    """One queue pair. `slots` is how many messages either side can have under way, of all channels together."""

    def __init__(self, device: Device, peer: int, slots: int, table: list[tuple[Callable[[Any], None], Link]]) -> None:
        self.peer = peer
        self._device, self._table = device, table
        verbs, enums = device.verbs, device.verbs.enums
        self._own = device.register(aligned_bytes(PAGE + 2 * GREETING_BYTES, PAGE))
        self._cell = self._own.memory[_CELL : _CELL + 8].view(np.int64)
        self._counter = self._own.memory[_COUNTER : _COUNTER + 8].view(np.int64)
        self._receives = slots + 2
        self._room = slots + SPARE
        cap = verbs.qp.QPCap(max_send_wr=self._room, max_recv_wr=self._receives, max_send_sge=1, max_recv_sge=1)
        start = verbs.qp.QPInitAttr(
            qp_type=enums.IBV_QPT_RC, scq=device.completions, rcq=device.completions, cap=cap, sq_sig_all=0
        )
        self._attributes = verbs.qp.QPAttr(port_num=device.port.number)
        self._attributes.qp_access_flags = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
        self._pair = verbs.qp.QP(device.domain, start, self._attributes)
        self._first = random.getrandbits(24)  # packet number
        # its memory is never used: the immediate data is in the completion
        nowhere = verbs.wr.SGE(self._own.address + _NOWHERE, 8, self._own.lkey)
        self._receive = verbs.wr.RecvWR(wr_id=self.number(self._arrived), num_sge=1, sg=[nowhere])
        for _ in range(self._receives):
            self._pair.post_recv(self._receive)
        self._plain = self.number(self._left)
        self._signalled, self._silent = enums.IBV_SEND_SIGNALED, 0
        self._under_way = 0  # places of the send queue that are taken
        self._since_signal = 0  # of these, the ones after the last that will report
        self._reports: deque[int] = deque()  # how many places each report gives back
        self._delayed: deque[tuple[Write, bool]] = deque()
        self._handlers: dict[int, Callable[[], None]] = {immediate(GREETING, 0, 0): self._greeted}
        self._beat: Write
        self._greeting: Write
        self.beating = False
        self._heard, self._seen = time.monotonic(), 0
        self.greeted = False

    def number(self, action: Callable[[Any], None]) -> int:
        """The id of work whose completion is `action`'s."""
        self._table.append((action, self))
        return len(self._table) - 1

    def on(self, kind: int, tag: int, slot: int, handler: Callable[[], None]) -> None:
        """Call `handler` when this immediate arrives."""
        self._handlers[immediate(kind, tag, slot)] = handler

    # --- wiring up

    def card(self) -> dict[str, Any]:
        """What the neighbour has to know of this side."""
        device = self._device
        return {
            "queue": self._pair.qp_num,
            "first": self._first,
            "gid": device.gid.address,
            "kind": device.gid.kind,
            "address": device.address,
            "mtu": device.mtu,
            "cell": (self._own.address + _CELL, self._own.rkey),
            "greeting": (self._own.address + _GREETING_AT, self._own.rkey),
        }

    def join(self, card: dict[str, Any]) -> None:
        """Connect with the neighbour whose card this is; an error of pyverbs where that fails."""
        verbs, device, attributes = self._device.verbs, self._device, self._attributes
        attributes.path_mtu = min(device.mtu, card["mtu"])
        attributes.dest_qp_num, attributes.rq_psn, attributes.sq_psn = card["queue"], card["first"], self._first
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1
        attributes.min_rnr_timer, attributes.rnr_retry = RNR_TIMER, RNR_RETRIES
        attributes.timeout, attributes.retry_cnt = ACK_TIMEOUT, RETRIES
        route = verbs.addr.GlobalRoute(dgid=verbs.addr.GID(card["gid"]), sgid_index=device.gid.index)
        route.hop_limit, route.traffic_class = HOP_LIMIT, device.traffic_class
        attributes.ah_attr = verbs.addr.AHAttr(gr=route, is_global=1, port_num=device.port.number)
        self._pair.to_rts(attributes)
        self._beat = self.write(self._own, _COUNTER, 8, card["cell"], self.number(self._beaten))
        self._greeting = self.write(
            self._own, PAGE + GREETING_BYTES, GREETING_BYTES, card["greeting"], self._plain, immediate(GREETING, 0, 0)
        )

    def greet(self) -> None:
        """Show that the way is open for packets of full size; when both sides have joined."""
        self.post(self._greeting, True)

    def write(
        self, source: Region, offset: int, nbytes: int, target: tuple[int, int], number: int, announced: int = -1
    ) -> Write:
        """A write of `nbytes` of a region into the neighbour's memory at (address, key), with immediate data
        `announced`, or without; its completion goes to `number`."""
        verbs, enums = self._device.verbs, self._device.verbs.enums
        kind = enums.IBV_WR_RDMA_WRITE if announced < 0 else enums.IBV_WR_RDMA_WRITE_WITH_IMM
        piece = verbs.wr.SGE(source.address + offset, nbytes, source.lkey)
        work = verbs.wr.SendWR(wr_id=number, opcode=kind, num_sge=1, sg=[piece], send_flags=enums.IBV_SEND_SIGNALED)
        work.sg_list = piece  # itself instead of a copy, so that its length can be changed
        address, key = target
        work.set_wr_rdma(key, address)
        if announced >= 0:
            work.imm_data = announced
        if nbytes == 0:
            work.num_sge = 0
        return Write(work, piece)

    def release_of(self, tag: int, slot: int) -> Write:
        """The prepared word to the neighbour that it may write this slot again: immediate data, and no bytes."""
        cell = self._own.address, self._own.rkey  # no bytes go anywhere
        return self.write(self._own, _COUNTER, 0, cell, self._plain, immediate(RELEASED, tag, slot))

    # --- sending

    def post(self, write: Write, reported: bool) -> None:
        """Send. `reported`: its completion is wanted; without, only now and then one is."""
        if self._delayed or self._under_way >= self._room:
            self._delayed.append((write, reported))
            return
        work = write.work
        self._since_signal += 1
        if not reported:
            reported = self._since_signal >= SIGNAL_EVERY
            work.send_flags = self._signalled if reported else self._silent
        try:
            self._pair.post_send(work)
        except self._device.failure as error:
            raise Unexpected(f"cannot be sent to: the port refused (errno {number_of(error)})") from error
        self._under_way += 1
        if reported:
            self._reports.append(self._since_signal)
            self._since_signal = 0

    def beat(self) -> None:
        """A sign of life, unless the last one is still on its way: then the port will say how that ends."""
        if not self.beating:
            self.beating = True
            self._counter[0] += 1
            self.post(self._beat, True)

    @property
    def quiet(self) -> bool:
        """Whether everything posted is known to have reached the neighbour; after a last `beat`."""
        return not self._under_way and not self._delayed

    def silence_s(self) -> float:
        """Seconds since the neighbour's last sign of life was seen."""
        now, count = time.monotonic(), int(self._cell[0])
        if count != self._seen:
            self._heard, self._seen = now, count
        return now - self._heard

    def close(self) -> None:
        """Destroy the queue pair."""
        self._pair.close()

    # --- completions

    def sent(self) -> None:
        """A completion that was wanted has come: everything up to it has left."""
        self._under_way -= self._reports.popleft()
        while self._delayed and self._under_way < self._room:
            delayed, self._delayed = self._delayed, deque()
            for write, reported in delayed:
                self.post(write, reported)

    def _left(self, _completion: Any) -> None:
        self.sent()

    def _beaten(self, _completion: Any) -> None:
        self.beating = False
        self.sent()

    def _arrived(self, completion: Any) -> None:
        self._pair.post_recv(self._receive)
        handler = self._handlers.get(completion.imm_data)
        if handler is None:
            word = socket.ntohl(completion.imm_data)
            raise Unexpected(f"announced something that this rank does not know ({word:#010x})")
        handler()

    def _greeted(self) -> None:
        self.greeted, self._heard = True, time.monotonic()


class Unexpected(Exception):
    """Something went wrong with the neighbour, in words that follow its name."""
