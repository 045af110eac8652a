"""The face of a task, and the place where its results go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from rwkvmpi.errors import UserError


class Recorder(Protocol):
    """Where results go; store.shards.ShardWriter is the one of a run."""

    def add_tokens(self, doc: int, first_token: int, ids: np.ndarray, logprob: np.ndarray) -> None: ...

    def add_embedding(self, doc: int, window: int, first_token: int, ntokens: int, vector: np.ndarray) -> None: ...

    def add_state(self, doc: int, layer: int, wkv: np.ndarray, shift: np.ndarray) -> None: ...

    def add_output(self, doc: int, last: np.ndarray) -> None: ...


class Task:
    """One way of using a model on documents.

    `evaluate` and `consume` are called on the last stage for every chunk, in the order of the stream; between the two
    other chunks may be begun.
    `layer_done` is called on every stage after each layer. What a task must remember from one chunk of a document
    to the next it keeps in its carry, raw bytes that travel and are saved with the state: so the next chunk may be
    consumed on another rank, or in another job.
    """

    name = ""
    needs_head = False
    keeps_states = False
    carry_bytes = 0

    def first_carry(self) -> np.ndarray:
        """The carry at the start of a document, uint8 [carry_bytes]."""
        return np.zeros(self.carry_bytes, dtype=np.uint8)

    def evaluate(self, stage: Any, x: Any, segments: np.ndarray, targets: np.ndarray, lasts: np.ndarray) -> Any:
        """Last stage: what `consume` needs, a tensor on the stage's device, of the residual stream x [G, C].

        `segments` [D, 8] and `targets` int32 [G] (the next token, -1 none) as corpus.stream lays them; `lasts` float32
        [J, C]: for each segment that begins a document handed on, in their order, the output after ln_out of the last
        row that the earlier run read of it.
        """
        return x[:0]

    def consume(
        self,
        segments: np.ndarray,
        targets: np.ndarray,
        lasts: np.ndarray,
        values: Any,
        carries: Sequence[np.ndarray],
        recorder: Recorder,
    ) -> np.ndarray:
        """Use one chunk's `values`: what `evaluate` gave for the same arguments, in the host's memory.

        `carries`: of every segment the carry that it goes on with (fresh where it begins a document, or what is new of
        it). Returns the carry that goes on with the last segment.
        """
        return carries[-1]

    def layer_done(self, layer: int, segments: np.ndarray, state: Any, recorder: Recorder) -> None:
        """Use one layer's final states (models.state.LayerState of all segments; of one without rows, the state that
        was handed on)."""


def make_task(name: str, window: int, width: int) -> Task:
    """The task of this name. `window` tokens per embedding (0: whole documents), `width` C channels."""
    from rwkvmpi.tasks.embed import EmbedTask
    from rwkvmpi.tasks.read import ReadTask
    from rwkvmpi.tasks.score import ScoreTask

    if name == "score":
        return ScoreTask()
    if name == "embed":
        return EmbedTask(window, width)
    if name == "read":
        return ReadTask()
    raise UserError(f"task.name = {name!r}: the tasks are score, embed and read")
