"""The verbs transport: one port, one completion queue, one reliable connection per neighbour.

A message goes from the sender's registered buffer into the receiver's registered slot, by the port alone; the
receiver finds the slot's number in its completion queue. The bodies of a rank that computes on a GPU pass through
page-locked memory of the host.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from rwkvmpi.cluster import rdma
from rwkvmpi.errors import FabricError, UserError
from rwkvmpi.grid.pulse import BEAT_EVERY_S
from rwkvmpi.grid.transport import Room, Terms, Transport
from rwkvmpi.grid.verbs import words
from rwkvmpi.grid.verbs.channels import VerbsReceiver, VerbsSender
from rwkvmpi.grid.verbs.device import MTU_BYTES, Device, number_of
from rwkvmpi.grid.verbs.door import require
from rwkvmpi.grid.verbs.link import SPARE, Link, Unexpected, Write
from rwkvmpi.grid.verbs.wireup import QUIET_TAG, agree, swap

AT_ONCE = 16  # completions taken from the queue together
GREETING_LIMIT_S = 15.0  # twice what slow hardware takes to give a packet up


class VerbsTransport(Transport):
    """Channels over RoCE v2 between the ranks of `comm`, a communicator of their own.

    local_rank, gpu (a PCI bus id, "" without): which port is the rank's, see cluster.rdma.port_of_rank.
    """

    name = "verbs"

    def __init__(self, comm: Any, terms: Terms, local_rank: int = 0, gpu: str = "") -> None:
        super().__init__(comm.rank, terms)
        self._comm, self._local_rank, self._gpu = comm, local_rank, gpu
        self._receivers: dict[tuple[int, int], VerbsReceiver] = {}
        self._senders: dict[tuple[int, int], VerbsSender] = {}
        self._device: Device | None = None
        self._links: dict[int, Link] = {}
        self._table: list[tuple[Callable[[Any], None], Link]] = []
        self._cards: dict[int, dict[str, Any]] = {}
        self._poll: Callable[[int], tuple[int, list[Any]]] = lambda _most: (0, [])
        self._next_beat = 0.0
        self._parting = False

    def receiver(self, source: int, tag: int, room: Room, depth: int, label: str) -> VerbsReceiver:
        channel = self._receivers[source, tag] = VerbsReceiver(self, source, tag, room, depth, label)
        return channel

    def sender(self, dest: int, tag: int, room: Room, depth: int, label: str) -> VerbsSender:
        channel = self._senders[dest, tag] = VerbsSender(self, dest, tag, room, depth, label)
        return channel

    # --- wiring up

    def connect(self) -> None:
        deadline = self.terms.deadline_s
        mine: dict[int, dict[str, Any]] = {}
        agree(self._comm, self._told(lambda: mine.update(self._open())), deadline)
        self._cards = swap(self._comm, mine, deadline)
        agree(self._comm, self._told(self._join), deadline)
        self.compare_clocks(self._comm, self._links)
        agree(self._comm, self._told(self._greet), deadline)

    def _told(self, step: Callable[[], None]) -> str:
        """Why a step of the wire-up failed, "" if it did not."""
        try:
            step()
        except UserError as error:
            return f"rank {self.rank} on {platform.node()}: {error}"
        except FabricError as error:  # which names the rank itself
            return str(error)
        return ""

    def _open(self) -> dict[int, dict[str, Any]]:
        """Port, memory and queue pairs of this side; a card for each neighbour."""
        peers = sorted({peer for peer, _ in [*self._receivers, *self._senders]})
        if not peers:
            return {}  # all neighbours of this rank are reached in another way
        require()
        port = rdma.port_of_rank(self._local_rank, self._gpu)
        gid = rdma.choose_gid(port, rdma.wanted_gid_index())
        device = self._device = Device(port, gid, rdma.wanted_traffic_class() or 0)
        slots = {peer: sum(c.depth for (p, _), c in self._channels() if p == peer) for peer in peers}
        most = max(slots.values(), default=0) + SPARE
        if most > device.most_work:
            raise UserError(f"{port.name} takes {device.most_work} messages at a time, {most} are needed: more stages")
        device.complete_into(sum(2 * (count + SPARE) for count in slots.values()) or 1)
        self._poll = device.completions.poll
        for peer in peers:
            try:
                self._links[peer] = Link(device, peer, slots[peer], self._table)
            except device.failure as error:
                raise UserError(device.refusal("a queue pair", error)) from None
        cards = {peer: {**link.card(), "node": platform.node(), "slots": {}} for peer, link in self._links.items()}
        for (peer, tag), receiver in self._receivers.items():
            cards[peer]["slots"][tag] = receiver.attach(device, self._links[peer])
        for (peer, _), sender in self._senders.items():
            sender.attach(device, self._links[peer])
        return cards

    def _channels(self) -> list[tuple[tuple[int, int], VerbsReceiver | VerbsSender]]:
        return [*self._receivers.items(), *self._senders.items()]

    def _join(self) -> None:
        device = self._device
        for peer, link in self._links.items():
            assert device is not None
            card = self._cards[peer]
            if card["kind"] != device.gid.kind:
                raise UserError(
                    f"{device.address} speaks {device.gid.kind}, rank {peer} on {card['node']} through "
                    f"{card['address']} {card['kind']}; set {rdma.GID_INDEX} to entries of one kind (RoCE v2)"
                )
            try:
                link.join(card)
            except device.failure as error:
                raise UserError(
                    f"{device.address} cannot be connected with rank {peer} on {card['node']} through "
                    f"{card['address']}: {words.of_connecting(number_of(error))}"
                ) from None
        for (peer, tag), sender in self._senders.items():
            if wrong := sender.aim(self._cards[peer]["slots"].get(tag)):
                raise RuntimeError(f"rank {peer} {wrong}")
        for receiver in self._receivers.values():
            receiver.prepare()

    def _greet(self) -> None:
        """A message of more than one full packet to every neighbour and from it, before anything depends on it."""
        for link in self._links.values():
            link.greet()
        end = time.monotonic() + GREETING_LIMIT_S
        while not all(link.greeted and link.quiet for link in self._links.values()):
            self.progress()
            if time.monotonic() > end:
                peer = next(peer for peer, link in self._links.items() if not (link.greeted and link.quiet))
                raise self.error(
                    peer,
                    f"was not heard to greet within {GREETING_LIMIT_S:.0f} s",
                    f"packets of {self.mtu} bytes must pass both ways: look at the MTU of every switch and interface",
                )
            time.sleep(1e-4)

    # --- in the run

    def progress(self) -> None:
        """Take in what has completed or arrived. FabricError for what failed."""
        count, completions = self._poll(AT_ONCE)
        if count:
            self._take(completions)

    def _take(self, completions: list[Any]) -> None:
        table = self._table
        for completion in completions:
            action, link = table[completion.wr_id]
            if completion.status:
                raise self._fault(link.peer, completion.status, completion.vendor_err)
            try:
                action(completion)
            except Unexpected as error:
                raise self._unexpected(link.peer, error) from error

    def post(self, link: Link, write: Write, reported: bool) -> None:
        """Send through a link; what that raises becomes a FabricError."""
        try:
            link.post(write, reported)
        except Unexpected as error:
            raise self._unexpected(link.peer, error) from error

    def tick(self) -> None:
        self.progress()
        now = time.monotonic()
        if now < self._next_beat or self._parting:
            return
        self._next_beat = now + BEAT_EVERY_S
        for link in self._links.values():
            self._beat(link)

    def _beat(self, link: Link) -> None:
        try:
            link.beat()
        except Unexpected as error:
            raise self._unexpected(link.peer, error) from error

    def silence_s(self, peer: int) -> float:
        link = self._links.get(peer)
        return link.silence_s() if link is not None else 0.0

    def where(self, peer: int) -> str:
        card = self._cards.get(peer)
        own = f"reached through {self._device.address}," if self._device is not None else ""
        if card is None:
            return f"rank {peer}, {own}"
        return f"rank {peer} on {card['node']}, port {card['address']}, {own}"

    @property
    def mtu(self) -> int:
        """Bytes of the largest packet that this port sends."""
        return MTU_BYTES.get(self._device.mtu, 0) if self._device is not None else 0

    @property
    def way(self) -> str:
        """The port in use, for the log."""
        if self._device is None:
            return "no port yet"
        port = self._device.port
        rate = f", {port.rate_gbps:g} Gb/s" if port.rate_gbps else ""
        bodies = "; a GPU's bodies pass through page-locked memory of the host" if self._gpu else ""
        return f"{self._device.address}{rate}, packets of {self.mtu} bytes{bodies}"

    def _fault(self, peer: int, status: int, vendor: int) -> FabricError:
        what, remedy = words.of_status(status, vendor)
        own = self._device.port if self._device is not None else None
        now = next((port for port in rdma.ports() if own is not None and port.name == own.name), None)
        if now is None:
            what += "; this rank's port is gone"
        elif not now.active:
            what += f"; this rank's port {now.name} is {now.state}"
        return self.error(peer, what, remedy)

    def _unexpected(self, peer: int, error: Unexpected) -> FabricError:
        return self.error(peer, str(error), words.PROGRAM)

    # --- the end

    def close(self) -> None:
        """Give everything back once every neighbour knows that what it sent has arrived, as we do."""
        if self._device is None:
            return
        self._parting = True
        for peer, link in self._links.items():
            self.wait(lambda link=link: self._has_beaten(link), peer, "the end of its connection")  # type: ignore[misc]
            self._beat(link)  # the last one: when it is known to have arrived, so has everything before
            self.wait(partial(self._is_quiet, link), peer, "the end of its connection")
        word, words_in = np.zeros(1, np.uint8), np.zeros((len(self._links), 1), np.uint8)
        sends = [self._comm.Isend(word, dest=peer, tag=QUIET_TAG) for peer in self._links]
        for peer, place in zip(self._links, words_in, strict=True):
            request = self._comm.Irecv(place, source=peer, tag=QUIET_TAG)
            self.wait(partial(self._serves_until, request), peer, "its farewell")
        for peer, send in zip(self._links, sends, strict=True):
            self.wait(partial(self._serves_until, send), peer, "its farewell")
        self._poll = lambda _most: (0, [])
        for link in self._links.values():
            link.close()
        self._links = {}
        self._device.close()
        self._device = None

    def _has_beaten(self, link: Link) -> bool:
        self.progress()
        return not link.beating

    def _is_quiet(self, link: Link) -> bool:
        self.progress()
        return link.quiet

    def _serves_until(self, request: Any) -> bool:
        self.progress()
        return bool(request.Test())
