"""read: the final state of every document, layer by layer, for later questions."""

from __future__ import annotations

from typing import Any

import numpy as np

from rwkvmpi.corpus.stream import DOC, ENDS, FAILED, FLAGS
from rwkvmpi.tasks.base import Recorder, Task


class ReadTask(Task):
    name = "read"
    keeps_states = True

    def layer_done(self, layer: int, segments: np.ndarray, state: Any, recorder: Recorder) -> None:
        for index, segment in enumerate(segments):
            if segment[FLAGS] & ENDS and not segment[FLAGS] & FAILED:
                recorder.add_state(int(segment[DOC]), layer, *state.arrays(index))
