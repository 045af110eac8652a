"""read: the final state of every document, layer by layer, for later questions; and the output after its last token,
which predicts the next one (its first, for an empty document)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rwkvmpi.corpus.stream import COUNT, DOC, ENDS, FAILED, FLAGS, HANDED_ON, ROW
from rwkvmpi.errors import NumericalError
from rwkvmpi.tasks.base import Recorder, Task


class ReadTask(Task):
    name = "read"
    keeps_states = True

    def evaluate(self, stage: Any, x: Any, segments: np.ndarray, targets: np.ndarray, lasts: np.ndarray) -> Any:
        read = segments[_complete(segments) & (segments[:, COUNT] > 0)]
        if not len(read):
            return x[:0]
        return stage.finish(x[stage.device.upload(torch.from_numpy(read[:, ROW] + read[:, COUNT] - 1))])

    def consume(
        self,
        segments: np.ndarray,
        targets: np.ndarray,
        lasts: np.ndarray,
        values: Any,
        carries: Sequence[np.ndarray],
        recorder: Recorder,
    ) -> np.ndarray:
        found, handed = iter(values.numpy()), iter(lasts)
        for segment, complete in zip(segments, _complete(segments), strict=True):
            before = next(handed) if segment[FLAGS] & HANDED_ON else None
            if complete:
                last = next(found) if segment[COUNT] else before
                if last is None or not np.isfinite(last).all():
                    raise NumericalError(f"document {segment[DOC]}: the output after its last token is not finite")
                recorder.add_output(int(segment[DOC]), last)
        return carries[-1]

    def layer_done(self, layer: int, segments: np.ndarray, state: Any, recorder: Recorder) -> None:
        for index, segment in enumerate(segments):
            if _complete(segment):
                recorder.add_state(int(segment[DOC]), layer, *state.arrays(index))


def _complete(segments: np.ndarray) -> Any:
    """Which of the segments [..., 8] end a document that did not break off."""
    return segments[..., FLAGS] & (ENDS | FAILED) == ENDS
