"""score: the log-probability of every token given all before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rwkvmpi.corpus.stream import COUNT, DOC, FLAGS, HANDED_ON, JOIN, NO_TARGET, POSITION, ROW
from rwkvmpi.errors import NumericalError
from rwkvmpi.tasks.base import Recorder, Task

ROWS = 32  # the head is given so many rows at a time, as everywhere


class ScoreTask(Task):
    """The first new token of a document that is handed on was predicted by the last row of the run before: the head
    is given that row's output once more."""

    name = "score"
    needs_head = True

    def evaluate(self, stage: Any, x: Any, segments: np.ndarray, targets: np.ndarray, lasts: np.ndarray) -> Any:
        found = stage.logprobs(stage.finish(x, stage.dtype), torch.from_numpy(targets))
        if not len(lasts):
            return found
        rows = np.zeros((-(-len(lasts) // ROWS) * ROWS, lasts.shape[1]), np.float32)
        rows[: len(lasts)] = lasts
        joins = np.full(len(rows), NO_TARGET, np.int32)
        joins[: len(lasts)] = segments[(segments[:, FLAGS] & HANDED_ON) != 0, JOIN]
        output = stage.device.upload(torch.from_numpy(rows)).to(stage.dtype)
        return torch.cat([found, stage.logprobs(output, torch.from_numpy(joins))])

    def consume(
        self,
        segments: np.ndarray,
        targets: np.ndarray,
        lasts: np.ndarray,
        values: Any,
        carries: Sequence[np.ndarray],
        recorder: Recorder,
    ) -> np.ndarray:
        logprobs, joins = values.numpy(), len(targets)
        for segment in segments:
            doc, row, count = int(segment[DOC]), int(segment[ROW]), int(segment[COUNT])
            if segment[FLAGS] & HANDED_ON:
                if count:
                    first = segment[JOIN : JOIN + 1].astype(np.int32)
                    self._record(doc, 0, first, logprobs[joins : joins + 1], recorder)
                joins += 1
            wanted = targets[row : row + count]
            scored = int(np.count_nonzero(wanted >= 0))  # a document's last position predicts nothing
            if scored:
                found = logprobs[row : row + scored]
                self._record(doc, int(segment[POSITION]), wanted[:scored], found, recorder)
        return carries[-1]

    def _record(self, doc: int, first: int, ids: np.ndarray, found: np.ndarray, recorder: Recorder) -> None:
        if not np.isfinite(found).all():
            token = first + int(np.flatnonzero(~np.isfinite(found))[0])
            raise NumericalError(f"document {doc}: the log-probability of token {token} is not finite")
        recorder.add_tokens(doc, first, ids, found)
