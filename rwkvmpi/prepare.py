"""Everything that rank 0 finds out and decides before a token is read: is the job sound, is it new, where does it
go on, and on which grid."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from rwkvmpi import __version__
from rwkvmpi.cluster import gpu
from rwkvmpi.cluster.logs import LOGGER
from rwkvmpi.config import AUTO_CHUNK, Job, explain, parse_shard
from rwkvmpi.corpus.index import CorpusIndex, DocumentRef, order
from rwkvmpi.corpus.part import CorpusPart, find_documents
from rwkvmpi.corpus.tokenizers import load_tokenizer
from rwkvmpi.errors import UserError
from rwkvmpi.grid.figures import Choice, choose_chunk, load_machine
from rwkvmpi.grid.layout import Grid, check_grid
from rwkvmpi.grid.plan import choose_grid, work_of
from rwkvmpi.grid.queue import DocumentQueue
from rwkvmpi.models import cost
from rwkvmpi.models.checkpoint import open_checkpoint
from rwkvmpi.models.schema import ModelShape
from rwkvmpi.store.commits import load_last_commit, remove_unlisted
from rwkvmpi.store.files import write_durably
from rwkvmpi.store.handoff import Handoff, take_over
from rwkvmpi.store.identity import check_identity, clear, identity_path, read_identity, sha256_of, write_identity
from rwkvmpi.store.ledger import Ledger
from rwkvmpi.store.progress import Progress
from rwkvmpi.store.run_folder import RunFolder

BYTES_PER_TOKEN = {"bytes": 1.0}  # for estimates only; text in any other vocabulary has about four bytes a token
NAMES_SENT = 100_000  # documents up to which every rank knows the ids, for its messages


@dataclass
class Examined:
    """A job that was found sound: its model's shape, its documents, and what decides its results."""

    job: Job
    shape: ModelShape
    index: CorpusIndex | CorpusPart
    tokenizer: str
    identity: dict[str, Any]
    handed: Handoff | None = None

    @property
    def nbytes(self) -> np.ndarray:
        """int64 [documents]: the bytes that are to be read of each."""
        nbytes = self.index.nbytes
        return nbytes if self.handed is None else self.handed.bytes_left(nbytes)


@dataclass
class Preparation:
    """What rank 0 knows when a run begins. `share` is the part that every rank needs, as plain values."""

    run: RunFolder
    job: Job
    index: CorpusIndex | CorpusPart
    shape: ModelShape
    grid: Grid
    identity: dict[str, Any]
    attempt: int
    progress: Progress | None
    queue: DocumentQueue
    ledger: Ledger
    bytes_per_token: float
    nbytes: np.ndarray  # int64 [documents]: to be read of each
    handed: Handoff | None = None

    def reference(self, doc: int) -> DocumentRef:
        """What a source needs to read a document."""
        ref: DocumentRef = self.index[doc]
        return ref if self.handed is None else self.handed.reference(ref)

    def share(self) -> dict[str, Any]:
        saved = self.progress.saved.to_json() if self.progress is not None and self.progress.in_flight else None
        few = len(self.index) <= NAMES_SENT
        return {
            "job": self.job.model_dump(),
            "grid": [self.grid.stages, self.grid.ring, self.grid.replicas],
            "attempt": self.attempt,
            "saved": saved,
            "handed": self.handed.share() if self.handed is not None else None,
            "names": [self.index.id(doc) for doc in range(len(self.index))] if few else None,
        }


@dataclass
class Finished:
    """There is nothing to do: the run is complete."""

    documents: int
    failed: int


def examine(job: Job, folder: Path, threads: int, force: bool) -> Examined:
    """Check the model, the tokenizer and the input. UserError for everything a user can mend; nothing is written."""
    with open_checkpoint(job.model.path) as checkpoint:
        shape, model_sha256 = checkpoint.shape, checkpoint.sha256()
    resolve(job)
    if job.model.chunk == AUTO_CHUNK:
        resolve_chunk(job, shape, None if force else folder, threads)
    tokenizer = load_tokenizer(job.model.tokenizer, shape.vocab_size)
    index = find_documents(job.input.paths, job.input.text_key, job.input.id_key, *parse_shard(job.input.shard))
    part = index if isinstance(index, CorpusPart) else None
    if part is not None:
        logging.getLogger(LOGGER).info("%s", part.summary())
    identity: dict[str, Any] = {
        "task": job.task.name,
        "window": job.task.window,
        "model": model_sha256,
        "tokenizer": [tokenizer.name, tokenizer.sha256],
        "chunk": job.model.chunk,
        "device": job.model.device,
        "dtype": job.model.dtype,
        "text_key": job.input.text_key,
        "id_key": job.input.id_key,
        "input": [list(entry) for entry in index.fingerprint()],
        "shard": [part.number, part.parts] if part is not None else None,
        "documents": [part.first, part.stop, len(part.whole)] if part is not None else None,
    }
    handed = go_on_from(job, shape, index, identity, folder) if job.input.from_run else None
    identity["from"] = handed.content_sha256 if handed is not None else None
    return Examined(job, shape, index, tokenizer.name, identity, handed)


def go_on_from(
    job: Job, shape: ModelShape, index: CorpusIndex | CorpusPart, identity: dict[str, Any], folder: Path
) -> Handoff:
    """Check the run of --from, and find the documents that go on from it. UserError when it cannot be used."""
    from rwkvmpi.models.state import wkv_shape  # brings torch along

    handed = take_over(
        job.input.from_run,
        folder,
        model_sha256=identity["model"],
        tokenizer=" ".join(identity["tokenizer"]),
        settings={"device": job.model.device, "dtype": job.model.dtype},
        state_shape=(shape.n_layer, *wkv_shape(shape)),
        shift_shape=(shape.n_layer, 2, shape.n_embd),
        count=len(index),
        id_of=index.id,
    )
    logging.getLogger(LOGGER).info("%s", handed.summary(everything=not isinstance(index, CorpusPart)))
    return handed


def prepare(
    examined: Examined, folder: Path, world: int, threads: int, memory_per_rank: float, force: bool
) -> Preparation | Finished:
    """Take the run folder, find the last commit, choose the grid. What an earlier job left is touched only with
    `force`, and only by the holder of the lock."""
    job, index, identity = examined.job, examined.index, examined.identity
    run = RunFolder(folder)
    run.create()
    run.lock.acquire()
    try:
        if force:
            clear(run)
        else:
            check_identity(run, identity)
            if run.finished:
                summary = json.loads(run.success.read_text())
                run.remove_parts()  # a kill may have come between SUCCESS and this
                run.lock.release()
                return Finished(int(summary["documents"]), int(summary["failed"]))
        attempt = run.next_attempt()
        run.remove_stop()
        commit = load_last_commit(run, discard_bad=True)
        remove_unlisted(run)
        progress = Progress(run, commit) if commit is not None else None
        grid = choose(examined, progress, world, threads, memory_per_rank)
        write_identity(run, identity)
        job.grid.stages, job.grid.ring, job.grid.replicas = grid.stages, grid.ring, grid.replicas
        job.run.threads = threads
        write_durably(run.job_toml, job.to_toml().encode())
    except UserError:
        run.lock.release()
        raise
    ledger = Ledger(run, attempt, sha256_of(identity), len(index), progress)
    nbytes = examined.nbytes
    queue = _queue(nbytes, progress, grid.replicas)
    per_token = BYTES_PER_TOKEN.get(examined.tokenizer, 4.0)
    start = run, job, index, examined.shape, grid, identity, attempt, progress
    return Preparation(*start, queue, ledger, per_token, nbytes, examined.handed)


def show_plan(examined: Examined, folder: Path, world: int, threads: int, memory_per_rank: float, force: bool) -> None:
    """--dry-run: the resolved job and what it would read, on stdout; nothing is taken or written."""
    job, run = examined.job, RunFolder(folder)
    if run.exists and not force:
        check_identity(run, examined.identity)
    grid = choose(examined, None, world, threads, memory_per_rank)
    job.grid.stages, job.grid.ring, job.grid.replicas = grid.stages, grid.ring, grid.replicas
    job.run.threads = threads
    nbytes = int(examined.nbytes.sum())
    print(job.to_toml(), end="")
    print(f"# {len(examined.index):,} documents of about {nbytes:,} bytes; nothing was read or written", flush=True)


def resolve(job: Job) -> None:
    """Put what `auto` stands for in its place: the results depend on it, so the job says it."""
    if job.model.device == "auto":
        job.model.device = "cuda" if gpu.usable() else "cpu"
    elif job.model.device == "cuda":
        gpu.require()
    if job.model.dtype == "auto":
        job.model.dtype = "float32" if job.model.device == "cpu" else "bfloat16"
    if why := cost.refusal(job.model.device, job.model.dtype):
        raise UserError(why)


def resolve_chunk(job: Job, shape: ModelShape, folder: Path | None, threads: int) -> None:
    """Put the chunk that --chunk auto stands for in its place: that of the run begun in `folder`, whatever was measured
    since; else the one that was fastest here. Says so, with the reason."""
    run = RunFolder(folder) if folder is not None else None
    begun = read_identity(run) if run is not None else None
    if begun is not None and isinstance(begun.get("chunk"), int):
        choice = Choice(begun["chunk"], "as this run was begun")
    else:
        choice = choose_chunk(job.model.device, job.model.dtype, threads, shape.version, shape.n_embd)
    try:
        job.model.chunk = choice.chunk
    except ValidationError as error:
        raise explain(error, str(run and identity_path(run))) from None
    logging.getLogger(LOGGER).info("--chunk auto is %s: %s", f"{choice.chunk:,}", choice.reason)


def provenance(argv: list[str], library: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Where results come from; kept beside them, not part of their identity."""
    import h5py
    import torch

    versions = {"rwkvmpi": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {"numpy": np.__version__, "h5py": h5py.__version__}
    return {"argv": argv, "versions": versions, "mpi": library, "platform": platform.platform(), "ranks": ranks}


def _queue(nbytes: np.ndarray, progress: Progress | None, takers: int) -> DocumentQueue:
    done = progress.done if progress is not None else np.zeros(0, np.int64)
    begun = [entry.doc for entry in progress.in_flight] if progress is not None else []
    return DocumentQueue(order(nbytes), nbytes, done, begun, takers)


def choose(examined: Examined, progress: Progress | None, world: int, threads: int, memory_per_rank: float) -> Grid:
    """The grid asked for, or the fastest for what is left to read."""
    job, shape, index = examined.job, examined.shape, examined.index
    left = np.ones(len(index), dtype=bool)
    if progress is not None:
        left[progress.done] = False
    tokens = (examined.nbytes[left] / BYTES_PER_TOKEN.get(examined.tokenizer, 4.0)).astype(np.int64)
    work = work_of(shape, cost.ITEMSIZE[job.model.dtype], job.model.chunk, tokens, job.task.name == "score")
    grid = choose_grid(
        work,
        world,
        load_machine(job.model.device, job.model.dtype, threads, job.grid.transport),
        stages=job.grid.stages,
        ring=job.grid.ring,
        replicas=job.grid.replicas,
        memory_per_rank=memory_per_rank,
    )
    check_grid(grid, world, shape.n_layer)
    return grid
