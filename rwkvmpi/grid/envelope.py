"""The envelope: what every message between neighbours says of itself, and how the receiver makes sure of it.

    7 x int64: magic, job, channel, sequence, position, body bytes, sent | uint64: checksum

`sequence` counts the channel's messages, `position` is the number of the chunk that the message is for, `sent` the
sender's monotonic clock in nanoseconds. With the checksum (xxh3, 64 bits, over the other words, the head and the body)
goes a magic of its own, so that a message cannot pass as one that was sent without.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

ENVELOPE_BYTES = 64
_WORDS, _SUMMED_WORDS, _CHECKSUM = struct.Struct("<7qQ"), struct.Struct("<7q"), struct.Struct("<Q")
_PLAIN, _SUMMED = 0x52574B5633, 0x52574B5634  # "RWKV3", "RWKV4"


class Envelope(NamedTuple):
    """What an envelope says, checked or not."""

    magic: int
    job: int
    channel: int
    sequence: int
    position: int
    body_bytes: int
    sent_ns: int
    checksum: int


Words = tuple[int, int, int, int, int, int, int, int]  # an Envelope, or one without names, which is made faster


def seal(envelope: np.ndarray, expected: Words, rest: np.ndarray | None) -> None:
    """Write the words into `envelope` (uint8 [64]); `rest`: head and body in one, for the checksum, or None without."""
    memory = envelope.data
    _, job, channel, sequence, position, body_bytes, sent_ns, _ = expected
    if rest is None:
        _WORDS.pack_into(memory, 0, _PLAIN, job, channel, sequence, position, body_bytes, sent_ns, 0)
        return
    _SUMMED_WORDS.pack_into(memory, 0, _SUMMED, job, channel, sequence, position, body_bytes, sent_ns)
    _CHECKSUM.pack_into(memory, _SUMMED_WORDS.size, _sum(memory, rest))


def open_envelope(envelope: np.ndarray) -> Envelope:
    """The words of `envelope` (uint8 [64])."""
    return tuple.__new__(Envelope, _WORDS.unpack_from(envelope.data))  # as _make does, without its check of the number


def fault(
    words: Envelope, job: int, channel: int, sequence: int, position: int, most_bytes: int, summed: bool
) -> str | None:
    """What is wrong with a message where this one was due, in words that follow "it"; None if nothing is."""
    due = (_SUMMED if summed else _PLAIN, job, channel, sequence, position)
    if words[:5] == due and 0 <= words.body_bytes <= most_bytes:
        return None
    if words.magic not in (_PLAIN, _SUMMED):
        return "is none of this program's messages"
    if words.job != job:
        return "belongs to another job"
    if words.channel != channel:
        return f"belongs to channel {words.channel}, not {channel}"
    if words.sequence < sequence:
        return f"came twice or late: it is number {words.sequence}, and number {sequence} was due"
    if words.sequence > sequence:
        return f"came too early: number {sequence} was lost, it is number {words.sequence}"
    if words.position != position:
        return f"is for chunk {words.position}, and the one for chunk {position} was due"
    if not 0 <= words.body_bytes <= most_bytes:
        return f"claims {words.body_bytes} bytes where at most {most_bytes} can be"
    if summed and words.magic != _SUMMED:
        return "has no checksum, and it should have one"
    return None


def is_intact(envelope: np.ndarray, words: Envelope, rest: np.ndarray) -> bool:
    """Whether the checksum fits; `rest` is head and body, as they came. True for a message without one."""
    return words.magic == _PLAIN or words.checksum == _sum(envelope.data, rest)


def _sum(envelope: memoryview, rest: np.ndarray) -> int:
    return int(xxh3_64_intdigest(rest.data, xxh3_64_intdigest(envelope[: _SUMMED_WORDS.size])))
