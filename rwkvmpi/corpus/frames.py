"""How events cross the pipe from the feeder's child process to its parent."""

from __future__ import annotations

import struct
from typing import BinaryIO

import numpy as np

from rwkvmpi.corpus.events import Begin, Block, End, Event, Failed

# kind, document, two numbers of the event, bytes that follow
_HEADER = struct.Struct("<BqqqI")
_BEGIN, _BLOCK, _END, _FAILED = range(1, 5)


def write_event(pipe: BinaryIO, event: Event) -> None:
    """Write one event and flush it."""
    payload = b""
    match event:
        case Begin(doc, position, handed_on):
            header = (_BEGIN, doc, position, int(handed_on))
        case Block(doc, byte_start, first_token, tokens):
            header = (_BLOCK, doc, byte_start, first_token)
            payload = tokens.astype("<i4", copy=False).tobytes()
        case End(doc, nbytes, ntokens, sha256):
            header = (_END, doc, nbytes, ntokens)
            payload = sha256
        case Failed(doc, error):
            header = (_FAILED, doc, 0, 0)
            payload = error.encode("utf-8", "backslashreplace")
    pipe.write(_HEADER.pack(*header, len(payload)) + payload)
    pipe.flush()


def read_event(pipe: BinaryIO) -> tuple[Event, int] | None:
    """(the next event, the bytes it takes in memory), or None where the pipe ends, be it inside an event."""
    head = pipe.read(_HEADER.size)
    if len(head) < _HEADER.size:
        return None
    kind, doc, first, second, length = _HEADER.unpack(head)
    payload = pipe.read(length) if length else b""
    if len(payload) < length:
        return None
    event: Event
    if kind == _BEGIN:
        event = Begin(doc, first, bool(second))
    elif kind == _BLOCK:
        event = Block(doc, first, second, np.frombuffer(payload, dtype="<i4"))
    elif kind == _END:
        event = End(doc, first, second, payload)
    elif kind == _FAILED:
        event = Failed(doc, payload.decode("utf-8"))
    else:
        raise ValueError(f"unknown kind of event {kind}")
    return event, _HEADER.size + length + 200  # the objects themselves
