"""The loop: every rank reads its chunks through its layers, and hands on what its neighbours need.

A task (layer l, chunk c) needs the activations of (l-1, c) and the state of (l, c-1). Rank (p, s) owns the layers of
stage p and the chunks c with c mod S = s. Nothing here knows MPI: frames come from a supply, states from a relay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from rwkvmpi.corpus.stream import CONTINUES, COUNT, DOC, ENDS, FLAGS, POSITION, RESUMES
from rwkvmpi.errors import NumericalError
from rwkvmpi.grid.frame import Frame
from rwkvmpi.grid.relay import Relay
from rwkvmpi.grid.transport import Sender
from rwkvmpi.models.model import Stage
from rwkvmpi.tasks.base import Task


class Supply(Protocol):
    """Where a rank's frames come from: the stage above, the replica's source, or itself."""

    waited_s: float

    def next(self, index: int) -> Frame:
        """The frame of chunk `index`, or the one that ends the stream there; valid until `release`."""

    def release(self) -> None:
        """The frame handed out last is done with."""

    def close(self) -> None:
        """No more frames will be asked for."""


class Ledger(Protocol):
    """Where results and states go, and where commits are closed."""

    recorder: Any

    def close_results(self, commit: int) -> None:
        """Everything recorded so far belongs to commit `commit`; what comes next does not."""

    def keep_state(self, doc: int, position: int, layer: int, state: Any) -> None:
        """The state with which `doc` enters `position` at `layer`, for the commit just closed."""

    def keep_carry(self, doc: int, position: int, carry: np.ndarray) -> None: ...

    def close_states(self, commit: int) -> None:
        """All states of commit `commit` were kept."""


class Saved(Protocol):
    """States kept by an earlier job, for documents that go on."""

    def load_state(self, doc: int, layer: int) -> tuple[np.ndarray, np.ndarray]: ...

    def load_carry(self, doc: int) -> np.ndarray: ...


@dataclass
class Counters:
    """What a rank did; `busy_s` is time spent in layers, head and task."""

    chunks: int = 0
    tokens: int = 0
    documents: int = 0
    busy_s: float = 0.0
    begun: float = 0.0  # when the first frame came, or the second: what lies before is start-up and warm-up
    warm_up_tokens: int = 0  # tokens read before that
    reading_s: float = 0.0


class Wavefront:
    """One rank's part of the wavefront."""

    def __init__(
        self,
        stage: Stage,
        task: Task,
        supply: Supply,
        relay: Relay,
        below: Sender | None,
        ledger: Ledger,
        saved: Saved | None,
        *,
        slot: int,
        ring: int,
        chunk_size: int,
        poll: Callable[[], None],
        name_of: Callable[[int], str],
    ) -> None:
        self._stage, self._task, self._supply, self._relay = stage, task, supply, relay
        self._below, self._ledger, self._saved = below, ledger, saved
        self._slot, self._ring, self._chunk_size = slot, ring, chunk_size
        self._poll, self._name_of = poll, name_of
        self._commit = 0
        self._frames_below: dict[int, Frame] = {}
        self.counters = Counters()

    @torch.inference_mode()
    def run(self) -> None:
        """Read until the stream ends."""
        index = self._slot
        while True:
            self._poll()
            frame = self._supply.next(index)
            frame.check(index)
            if self.counters.chunks <= 1 and not frame.ends_stream:
                self.counters.begun, self.counters.warm_up_tokens = time.perf_counter(), self.counters.tokens
            cut = frame.cut if frame.commit != self._commit else None
            if frame.commit != self._commit:
                self._commit = frame.commit
                self._ledger.close_results(self._commit)
                if cut is None:
                    self._ledger.close_states(self._commit)
            if frame.ends_stream:
                self._end(frame, cut)
                self.counters.reading_s = time.perf_counter() - self.counters.begun
                return
            self._read(frame, cut)
            self._supply.release()
            index += self._ring

    def _read(self, frame: Frame, cut: tuple[int, int] | None) -> None:
        """One chunk through this rank's layers."""
        begun, waited = time.perf_counter(), self._waits()
        stage, segments = self._stage, frame.segments
        rows = torch.from_numpy(np.ascontiguousarray(segments[:, :2], dtype=np.int32))
        if stage.first:
            x, v_first = stage.embed(torch.from_numpy(frame.tokens)), None
        else:
            x = torch.from_numpy(frame.x)
            v_first = None if frame.v_first is None else torch.from_numpy(frame.v_first)
        for item, layer in enumerate(stage.layers):
            state = stage.initial_state(item, len(segments))
            self._enter(frame, item, state)
            if cut is not None:
                self._ledger.keep_state(*cut, stage.lo + item, state)
            x, v_first = layer.forward(x, v_first, state, rows)
            self._check(state, frame, stage.lo + item)
            self._leave(frame, item, state)
            self._task.layer_done(stage.lo + item, segments, state, self._ledger.recorder)
            self._poll()
        if stage.last:
            self._consume(frame, x, cut)
        else:
            self._send_below(frame, x, v_first)
        if cut is not None:
            self._ledger.close_states(self._commit)
        self.counters.chunks += 1
        self.counters.busy_s += time.perf_counter() - begun - (self._waits() - waited)

    def _enter(self, frame: Frame, item: int, state: Any) -> None:
        """Put the state with which the first segment goes on into `state`; the others begin afresh."""
        first = frame.segments[0]
        if frame.index > 0:
            arrived = self._relay.arrive(frame.index, item)
            if first[FLAGS] & CONTINUES:
                if arrived is None:
                    raise RuntimeError(f"chunk {frame.index} goes on with a document, but no state of it arrived")
                state.unpack_from(arrived, 0)
            self._relay.taken(item)
        for segment_index, segment in enumerate(frame.segments):
            if segment[FLAGS] & RESUMES:
                if self._saved is None:
                    raise RuntimeError(f"document {segment[DOC]} goes on, but this run has no saved states")
                wkv, shift = self._saved.load_state(int(segment[DOC]), self._stage.lo + item)
                state.wkv[segment_index] = torch.from_numpy(wkv)
                state.shift[segment_index] = torch.from_numpy(shift)

    def _leave(self, frame: Frame, item: int, state: Any) -> None:
        """Hand the last segment's state to the next chunk, if its document goes on there."""
        last = len(frame.segments) - 1
        nbytes = 0 if frame.segments[last][FLAGS] & ENDS else state.nbytes_per_segment
        if nbytes:
            state.pack_into(self._relay.outbox(item, nbytes), last)
        self._relay.leave(frame.index, item, nbytes)

    def _consume(self, frame: Frame, x: torch.Tensor, cut: tuple[int, int] | None) -> None:
        """The last stage: the task uses the hidden vectors; its carry is relayed like a layer's state."""
        item, segments, task = len(self._stage.layers), frame.segments, self._task
        carry = task.first_carry()
        if frame.index > 0:
            arrived = self._relay.arrive(frame.index, item)
            if segments[0][FLAGS] & CONTINUES and arrived is not None:
                carry = arrived.copy()
            self._relay.taken(item)
        if segments[0][FLAGS] & RESUMES and task.carry_bytes and self._saved is not None:
            carry = self._saved.load_carry(int(segments[0][DOC]))
        if cut is not None and task.carry_bytes:
            self._ledger.keep_carry(*cut, carry)
        hidden = self._stage.finish(x)
        carry = task.consume(self._stage, segments, frame.targets, hidden, carry, self._ledger.recorder)
        nbytes = 0 if segments[-1][FLAGS] & ENDS else task.carry_bytes
        if nbytes:
            self._relay.outbox(item, nbytes)[:] = carry
        self._relay.leave(frame.index, item, nbytes)
        self.counters.tokens += int(np.count_nonzero(frame.targets >= 0))
        self.counters.documents += int(np.count_nonzero(segments[:, FLAGS] & ENDS))

    def _send_below(self, frame: Frame, x: torch.Tensor, v_first: torch.Tensor | None) -> None:
        out = self._frame_below()
        out.copy_head(frame)
        torch.from_numpy(out.x).copy_(x)
        if out.v_first is not None and v_first is not None:
            torch.from_numpy(out.v_first).copy_(v_first)
        assert self._below is not None
        self._below.send(out.buffer.nbytes)

    def _frame_below(self) -> Frame:
        """The frame over the next free send buffer (each buffer keeps its frame)."""
        assert self._below is not None
        buffer = self._below.buffer()
        frame = self._frames_below.get(buffer.ctypes.data)
        if frame is None:
            frame = Frame(self._chunk_size, self._stage.shape.n_embd, self._stage.passes_v_first, buffer)
            self._frames_below[buffer.ctypes.data] = frame
        return frame

    def _end(self, frame: Frame, cut: tuple[int, int] | None) -> None:
        """The stream ends before chunk `frame.index`: keep what the commit needs, tell the stage below, close."""
        if frame.follows_last:
            for item in range(self._relay.items):
                arrived = self._relay.arrive(frame.index, item)
                if cut is not None:
                    self._keep(cut, item, arrived)
                self._relay.taken(item)
        if cut is not None:
            self._ledger.close_states(self._commit)
        if self._below is not None:
            out = self._frame_below()
            out.copy_head(frame)
            self._below.send(out.head_bytes)
            self._below.flush()
        self._supply.release()
        self._supply.close()
        self._relay.close()

    def _keep(self, cut: tuple[int, int], item: int, arrived: np.ndarray | None) -> None:
        """Keep one item of the document that crosses the end of a stopped stream."""
        if item == len(self._stage.layers):
            if arrived is not None and self._task.carry_bytes:
                self._ledger.keep_carry(*cut, arrived)
            return
        if arrived is None:
            raise RuntimeError(f"document {cut[0]} crosses the end of the stream, but no state of it arrived")
        state = self._stage.initial_state(item, 1)
        state.unpack_from(arrived, 0)
        self._ledger.keep_state(*cut, self._stage.lo + item, state)

    def _check(self, state: Any, frame: Frame, layer: int) -> None:
        """Nothing that is not a number may travel on or be kept."""
        if self._stage.is_finite(state.wkv, state.shift):
            return
        for index, segment in enumerate(frame.segments):
            if not self._stage.is_finite(state.wkv[index], state.shift[index]):
                first = int(segment[POSITION])
                name = self._name_of(int(segment[DOC]))
                raise NumericalError(
                    f"NaN or Inf in the state of layer {layer} for {name}, chunk {frame.index} (tokens {first} to "
                    f"{first + int(segment[COUNT])}); nothing after the last commit was kept. Look at the model with "
                    "`rwkvmpi inspect MODEL --check`, or try --dtype float32"
                )

    def _waits(self) -> float:
        return self._relay.waited_s + (self._below.waited_s if self._below is not None else 0.0)

    @property
    def waits(self) -> dict[str, float]:
        """Seconds waited for: frames from above, states from the left and sends to complete."""
        return {
            "activations or tokens": self._supply.waited_s,
            "states": self._relay.waited_s,
            "sends below": self._below.waited_s if self._below is not None else 0.0,
        }
