"""A wavefront of one rank: every document in a chunk goes on with its own states and its own carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkvmpi.corpus.events import Begin, Block, End, Event
from rwkvmpi.corpus.stream import COUNT, chunks_of
from rwkvmpi.grid.frame import Frame, Word
from rwkvmpi.grid.relay import Relay
from rwkvmpi.grid.transport import Room
from rwkvmpi.grid.wavefront import Wavefront
from rwkvmpi.models.checkpoint import open_checkpoint
from rwkvmpi.models.model import Stage
from rwkvmpi.tasks.base import Recorder, Task

ROWS, LAYERS, WIDTH, WKV = 256, 4, 64, (2, 32, 32)


class Frames:
    """The chunks of some events, then the end of the stream."""

    def __init__(self, events: list[Event]) -> None:
        self.waited_s = 0.0
        self._chunks = list(chunks_of(events, ROWS))

    def next(self, index: int) -> Frame:
        frame = Frame(ROWS)
        if index < len(self._chunks):
            frame.put_chunk(self._chunks[index])
        else:
            frame.begin(index)
            frame.header[Word.END], frame.header[Word.CHUNKS] = 1, len(self._chunks)
        return frame

    def release(self) -> None: ...

    def close(self) -> None: ...


class Saved:
    """Something different for every document and layer; the task's recorder too."""

    recorder: Any = None

    def load_state(self, doc: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        value = np.float32(0.01 * doc + 0.001 * layer)
        return np.full(WKV, value), np.full((2, WIDTH), value)

    def load_carry(self, doc: int) -> np.ndarray:
        return np.full(8, doc, np.uint8)

    def load_last(self, doc: int) -> np.ndarray:
        return np.full(WIDTH, doc, np.float32)


class Witness(Task):
    """Keeps what it is given: the carry of every segment, outputs handed on, the states of segments without rows."""

    carry_bytes = 8

    def __init__(self) -> None:
        self.carries: list[int] = []
        self.lasts: list[int] = []
        self.unchanged: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def consume(
        self,
        segments: np.ndarray,
        targets: np.ndarray,
        lasts: np.ndarray,
        values: Any,
        carries: Sequence[np.ndarray],
        recorder: Recorder,
    ) -> np.ndarray:
        self.carries += [int(carry[0]) for carry in carries]
        self.lasts += [int(last[0]) for last in lasts]
        return carries[-1]

    def layer_done(self, layer: int, segments: np.ndarray, state: Any, recorder: Recorder) -> None:
        for index in np.flatnonzero(segments[:, COUNT] == 0).tolist():
            found = tuple(part.copy() for part in state.arrays(index))
            self.unchanged.setdefault(index, []).append(found)  # type: ignore[arg-type]


def events(doc: int, length: int, position: int = 0, handed_on: bool = False) -> list[Event]:
    tokens = np.arange(length, dtype=np.int32) % 256
    blocks = [Block(doc, 0, 0, tokens)] if length else []
    return [Begin(doc, position, handed_on), *blocks, End(doc, length, length)]


def test_every_document_goes_on_with_its_own_state_and_carry(small_model: Callable[[str], Path]) -> None:
    stream = [
        *events(1, 50, position=32),
        *events(2, 70, position=64),
        *events(3, 5),
        *events(4, 0, position=1, handed_on=True),
        *events(5, 20, position=1, handed_on=True),
        *events(6, 300, position=33, handed_on=True),  # an earlier start of this run has begun with what is new of it
    ]
    task, saved = Witness(), Saved()
    with open_checkpoint(small_model("7")) as checkpoint:
        stage = Stage(checkpoint, 0, LAYERS)
    rooms = [Room(0, 4 * (int(np.prod(WKV)) + 2 * WIDTH))] * LAYERS + [Room(0, task.carry_bytes)]
    relay = Relay(rooms, [""] * len(rooms))
    ledger: Any = saved
    wavefront = Wavefront(
        stage, task, Frames(stream), relay, None, ledger, saved, saved,
        slot=0, ring=1, chunk_size=ROWS, poll=lambda: None, name_of=str,
    )  # fmt: skip
    wavefront.run()
    assert wavefront.counters.documents == 6
    assert task.carries == [1, 2, 0, 0, 0, 6, 6]  # the last document goes on in a second chunk
    assert task.lasts == [4, 5]
    (states,) = task.unchanged.values()
    for layer, found in enumerate(states):
        for part, wanted in zip(found, saved.load_state(4, layer), strict=True):
            assert np.array_equal(part, wanted)
