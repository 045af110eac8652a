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

from rwkvmpi.corpus.stream import CONTINUES, COUNT, DOC, ENDS, FLAGS, HANDED_ON, POSITION, RESUMES
from rwkvmpi.errors import NumericalError
from rwkvmpi.grid.activity import MAIN, Activity
from rwkvmpi.grid.frame import Frame
from rwkvmpi.grid.pending import Pending
from rwkvmpi.grid.relay import Relay
from rwkvmpi.grid.transport import Hops, Sender
from rwkvmpi.models.chunk_reader import make_reader
from rwkvmpi.models.device import OVER, Ticket
from rwkvmpi.models.model import Stage
from rwkvmpi.tasks.base import Task


class Supply(Protocol):
    """Where a rank's frames come from: the stage above, the replica's source, or itself."""

    waited_s: float
    hops: Hops

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


class Handed(Protocol):
    """States of an earlier run's documents, and the outputs after their last tokens, for documents handed on."""

    def load_state(self, doc: int, layer: int) -> tuple[np.ndarray, np.ndarray]: ...

    def load_last(self, doc: int) -> np.ndarray: ...


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
        handed: Handed | None,
        *,
        slot: int,
        ring: int,
        chunk_size: int,
        poll: Callable[[], None],
        name_of: Callable[[int], str],
        activity: Activity | None = None,
    ) -> None:
        self._stage, self._task, self._supply, self._relay = stage, task, supply, relay
        self._below, self._ledger, self._saved, self._handed = below, ledger, saved, handed
        self._slot, self._ring, self._chunk_size = slot, ring, chunk_size
        self._poll, self._name_of = poll, name_of
        self._reader = make_reader(stage, chunk_size)
        self._activity = activity or Activity()
        self._layer_names = [f"layer {stage.lo + item}" for item in range(len(stage.layers))]
        self._pending = Pending(self._activity)
        self._commit = 0
        self.counters = Counters()

    def serve(self) -> None:
        """Hand on what a GPU has finished in the meantime. To be called whenever this rank waits."""
        self._pending.serve()

    @torch.inference_mode()
    def run(self) -> None:
        """Read until the stream ends."""
        with self._stage.device.computing():
            self._run()

    def _run(self) -> None:
        index = self._slot
        while True:
            self._poll()
            frame = self._supply.next(index)
            frame.check(index)
            if self.counters.chunks <= 1 and not frame.ends_stream:
                self.counters.begun, self.counters.warm_up_tokens = time.perf_counter(), self.counters.tokens
            cut = frame.cut if frame.commit != self._commit else None
            if frame.commit != self._commit:
                self._pending.settle()  # what the commit is to hold
                self._commit = self._activity.commit = frame.commit
                self._ledger.close_results(self._commit)
                if cut is None:
                    self._ledger.close_states(self._commit)
            if frame.ends_stream:
                self._pending.settle()
                self._end(frame, cut)
                if self.counters.begun:  # else it never came to a chunk
                    self.counters.reading_s = time.perf_counter() - self.counters.begun
                return
            self._activity.chunk = index
            begun = time.monotonic_ns()
            self._read(frame, cut)
            self._activity.record(MAIN, "chunk", begun, time.monotonic_ns(), index)
            index += self._ring

    def _read(self, frame: Frame, cut: tuple[int, int] | None) -> None:
        """One chunk through this rank's layers."""
        begun, waited = time.perf_counter(), self._waits()
        stage, reader, pending = self._stage, self._reader, self._pending
        segments = frame.segments.copy()  # the frame goes back before a GPU has done everything
        rows = np.ascontiguousarray(segments[:, :2], dtype=np.int32)
        still = rows[:, 1] == 0  # documents handed on to which nothing was added: their states stay what they were
        rows[still, 1] = 1  # operators want a row of every segment, and theirs is padding
        index, targets = frame.index, frame.targets.copy()
        if stage.first:
            lent = reader.begin_tokens(frame.tokens, rows)
        else:
            lent = reader.begin_activations(frame.body, rows)
        for item in range(len(stage.layers)):
            state = reader.state(item, len(segments))
            self._enter(index, segments, item, state)
            if cut is not None:
                self._ledger.keep_state(*cut, stage.lo + item, state)
            reading = time.monotonic_ns()
            reader.read(item, state)
            for segment in np.flatnonzero(still).tolist():
                self._load(segments, segment, item, state)
            self._check(reader.look(item, state), index, segments, stage.lo + item)
            self._activity.record(MAIN, self._layer_names[item], reading, time.monotonic_ns(), index)
            self._leave(index, segments, item, state)
            self._task.layer_done(stage.lo + item, segments, state, self._ledger.recorder)
            self._poll()
        if stage.last:
            self._consume(index, segments, targets, cut)
        else:
            self._send_below(frame)
        if cut is not None:
            self._ledger.close_states(self._commit)
        ticket, broken = reader.verdict()

        def conclude() -> None:
            for item, segment in broken():
                self._check([segment], index, segments, stage.lo + item)
            self.counters.chunks += 1

        pending.add(ticket, conclude)
        lent.wait()
        self._supply.release()
        self.counters.busy_s += time.perf_counter() - begun - (self._waits() - waited)

    def _enter(self, index: int, segments: np.ndarray, item: int, state: Any) -> None:
        """Put the state with which the first segment goes on into `state`; the others begin afresh."""
        if index > 0:
            self._pending.settle_until(item)  # on a ring of one what is to arrive has to have left
            arrived = self._relay.arrive(index, item)
            taken: Ticket = OVER
            if segments[0][FLAGS] & CONTINUES:
                if arrived is None:
                    raise RuntimeError(f"chunk {index} goes on with a document, but no state of it arrived")
                taken = self._reader.enter(state, 0, arrived)
            self._pending.add(taken, lambda: self._relay.taken(item))
        for segment in np.flatnonzero(segments[:, FLAGS] & (RESUMES | HANDED_ON)).tolist():
            self._load(segments, segment, item, state)

    def _load(self, segments: np.ndarray, segment: int, item: int, state: Any) -> None:
        """Put the state that an earlier start of this run, or an earlier run, has saved into one segment's."""
        doc = int(segments[segment][DOC])
        saved = self._handed if segments[segment][FLAGS] & HANDED_ON else self._saved
        if saved is None:
            raise RuntimeError(f"document {doc} goes on, but this run has no saved states")
        wkv, shift = saved.load_state(doc, self._stage.lo + item)
        state.wkv[segment] = torch.from_numpy(wkv)
        state.shift[segment] = torch.from_numpy(shift)

    def _leave(self, index: int, segments: np.ndarray, item: int, state: Any) -> None:
        """Hand the last segment's state to the next chunk, if its document goes on there."""
        last = len(segments) - 1
        nbytes = 0 if segments[last][FLAGS] & ENDS else state.nbytes_per_segment
        gone = self._reader.leave(state, last, self._relay.outbox(item, nbytes)) if nbytes else OVER
        if not self._relay.on_ring:
            gone = OVER  # whoever reads it next reads it on the same device, in the order of the calls
        self._pending.add(gone, lambda: self._relay.leave(index, item, nbytes), item)

    def _consume(self, index: int, segments: np.ndarray, targets: np.ndarray, cut: tuple[int, int] | None) -> None:
        """The last stage: the task uses the hidden vectors; its carry is relayed like a layer's state."""
        item, task, stage = len(self._stage.layers), self._task, self._stage
        self._pending.settle_until(item)
        carries = [task.first_carry() for _ in segments]
        if index > 0:
            arrived = self._relay.arrive(index, item)
            if segments[0][FLAGS] & CONTINUES and arrived is not None:
                carries[0] = arrived.copy()
            self._relay.taken(item)
        if task.carry_bytes and self._saved is not None:
            for segment in np.flatnonzero(segments[:, FLAGS] & RESUMES).tolist():
                carries[segment] = self._saved.load_carry(int(segments[segment][DOC]))
        if cut is not None and task.carry_bytes:
            self._ledger.keep_carry(*cut, carries[0])
        lasts = self._lasts(segments)
        begun = time.monotonic_ns()
        values, arrived_here = stage.device.bring(task.evaluate(stage, self._reader.x, segments, targets, lasts))
        self._activity.record(MAIN, "head and task", begun, time.monotonic_ns(), index)

        def conclude() -> None:
            after = task.consume(segments, targets, lasts, values, carries, self._ledger.recorder)
            nbytes = 0 if segments[-1][FLAGS] & ENDS else task.carry_bytes
            if nbytes:
                self._relay.outbox(item, nbytes)[:] = after
            self._relay.leave(index, item, nbytes)
            self.counters.tokens += int(np.count_nonzero(targets >= 0))
            self.counters.documents += int(np.count_nonzero(segments[:, FLAGS] & ENDS))

        self._pending.add(arrived_here, conclude, item)

    def _lasts(self, segments: np.ndarray) -> np.ndarray:
        """float32 [J, C]: of the documents that are handed on here, the output after what the earlier run read."""
        docs = segments[(segments[:, FLAGS] & HANDED_ON) != 0, DOC].tolist()
        found = [self._handed.load_last(doc) for doc in docs] if self._handed is not None else []
        return np.stack(found) if found else np.zeros((0, self._stage.shape.n_embd), np.float32)

    def _send_below(self, frame: Frame) -> None:
        below, item = self._below, len(self._stage.layers)
        assert below is not None
        self._pending.settle_until(item)  # buffers are sent in turn
        out = Frame(self._chunk_size, below.buffer())
        out.copy_head(frame)
        gone = self._reader.send(out.body)
        index, nbytes = frame.index, len(out.body)
        self._pending.add(gone, lambda: below.send(index, nbytes), item)

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
            out = Frame(self._chunk_size, self._below.buffer())
            out.copy_head(frame)
            self._below.send(frame.index, 0)
            self._below.flush()
            self._below.close()
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

    def _check(self, broken: list[int] | None, index: int, segments: np.ndarray, layer: int) -> None:
        """Nothing that is not a number may be kept: NumericalError if `broken` names a segment."""
        for segment in broken or ():
            first, count = int(segments[segment][POSITION]), int(segments[segment][COUNT])
            name = self._name_of(int(segments[segment][DOC]))
            raise NumericalError(
                f"NaN or Inf in the state of layer {layer} for {name}, chunk {index} (tokens {first} to "
                f"{first + count}); nothing after the last commit was kept. Look at the model with "
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

    @property
    def hops(self) -> Hops:
        """What the messages to this rank cost."""
        total = Hops()
        total.add(self._supply.hops)
        total.add(self._relay.hops)
        return total
