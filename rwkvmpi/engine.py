"""One rank's machinery: built from what rank 0 prepared, run once."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import platform
import resource
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rwkvmpi import telemetry
from rwkvmpi.cluster import logs, pinning, shared_weights
from rwkvmpi.cluster.launcher import launch_facts
from rwkvmpi.cluster.signals import StopRequest
from rwkvmpi.config import Job, parse_commit_every
from rwkvmpi.corpus.feeder import Feeder
from rwkvmpi.errors import FabricError, UserError
from rwkvmpi.grid.activity import WRITER, Activity
from rwkvmpi.grid.choose import choose_transport
from rwkvmpi.grid.control import COORDINATOR, Control
from rwkvmpi.grid.coordinator import Coordinator
from rwkvmpi.grid.layout import Grid, split_layers
from rwkvmpi.grid.ledger import RankLedger
from rwkvmpi.grid.pulse import compare_clocks
from rwkvmpi.grid.source import CommitClock, Source
from rwkvmpi.grid.transport import Terms, Transport
from rwkvmpi.grid.wavefront import Wavefront
from rwkvmpi.grid.wiring import relay_on_ring, sender_below, slot_senders, supply_from_neighbour
from rwkvmpi.models import cost
from rwkvmpi.models.checkpoint import open_checkpoint
from rwkvmpi.models.device import open_device
from rwkvmpi.models.model import Stage
from rwkvmpi.models.weight_store import WeightStore
from rwkvmpi.ops import library
from rwkvmpi.prepare import Preparation
from rwkvmpi.progress_report import ProgressReport
from rwkvmpi.store.handoff import HandedStates
from rwkvmpi.store.progress import SavedStates
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.shards import ShardWriter
from rwkvmpi.tasks import make_task
from rwkvmpi.telemetry.trace import TraceRecorder

PROGRESS_EVERY_S = 1.0
M_ARENA_MAX = -8  # mallopt's number for it in glibc's malloc.h


@dataclass
class Outcome:
    """How the reading ended, as rank 0 knows it."""

    stop_reason: str = ""
    tokens: int = 0  # read after the first chunks, which warm everything up
    seconds: float = 0.0  # that it took
    commits: int = 0
    farewells: dict[int, dict[str, Any]] = field(default_factory=dict)


class Engine:
    """Builds stage, task, channels, source and ledger of one rank. `preparation` is rank 0's, None elsewhere."""

    def __init__(self, comm: Any, folder: Path, shared: dict[str, Any], preparation: Preparation | None) -> None:
        share_one_heap()
        self._comm = comm
        self._rank = comm.rank if comm is not None else 0
        self._job = job = Job.model_validate(shared["job"])
        self._grid = grid = Grid(*shared["grid"])
        self._names = shared["names"]
        self._attempt = shared["attempt"]
        self._preparation = preparation
        self._stop = StopRequest(folder if self._rank == 0 else None, job.run.max_time).install()
        self._stop_told = False
        torch.set_num_threads(job.run.threads)
        self._pinned = pinning.settle(comm, job.run.threads)
        self._device = open_device(job.model.device, launch_facts().local_rank)
        self._check_processors()
        place = grid.place(self._rank)
        self._recorder = self._make_recorder(folder) if job.run.trace else None
        self._activity = Activity(self._recorder)
        with open_checkpoint(job.model.path) as checkpoint:
            shape = checkpoint.shape
            self._task = task = make_task(job.task.name, job.task.window, shape.n_embd)
            head_cost = cost.head_cost(shape) if task.needs_head else 0.0
            bounds = split_layers(shape.n_layer, grid.stages, cost.layer_cost(shape), head_cost)
            layers = bounds[place.stage]
            self._stage = stage = self._load(
                lambda store: Stage(checkpoint, *layers, job.model.dtype, self._device, store), place.stage
            )
        self._flops_per_token = cost.layer_cost(shape) * len(stage.layers) + (head_cost if stage.last else 0.0)

        self._control = control = Control(comm)
        self._transport = transport = self._make_transport(folder) if comm is not None else None
        self._coordinator = self._make_coordinator(folder, preparation) if preparation is not None else None
        self._source = (
            self._make_source(transport, shape.vocab_size, folder) if place.stage == place.slot == 0 else None
        )
        self._writer = ShardWriter(RunFolder(folder).shards, self._attempt, self._rank)
        self._writer.on_written = lambda begun, ended, nbytes: self._activity.record(
            WRITER, "writes a shard", begun, ended, nbytes
        )
        self._ledger = RankLedger(self._writer, control, place.replica, self._source)
        if self._source is not None:
            supply: Any = self._source
        else:
            assert transport is not None
            supply = supply_from_neighbour(grid, self._rank, transport, job.model.chunk, stage)
        self._wavefront = Wavefront(
            stage,
            task,
            supply,
            relay_on_ring(grid, self._rank, transport, cost.state_bytes(shape), task.carry_bytes, stage),
            sender_below(grid, self._rank, transport, job.model.chunk, stage),
            self._ledger,
            SavedStates.from_json(shared["saved"]) if shared["saved"] is not None else None,
            HandedStates.from_share(shared["handed"]) if shared["handed"] is not None else None,
            slot=place.slot,
            ring=grid.ring,
            chunk_size=job.model.chunk,
            poll=control.poll,
            name_of=self._name_of,
            activity=self._activity,
        )
        self._told_at = 0.0
        self._folder = folder
        self._report: ProgressReport | None = None
        control.on_poll += [self._wavefront.serve, self._tick]
        if transport is not None:
            transport.connect()
            logging.getLogger(logs.LOGGER).info("transport: %s", "; ".join(filter(None, [self._why, transport.way])))
            control.on_poll.append(transport.tick)

    def run(self) -> Outcome | None:
        """Read everything, or until somebody asks to stop. Returns the Outcome on rank 0, None elsewhere."""
        with (
            self._progress_bar(),
            self._pinned,
            self._device.explaining(),
            contextlib.closing(
                telemetry.begin(self._comm, self._folder, self._facts, self._job.run.telemetry, self._attempt)
            ),
        ):
            self._activity.phase = "reading"
            self._wavefront.run()
            self._activity.phase = "closing"
            self._farewell()
            if self._coordinator is not None:
                while not self._coordinator.all_gone:
                    self._control.poll()
                    time.sleep(1e-4)
            if self._transport is not None:
                self._transport.close()
            self._activity.phase = "done"
        self._control.flush()
        self._stop.restore()
        if self._coordinator is not None:
            self._coordinator.save_now()
        if self._recorder is not None:
            self._recorder.close()
        if self._coordinator is None:
            return None
        tokens, _ = self._coordinator.progress
        return Outcome(
            self._coordinator.stop_reason,
            tokens - sum(farewell["warm_up_tokens"] for farewell in self._coordinator.farewells.values()),
            max(farewell["reading_s"] for farewell in self._coordinator.farewells.values()),
            self._coordinator.commits,
            self._coordinator.farewells,
        )

    def _load(self, make: Callable[[WeightStore | None], Stage], part: int) -> Stage:
        """The stage; on a CPU its weights are shared with the node's ranks that hold the same `part`."""
        if self._device.kind == "cpu":
            return shared_weights.build(self._comm, part, make)
        with self._device.explaining():
            return make(None)

    def _make_transport(self, folder: Path) -> Transport:
        """The way to the neighbours."""
        job, comm = self._job, self._comm.Dup()
        number = comm.bcast(secrets.randbits(62) if self._rank == 0 else None)
        terms = Terms(number, self._control.poll, self._device.pin, job.grid.deadline, activity=self._activity)
        transport, self._why = choose_transport(
            comm, self._grid, job.grid.transport, job.grid.checksum, self._device, terms, folder
        )
        return transport

    def _make_recorder(self, folder: Path) -> TraceRecorder:
        """The trace of this rank, with its clock against rank 0's. Collective."""
        clock, wall = 0, time.time_ns() - time.monotonic_ns()
        if self._comm is not None:
            wall = self._comm.bcast(wall)
            peers = list(range(1, self._comm.size)) if self._rank == 0 else [0]
            try:
                clock = compare_clocks(self._comm, peers, self._job.grid.deadline).get(0, 0)
            except TimeoutError as error:
                raise FabricError(f"rank {error.args[0]} did not tell its clock in time for --trace") from None
        about = {**asdict(self._grid.place(self._rank)), "host": platform.node()}
        return TraceRecorder(folder, self._attempt, self._rank, about, clock, wall)

    def _check_processors(self) -> None:
        """Ranks that round differently would break the promise that the layout does not show in the bits."""
        if self._comm is None:
            return
        found = self._comm.allgather((library.current(), self._device.model, platform.node()))
        if len({device for _, device, _ in found}) > 1:
            kinds = ", ".join(f"{device} on {node}" for device, node in sorted({(d, n) for _, d, n in found}))
            raise UserError(
                f"the ranks compute on different kinds of GPUs ({kinds}), whose results differ in the last bits; start "
                "the job on nodes of one kind"
            )
        builds = sorted({(build, node) for build, _, node in found})
        if self._device.kind == "cpu" and len({build for build, _ in builds}) > 1:
            shown = ", ".join(f"{build} on {node}" for build, node in builds)
            slowest = min((build for build, _ in builds), key=library.VARIANTS.index)
            raise UserError(
                f"the ranks' processors run different builds of the operators ({shown}), whose results differ in the "
                f"last bits; start the job on nodes of one kind, or with RWKVMPI_ISA={slowest} in its environment"
            )

    def _farewell(self) -> None:
        """Wait until the own shards are safe and reported, then tell the coordinator what this rank has done."""
        while not self._ledger.settled:
            self._control.poll()
            time.sleep(1e-4)
        self._writer.close()
        self._tell_progress()
        counters = self._wavefront.counters
        waits = dict(self._wavefront.waits)
        waits["writing"] = self._writer.waited_s
        self._control.send(
            COORDINATOR,
            "farewell",
            host=platform.node(),
            threads=torch.get_num_threads(),
            device=self._device.name if self._device.at_once else f"{self._device.name} {self._device.model}",
            # Calls return early on a GPU: there, what is not waiting is work.
            busy_s=counters.busy_s if self._device.at_once else counters.reading_s - sum(waits.values()),
            reading_s=counters.reading_s,
            warm_up_tokens=counters.warm_up_tokens,
            tokens=counters.chunks * self._job.model.chunk,
            flops=counters.chunks * self._job.model.chunk * self._flops_per_token,
            waits=waits,
            hops=asdict(self._wavefront.hops),
            hops_s=self._wavefront.hops.total_s,
            device_bytes=self._device.peak_bytes(),
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )

    def _make_coordinator(self, folder: Path, preparation: Preparation) -> Coordinator:
        begun = preparation.progress.in_flight if preparation.progress is not None else []
        logger = logs.setup(folder, self._rank, self._grid.size)

        def on_failed(doc: int, error: str) -> None:
            logger.warning("document %s failed: %s", self._name_of(doc), error)

        return Coordinator(
            self._control,
            self._grid,
            preparation.queue,
            preparation.ledger,
            {entry.doc: entry for entry in begun},
            reference=lambda doc: asdict(preparation.reference(doc)),
            on_failed=on_failed,
            stop_on_error=self._job.run.on_error == "stop",
            activity=self._activity,
        )

    def _make_source(self, transport: Transport | None, vocab_size: int, folder: Path) -> Source:
        job = self._job
        return Source(
            Feeder(job.model.tokenizer, vocab_size, text_key=job.input.text_key, digests=self._task.keeps_states),
            self._control,
            slot_senders(self._grid, self._rank, transport, job.model.chunk),
            replica=self._grid.place(self._rank).replica,
            chunk_size=job.model.chunk,
            clock=CommitClock(*parse_commit_every(job.run.commit_every)),
            stop_on_error=job.run.on_error == "stop",
            activity=self._activity,
        )

    def _tick(self) -> None:
        """What every rank does whenever it polls."""
        self._ledger.poll()
        if not self._stop_told and self._stop.reason is not None:
            self._stop_told = True
            self._control.send(COORDINATOR, "stop-wanted", reason=self._stop.reason)
        now = time.monotonic()
        if now - self._told_at >= PROGRESS_EVERY_S:
            self._told_at = now
            self._tell_progress()
            if self._recorder is not None:
                self._recorder.flush()
        if self._coordinator is not None:
            self._coordinator.tick()

    def _tell_progress(self) -> None:
        if self._stage.last:
            counters = self._wavefront.counters
            self._control.send(COORDINATOR, "progress", tokens=counters.tokens, documents=counters.documents)

    def _progress_bar(self) -> Any:
        if self._coordinator is None or self._preparation is None:
            return contextlib.nullcontext()
        self._report = ProgressReport(self._preparation, self._coordinator)
        self._control.on_poll.append(self._report.tick)
        return self._report

    def _facts(self) -> dict[str, Any]:
        """What telemetry shows of this rank; called in a thread of its own, so nothing here may wait or compute."""
        activity, counters = self._activity, self._wavefront.counters
        waiting, waits = activity.waiting, self._wavefront.waits
        reading_s = counters.reading_s or (time.perf_counter() - counters.begun if counters.begun else 0.0)
        facts: dict[str, Any] = {
            **asdict(self._grid.place(self._rank)),
            "attempt": self._attempt,
            "phase": activity.phase,
            "chunk": activity.chunk,
            "chunks": counters.chunks,
            "tokens": counters.tokens if self._stage.last else counters.chunks * self._job.model.chunk,
            "busy_s": counters.busy_s if self._device.at_once else reading_s - sum(waits.values()),
            "reading_s": reading_s,
            "waits": waits,
            "neighbours": {str(rank): seconds for rank, seconds in activity.waited_s.copy().items()},
            "waiting": None,
            "device_bytes": self._device.peak_bytes(),
            "commit": activity.commit,
        }
        if waiting is not None:
            since = (time.monotonic_ns() - waiting.since_ns) / 1e9
            facts["waiting"] = {"rank": waiting.rank, "what": waiting.what, "since_s": since}
        if self._report is not None:
            facts["job"] = self._report.facts()
        return facts

    def _name_of(self, doc: int) -> str:
        return f"document {self._names[doc]!r}" if self._names is not None else f"document number {doc}"


def share_one_heap() -> None:
    """Let all threads allocate from one heap. glibc gives every thread its own, and what the thread that writes shards
    frees in its heap would stay there: a rank's memory would creep up by tens of megabytes in a long run."""
    with contextlib.suppress(AttributeError, OSError):  # another C library, which has no such heaps
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
