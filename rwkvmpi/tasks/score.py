"""score: the log-probability of every token given all before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rwkvmpi.corpus.stream import COUNT, DOC, POSITION, ROW
from rwkvmpi.errors import NumericalError
from rwkvmpi.tasks.base import Recorder, Task


class ScoreTask(Task):
    name = "score"
    needs_head = True

    def evaluate(self, stage: Any, x: Any, targets: np.ndarray) -> Any:
        return stage.logprobs(stage.finish(x, stage.dtype), torch.from_numpy(targets))

    def consume(
        self, segments: np.ndarray, targets: np.ndarray, values: Any, carry: np.ndarray, recorder: Recorder
    ) -> np.ndarray:
        logprobs = values.numpy()
        for segment in segments:
            row, count = int(segment[ROW]), int(segment[COUNT])
            wanted = targets[row : row + count]
            scored = count - 1 if wanted[-1] < 0 else count  # a document's last position predicts nothing
            if scored:
                found = logprobs[row : row + scored]
                if not np.isfinite(found).all():
                    token = int(segment[POSITION]) + int(np.flatnonzero(~np.isfinite(found))[0])
                    raise NumericalError(f"document {segment[DOC]}: the log-probability of token {token} is not finite")
                recorder.add_tokens(int(segment[DOC]), int(segment[POSITION]), wanted[:scored], found)
        return carry
