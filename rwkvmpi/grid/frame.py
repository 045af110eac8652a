"""The frame: one chunk as it travels down the stages, a message's head and body.

    head: header 16 x int64 | segments [G/32, 8] int64 | tokens [G] int32 | targets [G] int32
    body: x [G, C] | v_first [G, C]

The header carries what every rank must know to act alone and yet in step: the chunk's index, the number of the
latest commit and whether this chunk's incoming state is the one that the commit keeps, and the end of the stream.
The body may lie in a GPU's memory; nothing here looks into it.
x and v_first are float32 whatever the weights are: rounding them at a hop would make results depend on the layout.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from rwkvmpi.corpus.stream import Chunk
from rwkvmpi.grid.transport import Parcel, Room

MAGIC = 0x52574B5631  # "RWKV1"
HEADER_WORDS = 16
SEGMENT_WORDS = 8


class Word(IntEnum):
    """The words of a frame's header."""

    MAGIC = 0
    INDEX = 1
    SEGMENTS = 2
    COMMIT = 3  # number of the latest commit of this replica; a new number means: close what is finished
    CUT_INDEX = 4  # the chunk before which that commit cuts the stream
    CUT_DOCUMENT = 5  # the document that crosses the cut, or -1
    CUT_POSITION = 6  # its position there
    END = 7  # 1: no chunk, the stream ends here
    CHUNKS = 8  # with END: how many chunks there were


def frame_room(chunk_size: int, width: int = 0, with_v_first: bool = False) -> Room:
    """Of the frames between two stages (C = `width`), or from the source to a slot (no body)."""
    segments = chunk_size // 32
    head = 8 * HEADER_WORDS + 8 * SEGMENT_WORDS * segments + 2 * 4 * chunk_size
    return Room(head, chunk_size * width * 4 * (2 if with_v_first else 1), on_device=width > 0)


class Frame:
    """Views into a parcel's head, of the memory given or of its own; nothing is copied. `chunk_size` G rows."""

    def __init__(self, chunk_size: int, parcel: Parcel | None = None) -> None:
        segments = chunk_size // 32
        if parcel is None:
            parcel = Parcel(np.zeros(frame_room(chunk_size).head, dtype=np.uint8), np.zeros(0, dtype=np.uint8))
        self.head, self.body = parcel
        ends = np.cumsum([0, HEADER_WORDS * 8, segments * SEGMENT_WORDS * 8, chunk_size * 4, chunk_size * 4])
        part = [self.head[ends[i] : ends[i + 1]] for i in range(4)]
        self.header = part[0].view(np.int64)
        self._segments = part[1].view(np.int64).reshape(segments, SEGMENT_WORDS)
        self.tokens = part[2].view(np.int32)
        self.targets = part[3].view(np.int32)

    def begin(self, index: int) -> None:
        """Make this the frame of chunk `index`, with an empty header."""
        self.header[:] = 0
        self.header[Word.MAGIC], self.header[Word.INDEX] = MAGIC, index

    def put_chunk(self, chunk: Chunk) -> None:
        """Fill in a chunk's tokens, targets and segments."""
        self.begin(chunk.index)
        self.header[Word.SEGMENTS] = len(chunk.segments)
        self._segments[: len(chunk.segments)] = chunk.segments
        self.tokens[:] = chunk.tokens
        self.targets[:] = chunk.targets

    def copy_head(self, other: Frame) -> None:
        """Take everything but the activations from `other`."""
        self.head[:] = other.head

    def check(self, expected_index: int) -> None:
        """RuntimeError when this is not the frame that must come now: a wrong message never becomes a wrong result."""
        if self.header[Word.MAGIC] != MAGIC or self.index != expected_index:
            raise RuntimeError(f"frame {self.index} arrived where frame {expected_index} was due")

    @property
    def index(self) -> int:
        return int(self.header[Word.INDEX])

    @property
    def commit(self) -> int:
        return int(self.header[Word.COMMIT])

    @property
    def ends_stream(self) -> bool:
        return bool(self.header[Word.END])

    @property
    def follows_last(self) -> bool:
        """With END: this is where the next chunk would have been, so the last chunk's states come here."""
        return self.index > 0 and int(self.header[Word.CHUNKS]) == self.index

    @property
    def segments(self) -> np.ndarray:
        """[D, 8] int64; columns as corpus.stream names them."""
        return self._segments[: int(self.header[Word.SEGMENTS])]

    @property
    def cut(self) -> tuple[int, int] | None:
        """(document, position) whose incoming state the commit keeps, when the cut lies before this very frame."""
        if self.header[Word.CUT_INDEX] != self.index or self.header[Word.CUT_DOCUMENT] < 0:
            return None
        return int(self.header[Word.CUT_DOCUMENT]), int(self.header[Word.CUT_POSITION])
