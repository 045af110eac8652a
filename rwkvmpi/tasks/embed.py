"""embed: the mean of the output after ln_out over a document's tokens, or over every window of N tokens.

The sum runs in float64 over the tokens in their order, one after the other, and travels from chunk to chunk as
the task's carry: so the vector's bits do not depend on where chunks begin. Of a document that is handed on only the new
tokens count, and windows begin with the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rwkvmpi import ops
from rwkvmpi.corpus.stream import COUNT, DOC, ENDS, FLAGS, POSITION, ROW
from rwkvmpi.tasks.base import Recorder, Task


class EmbedTask(Task):
    """Carry: float64 [C] sum of the window so far, then one int64: how many tokens are in it."""

    name = "embed"

    def __init__(self, window: int, width: int) -> None:
        self.window = window
        self.width = width
        self.carry_bytes = 8 * width + 8

    def evaluate(self, stage: Any, x: Any, segments: np.ndarray, targets: np.ndarray, lasts: np.ndarray) -> Any:
        return stage.finish(x)

    def consume(
        self,
        segments: np.ndarray,
        targets: np.ndarray,
        lasts: np.ndarray,
        values: Any,
        carries: Sequence[np.ndarray],
        recorder: Recorder,
    ) -> np.ndarray:
        for segment, carry in zip(segments, carries, strict=True):
            after = self._consume_segment(segment, values, carry, recorder)
        return after

    def _consume_segment(self, segment: np.ndarray, hidden: Any, carry: np.ndarray, recorder: Recorder) -> np.ndarray:
        carry = carry.copy()
        total = torch.from_numpy(carry[: 8 * self.width].view(np.float64))
        counter = carry[8 * self.width :].view(np.int64)
        row, count, position = int(segment[ROW]), int(segment[COUNT]), int(segment[POSITION])
        if position == 0:  # the first row is the end-of-document token before the text: no token of the document
            row, count, position = row + 1, count - 1, 1
        token = position - 1
        while count:
            take = min(count, self.window - int(counter[0])) if self.window else count
            ops.fold_rows(total, hidden, row, take)
            counter[0] += take
            row, count, token = row + take, count - take, token + take
            if self.window and counter[0] == self.window:
                self._emit(segment, token, total, counter, recorder)
        ended = bool(segment[FLAGS] & ENDS)
        if ended and (counter[0] or not self.window):
            self._emit(segment, token, total, counter, recorder)
        return carry

    def _emit(
        self, segment: np.ndarray, end: int, total: torch.Tensor, counter: np.ndarray, recorder: Recorder
    ) -> None:
        """Record the window that ends before token `end` and start the next one. No tokens: a vector of zeros."""
        tokens = int(counter[0])
        vector = (total / max(tokens, 1)).to(torch.float32).numpy()
        first = end - tokens
        index = first // self.window if self.window else 0
        recorder.add_embedding(int(segment[DOC]), index, first, tokens, vector)
        total.zero_()
        counter[0] = 0
