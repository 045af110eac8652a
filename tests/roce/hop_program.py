"""Two ranks that exchange random parcels through a transport, and look at every byte that arrives.

    mpirun -n 2 python hop_program.py --transport mpi|verbs [--rounds N] [--seed S] [--deadline D] [--bytes MAX]
                                      [--checksum auto|on|off] [--pause MS] [--pace S]
                                      [--break byte|twice|lost|foreign|over]

--break lets rank 0 spoil a message at the end, which rank 1 has to find (over: verbs only, a slot is written that was
not released). Every rank prints a line of JSON with "ready" on standard error before the first round, and one
when it is done or fails.
Exit codes are those of rwkvmpi: 0, 75 when the fabric fails in between, 2 when it cannot be used at all; and 70 when a
wrong byte was taken for a right one. Without torch, so that it starts quickly.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from rwkvmpi.cluster.launcher import launch_facts
from rwkvmpi.cluster.mpi import guard, world
from rwkvmpi.errors import UserError
from rwkvmpi.grid.mpi_transport import MpiTransport
from rwkvmpi.grid.transport import Receiver, Room, Sender, Terms, Transport

EXIT_WRONG = 70
MOST_IN_BURST = 12  # of one round, far more than the burst channel has slots
BURST = 3


class Channel(NamedTuple):
    """What both ranks know of a channel, which goes both ways."""

    tag: int
    head: int
    share: float  # of the most bytes in a body
    depth: int


CHANNELS = [Channel(2, 128, 1.0, 2), Channel(16, 0, 0.5, 1), Channel(17, 64, 0.25, 1), Channel(5, 64, 0.0, 4)]
BURST_CHANNEL = Channel(BURST, 64, 0.1, 4)  # from rank 0 to rank 1


class WrongBytes(Exception):
    """What must never be: a parcel passed for the one that was due, and is not what was sent."""


class Content:
    """What the parcel number `count` of a channel holds, the same for its sender and its receiver."""

    def __init__(self, seed: int, sender: int, channel: Channel, most: int) -> None:
        self._key, self._room = (seed, sender, channel.tag), room(channel, most)

    def parcel(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(head, body): a third of the bodies is empty, a third full."""
        random = np.random.default_rng([*self._key, count])
        nbytes = random.choice([0, self._room.body, random.integers(self._room.body + 1)])
        return (
            random.integers(0, 256, self._room.head, dtype=np.uint8),
            random.integers(0, 256, int(nbytes), dtype=np.uint8),
        )


def room(channel: Channel, most: int) -> Room:
    """The room of its messages."""
    return Room(channel.head, int(most * channel.share))


class Rank:
    """One of the two ranks."""

    def __init__(self, transport: Transport, rank: int, seed: int, most: int, pause_s: float) -> None:
        self._rank, self._random, self._pause_s = rank, np.random.default_rng([seed, 77, rank]), pause_s
        self._bursts = np.random.default_rng([seed, 78])
        peer = 1 - rank
        self.out: list[tuple[Sender, Content]] = []
        self.into: list[tuple[Receiver, Content]] = []
        for channel in CHANNELS:
            label = f"channel {channel.tag}"
            self.out.append(
                (transport.sender(peer, channel.tag, room(channel, most), channel.depth, label),
                 Content(seed, rank, channel, most))
            )  # fmt: skip
            self.into.append(
                (transport.receiver(peer, channel.tag, room(channel, most), channel.depth, label),
                 Content(seed, peer, channel, most))
            )  # fmt: skip
        make: Any = transport.sender if rank == 0 else transport.receiver
        self._burst = make(peer, BURST, room(BURST_CHANNEL, most), BURST_CHANNEL.depth, "bursts")
        self._burst_content = Content(seed, 0, BURST_CHANNEL, most)
        self._burst_count = 0
        self.nbytes = 0
        self.messages = 0

    def round(self, number: int) -> None:
        """Send one parcel on every channel and take one from each, with a burst in between."""
        self._pause()
        for sender, content in self.out:
            self._send(sender, content, number)
        for _ in range(self._bursts.integers(MOST_IN_BURST + 1)):
            if self._rank == 0:
                self._send(self._burst, self._burst_content, self._burst_count)
            else:
                self._take(self._burst, self._burst_content, self._burst_count)
                self._pause()
            self._burst_count += 1
        for receiver, content in self.into:
            self._pause()
            self._take(receiver, content, number)

    def spoil(self, how: str) -> None:
        """Send the next burst's first message wrongly, and nothing more."""
        sender: Any = self._burst
        start = sender._start
        if how == "over":
            sender.buffer()
            for turn in range(BURST_CHANNEL.depth + 1):
                sender._slot_full[turn % BURST_CHANNEL.depth] = False
                self._send(sender, self._burst_content, self._burst_count + turn)
            return
        if how == "twice":
            sender._number -= 1
        elif how == "lost":
            sender._number += 1
        elif how == "foreign":
            sender._transport.terms.job += 1
        elif how == "byte":

            def flip(body_bytes: int) -> None:
                sender._parcel()[1][-1] ^= 1  # after the checksum was taken
                start(body_bytes)

            sender._start = flip
        self._send(sender, self._burst_content, self._burst_count)

    def take_burst(self) -> None:
        """Take what `spoil` has sent."""
        self._take(self._burst, self._burst_content, self._burst_count)

    def end(self) -> None:
        """All channels in good order."""
        for channel in self._all():
            if isinstance(channel, Sender):
                channel.flush()
        for channel in self._all():
            channel.close()

    def _all(self) -> Iterator[Any]:
        for channel, _ in [*self.out, *self.into]:
            yield channel
        yield self._burst

    def _send(self, sender: Sender, content: Content, count: int) -> None:
        head, body = content.parcel(count)
        buffer = sender.buffer()
        buffer.head[:] = head
        buffer.body[: len(body)] = body
        sender.send(count, len(body))

    def _take(self, receiver: Receiver, content: Content, count: int) -> None:
        head, body = content.parcel(count)
        parcel = receiver.wait(count)
        if not np.array_equal(parcel.head, head) or not np.array_equal(parcel.body, body):
            raise WrongBytes(f"WRONG BYTES in parcel {count} of {len(body)} bytes")
        receiver.release()
        self.nbytes += len(head) + len(body)
        self.messages += 1

    def _pause(self) -> None:
        if self._pause_s and self._random.random() < 0.2:
            time.sleep(self._random.random() * self._pause_s)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", choices=["mpi", "verbs"], default="mpi")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=30.0)
    parser.add_argument("--bytes", type=int, default=65536, help="of the largest body")
    parser.add_argument("--checksum", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--pause", type=float, default=2.0, help="ms, the longest")
    parser.add_argument("--pace", type=float, default=0.0, help="seconds between two rounds")
    parser.add_argument("--break", dest="spoil", choices=["byte", "twice", "lost", "foreign", "over"])
    return parser.parse_args()


def main() -> int:
    """Run, and say how it went."""
    options = arguments()
    comm = world()
    if comm is None or comm.size != 2:
        raise UserError("this program needs exactly two ranks: mpirun -n 2")
    started = time.monotonic()
    result: dict[str, Any] = {
        "rank": comm.rank, "pid": os.getpid(), "transport": options.transport, "rounds": 0, "bytes": 0, "outcome": "ok",
        "error": "",
    }  # fmt: skip
    terms = Terms(
        job=options.seed,
        deadline_s=options.deadline,
        summed=options.checksum == "on" or (options.checksum == "auto" and options.transport == "verbs"),
    )
    try:
        if options.transport == "verbs":
            from rwkvmpi.grid.verbs.transport import VerbsTransport

            transport: Transport = VerbsTransport(comm.Dup(), terms, launch_facts().local_rank)
        else:
            transport = MpiTransport(comm.Dup(), terms)
        terms.idle = transport.tick
        rank = Rank(transport, comm.rank, options.seed, options.bytes, options.pause / 1e3)
        transport.connect()
        ready = {"ready": transport.where(1 - comm.rank), "rank": comm.rank, "pid": os.getpid()}
        print(json.dumps(ready), file=sys.stderr, flush=True)
        for number in range(options.rounds):
            rank.round(number)
            transport.tick()
            time.sleep(options.pace)
            result |= {"rounds": number + 1, "bytes": rank.nbytes, "messages": rank.messages}
        if options.spoil:
            if comm.rank == 0:
                rank.spoil(options.spoil)
                transport.wait(lambda: False, 1, "the end")
            time.sleep(1 if options.spoil == "over" else 0)
            rank.take_burst()
        rank.end()
        transport.close()
    except Exception as error:
        result |= {"outcome": type(error).__name__, "error": str(error)}
        if isinstance(error, WrongBytes):
            print(json.dumps(result), flush=True)
            os._exit(EXIT_WRONG)
        raise
    finally:
        result["seconds"] = round(time.monotonic() - started, 3)
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    guard(main)
