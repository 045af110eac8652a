"""How messages travel between neighbours: receives posted ahead, sends that go on while the rank computes.

A transport hands out receivers and senders for one neighbour and one tag each; they own their buffers, which live
as long as the run. The wavefront knows only these faces. What all bodies have in common is here: every message is
checked before anybody sees it, every wait ends (with the message, or with a sentence), and what the hops cost is
counted. A body adds how bytes move: grid.mpi_transport, grid.device_transport, grid.verbs.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rwkvmpi.errors import FabricError
from rwkvmpi.grid.activity import HOPS, Activity
from rwkvmpi.grid.envelope import ENVELOPE_BYTES, Envelope, fault, is_intact, open_envelope, seal
from rwkvmpi.grid.pulse import compare_clocks

PAGE, HUGE_PAGE = 4096, 2 << 20  # bytes
PIECE = 32 << 20  # bytes of addresses asked for at once; memory is taken as it is written to
_MAP_NORESERVE = 0x4000  # Linux: more may be asked for than will be used
DEADLINE_S = 300.0
SPINS_PER_POLL = 64
POLLS_BEFORE_SLEEP = 8  # about 0.2 ms: what a hop of some MiB takes
POLLS_PER_LOOK = 16  # looks at the neighbour's signs of life
SLEEP_S = 20e-6  # long enough to hand the core to another rank where there are more ranks than cores
SLACK_NS = 1000  # by how much a sleep may be late; Linux allows itself 50,000
_PR_SET_TIMERSLACK = 29


class Room(NamedTuple):
    """The size of a channel's messages: `head` bytes (a multiple of 64) sent whole every time, and up to `body` bytes,
    which may lie in the memory of the device that computes if `on_device`."""

    head: int
    body: int
    on_device: bool = False

    @property
    def nbytes(self) -> int:
        """Of a full message with its envelope."""
        return ENVELOPE_BYTES + self.head + self.body


class Parcel(NamedTuple):
    """A message's content: head, uint8 [room.head] of the host; body, uint8 [n], an array or a tensor of the device."""

    head: np.ndarray
    body: Any


@dataclass
class Hops:
    """What the messages of some channels cost their receiver.

    A hop takes from `send` to the moment when the receiver has it. It is `seen` whole where the receiver was waiting
    before it began; else only the part after the receiver began to wait is known, which is 0 if it did not wait.
    """

    messages: int = 0
    nbytes: int = 0
    seen: int = 0
    seen_s: float = 0.0
    exposed_s: float = 0.0

    def add(self, other: Hops) -> None:
        """Count the other's messages too."""
        self.messages += other.messages
        self.nbytes += other.nbytes
        self.seen += other.seen
        self.seen_s += other.seen_s
        self.exposed_s += other.exposed_s

    @property
    def total_s(self) -> float | None:
        """Seconds of all hops: of those seen on average, times their number. None if none was seen."""
        return max(self.exposed_s, self.seen_s / self.seen * self.messages) if self.seen else None


@dataclass
class Terms:
    """What all channels of one rank agree on.

    job: a number that all ranks of this start share and others do not. idle: called while a rank waits, so that
    control messages are answered meanwhile. pin: told of every buffer that a GPU may copy from or to. deadline_s: the
    longest silence of a neighbour that is waited for. summed: messages carry checksums. activity: is told what the rank
    waits for.
    """

    job: int = 0
    idle: Callable[[], None] = lambda: None
    pin: Callable[[np.ndarray], None] = lambda memory: None
    deadline_s: float = DEADLINE_S
    summed: bool = False
    activity: Activity = field(default_factory=Activity)
    clocks: dict[int, int] = field(default_factory=dict)  # neighbour -> its monotonic clock minus ours, ns


class Transport(ABC):
    """Receivers and senders between this rank and its neighbours.

    All channels are made first, then `connect` is called by all ranks of the communicator together, and at the end
    `close`. name: what the log calls it.
    """

    name = ""

    def __init__(self, rank: int, terms: Terms) -> None:
        self.rank = rank
        self.terms = terms
        _sleep_sharply()

    @abstractmethod
    def receiver(self, source: int, tag: int, room: Room, depth: int, label: str) -> Receiver:
        """Messages from `source` that its sender with this tag sends; `depth` buffers; label: what they are."""

    @abstractmethod
    def sender(self, dest: int, tag: int, room: Room, depth: int, label: str) -> Sender:
        """Messages to `dest`, whose receiver has this tag, room and depth."""

    @abstractmethod
    def connect(self) -> None:
        """Make the channels usable. UserError where the fabric cannot be used, on all ranks."""

    @property
    def way(self) -> str:
        """After `connect`: the port in use and what else is worth a word in the log."""
        return ""

    @abstractmethod
    def tick(self) -> None:
        """To be called whenever the rank polls: gives and takes signs of life."""

    @abstractmethod
    def silence_s(self, peer: int) -> float:
        """Seconds since this neighbour's last sign of life."""

    @abstractmethod
    def where(self, peer: int) -> str:
        """A neighbour, its host and the way there, for a sentence."""

    @abstractmethod
    def close(self) -> None:
        """Part from the neighbours in good order, when nothing more will be sent; returns when they are there too."""

    def compare_clocks(self, comm: Any, peers: Iterable[int]) -> None:
        """Find out how the neighbours' clocks differ from this rank's: hops are timed by both. Collective."""
        try:
            self.terms.clocks |= compare_clocks(comm, sorted(peers), self.terms.deadline_s)
        except TimeoutError as error:
            raise self.error(
                error.args[0],
                f"did not answer within {self.terms.deadline_s:.0f} s at the start",
                "look whether its node and the link are up (`rwkvmpi doctor --fabric`)",
            ) from None

    def wait(self, ready: Callable[[], bool], peer: int, what: str) -> float:
        """Serve others until `ready()`; returns the seconds that took. FabricError when the neighbour falls silent."""
        outer = self.terms.activity.begin_wait(peer, what)
        start = time.perf_counter()
        polls = 0
        while True:
            for _ in range(SPINS_PER_POLL):
                if ready():
                    self.terms.activity.end_wait(outer)
                    return time.perf_counter() - start
                if polls >= POLLS_BEFORE_SLEEP:
                    time.sleep(SLEEP_S)
            polls += 1
            self.terms.idle()
            if polls % POLLS_PER_LOOK == 0 and self.silence_s(peer) > self.terms.deadline_s:
                raise self.error(
                    peer,
                    f"gave no sign of life for {self.silence_s(peer):.0f} s while {what} was due",
                    "look whether its node and the link are up (`rwkvmpi doctor --fabric`); --deadline allows a longer "
                    "silence",
                )

    def error(self, peer: int, what: str, remedy: str) -> FabricError:
        """The error that names both ends, what happened and the way out."""
        return FabricError(
            f"rank {self.rank} on {platform.node()}: its neighbour {self.where(peer)} {what}; {remedy}. Nothing that "
            "was committed is lost: the same command goes on from the last commit"
        )


class Receiver(ABC):
    """Messages from one neighbour in the order they were sent."""

    def __init__(self, transport: Transport, peer: int, tag: int, room: Room, label: str) -> None:
        self._transport, self._peer, self._tag, self._room, self._label = transport, peer, tag, room, label
        self._what = f"a message ({label})"
        self._due = 0
        self.waited_s = 0.0
        self.hops = Hops()

    def wait(self, position: int) -> Parcel:
        """The next message, which must be the one for chunk `position`; its memory is valid until `release`.

        Blocks until it is here. FabricError where another one came, or the neighbour is gone.
        """
        begun = 0
        if not self._here():
            begun = time.monotonic_ns()
            self.waited_s += self._transport.wait(self._here, self._peer, self._what)
        envelope, head, body = self._parcel()
        words = open_envelope(envelope)
        self._check(envelope, words, position)
        self._due += 1
        self._count(words, begun)
        return Parcel(head, body if words.body_bytes == self._room.body else body[: words.body_bytes])

    @abstractmethod
    def _here(self) -> bool:
        """Whether the message of this turn has come."""

    @abstractmethod
    def _parcel(self) -> tuple[np.ndarray, np.ndarray, Any]:
        """(envelope uint8 [64], head, body with all its room) of this turn."""

    @abstractmethod
    def _whole(self, body_bytes: int) -> np.ndarray | None:
        """Head and body of this turn in one piece, for the checksum; None where they are not in the host's memory."""

    @abstractmethod
    def release(self) -> None:
        """Give the memory of the last `wait` back, to receive into it again."""

    @abstractmethod
    def close(self) -> None:
        """No more messages will come; stop receiving."""

    def _check(self, envelope: np.ndarray, words: Envelope, position: int) -> None:
        terms = self._transport.terms
        wrong = fault(words, terms.job, self._tag, self._due, position, self._room.body, terms.summed)
        if wrong is None and terms.summed:
            whole = self._whole(words.body_bytes)
            if whole is not None and not is_intact(envelope, words, whole):
                wrong = "was damaged on its way: its checksum does not fit"
        if wrong is not None:
            raise self._transport.error(
                self._peer,
                f"sent a message ({self._label}) that {wrong}",
                "look at the links' counters (`rwkvmpi doctor --fabric`)",
            )

    def _count(self, words: Envelope, waited_from: int) -> None:
        hops = self.hops
        hops.messages += 1
        hops.nbytes += ENVELOPE_BYTES + self._room.head + words.body_bytes
        terms = self._transport.terms
        if not waited_from and terms.activity.recorder is None:
            return
        now = time.monotonic_ns()
        sent = words.sent_ns - terms.clocks.get(self._peer, 0)
        terms.activity.record(HOPS, self._label, sent, max(now, sent), words.body_bytes, self._peer)
        if waited_from:
            if sent >= waited_from:
                took = max(now - sent, 0) / 1e9  # clocks of two machines never agree to the last
                hops.seen += 1
                hops.seen_s += took
            else:
                took = (now - waited_from) / 1e9
            hops.exposed_s += took


class Sender(ABC):
    """Messages to one neighbour: buffers used in turn."""

    def __init__(self, transport: Transport, peer: int, tag: int, room: Room, label: str) -> None:
        self._transport, self._peer, self._tag, self._room, self._label = transport, peer, tag, room, label
        self._number = 0
        self.waited_s = 0.0

    def buffer(self) -> Parcel:
        """Free memory to fill, the same until `send`; blocks while all buffers are still on their way."""
        if not self._free():
            self.waited_s += self._transport.wait(self._free, self._peer, f"room for a message ({self._label})")
        _, head, body = self._parcel()
        return Parcel(head, body)

    def send(self, position: int, body_bytes: int) -> None:
        """Send the head and the first `body_bytes` of the body, for chunk `position`; returns at once."""
        terms = self._transport.terms
        words = 0, terms.job, self._tag, self._number, position, body_bytes, time.monotonic_ns(), 0
        seal(self._parcel()[0], words, self._whole(body_bytes) if terms.summed else None)
        self._number += 1
        self._start(body_bytes)

    @abstractmethod
    def _free(self) -> bool:
        """Whether the buffer of this turn may be filled."""

    @abstractmethod
    def _parcel(self) -> tuple[np.ndarray, np.ndarray, Any]:
        """(envelope uint8 [64], head, body with all its room) of this turn."""

    @abstractmethod
    def _whole(self, body_bytes: int) -> np.ndarray | None:
        """Head and body of this turn in one piece, for the checksum; None where they are not in the host's memory."""

    @abstractmethod
    def _start(self, body_bytes: int) -> None:
        """Begin to send the buffer of this turn; the next one is that of the next turn."""

    @abstractmethod
    def flush(self) -> None:
        """Block until everything sent has left."""

    @abstractmethod
    def close(self) -> None:
        """No more will be sent; everything was flushed."""


class _Pages:
    """Hands out memory from large pieces of fresh zeroed memory, which go when the last that was cut from them goes."""

    def __init__(self) -> None:
        self._left = np.empty(0, dtype=np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], a multiple of PAGE, zeroed, beginning with a page."""
        if nbytes > len(self._left):
            size = max(PIECE, -(-nbytes // HUGE_PAGE) * HUGE_PAGE)
            mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
            with contextlib.suppress(OSError, AttributeError):  # a system without huge pages
                mapped.madvise(mmap.MADV_HUGEPAGE)
            memory = np.frombuffer(mapped, dtype=np.uint8)
            self._left = memory[-memory.ctypes.data % HUGE_PAGE :][:size]
        taken, self._left = self._left[:nbytes], self._left[nbytes:]
        return taken


_supply = _Pages()


class HostBuffer:
    """Memory of the host for one message: [envelope | head | body], on pages of its own.

    Whole pages, so that no two buffers lie on one: pages are locked, and only once. Many of them make up a huge page,
    where the system has those: MPI then lets the receiver copy from its neighbour's memory four times as fast.
    """

    def __init__(self, room: Room, pin: Callable[[np.ndarray], None] = lambda memory: None) -> None:
        pages = _supply.take(-(-room.nbytes // PAGE) * PAGE)
        pin(pages)
        self.memory = pages[: room.nbytes]
        rest = self.memory[ENVELOPE_BYTES:]
        self.parcel = self.memory[:ENVELOPE_BYTES], rest[: room.head], rest[room.head :]
        self._head = ENVELOPE_BYTES + room.head

    def whole(self, body_bytes: int) -> np.ndarray:
        """Head and the first bytes of the body."""
        return self.memory[ENVELOPE_BYTES : self._head + body_bytes]

    def message(self, body_bytes: int) -> np.ndarray:
        """What is sent: envelope, head and the first bytes of the body."""
        return self.memory[: self._head + body_bytes]


def _sleep_sharply() -> None:
    """From now on this thread's sleeps end when they should, as far as the system can do that."""
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0)


def aligned_bytes(nbytes: int, alignment: int = 64) -> np.ndarray:
    """uint8 [nbytes], zeroed, starting at a multiple of `alignment` (a cache line, a vector register)."""
    raw = np.zeros(nbytes + alignment, dtype=np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes]
