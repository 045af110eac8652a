"""`rwkvmpi merge`: the results of all parts of a corpus as those of one run that read everything.

Parts are contiguous and in order, so the whole's datasets are theirs end to end; only two columns speak of other rows
and are shifted. Every part is compared with what it said of itself when it was done: its file before OUT is touched,
its values, which are hashed as they are copied, before the result gets its name.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from rwkvmpi import __version__
from rwkvmpi.config import Job, explain
from rwkvmpi.errors import UserError
from rwkvmpi.store.digest import STRING, DatasetDigest, combine, dtype_word
from rwkvmpi.store.files import read_json, remove_quietly, write_durably
from rwkvmpi.store.h5_output import H5Output
from rwkvmpi.store.identity import clear, difference, of_the_whole, read_identity, write_identity
from rwkvmpi.store.merge_parts import Layout, Source, choose_sources, layouts
from rwkvmpi.store.parts import find_runs
from rwkvmpi.store.results_file import FORMAT, FORMAT_VERSION, Results, printable
from rwkvmpi.store.run_folder import RunFolder

_BLOCK_BYTES = 4 << 20
_STRINGS = 8192
_PACKED = "tokens/id"
_STATES_NDIM = 4  # from here on datasets are chunked by document and layers, in the whole as in its parts


@dataclass(frozen=True)
class Merged:
    """What is in OUT now. anew: False when it held these very results already."""

    run: Path
    parts: int
    documents: int
    failed: int
    content_sha256: str
    anew: bool = True


def merge(
    paths: Sequence[str | Path], out: Path, force: bool = False, tell: Callable[[str], None] = lambda _: None
) -> Merged:
    """Write the results of all parts at `paths` (run folders, or folders that hold them) to the run folder `out`, in
    memory that does not grow with them. `tell` is told how far it is.

    `out` becomes a finished run with the content digest of a single job. Killed at any moment, the same call does it
    again. UserError, which names what is wrong and the way out, unless all parts of one corpus are there, finished and
    undamaged, and `out` is new or this very merge's. force: throw away what another job left in `out`.
    """
    run = RunFolder(out)
    sources = choose_sources(find_runs(paths, but=out), out)
    identity = of_the_whole(read_identity(sources[0].part.run) or {})
    if not force and (done := _found(run, identity, sources)):
        return done
    for number, source in enumerate(sources, 1):
        source.verify()
        tell(f"part {number} of {len(sources)} is what it was when it was written")
    whole = layouts(sources)
    job = _job_of(sources)
    run.create()
    run.lock.acquire()
    try:
        if force:
            clear(run)
            remove_quietly(run.path / "attempt")  # which tells a run that computes from one that was merged
        elif done := _found(run, identity, sources):  # somebody else may have been faster
            return done
        remove_quietly(run.success)  # whose results.h5 somebody has removed
        run.remove_orphans([])
        _check_room(run, sources)
        write_identity(run, identity)  # from here on `out` is this merge's, whenever it is killed
        write_durably(run.job_toml, job.to_toml().encode())
        digest = _write(run, identity, job, sources, whole, tell)
        documents, failed = whole["documents/id"].shape[0], sum(source.failed for source in sources)
        summary = {"documents": documents, "failed": failed, "content_sha256": digest}
        run.write_success({**summary, "parts": [source.summary() for source in sources]})
        return Merged(out, len(sources), documents, failed, digest)
    finally:
        run.lock.release()


def _found(run: RunFolder, identity: Mapping[str, Any], sources: Sequence[Source]) -> Merged | None:
    """What an earlier call did, if it did all; None if it was killed, or has never been. UserError for a run that is
    none of this merge's."""
    run.check_place()
    if not run.exists:
        return None
    way_out = "give another folder with -o, or --force to throw away what it holds"
    old = read_identity(run)
    if old is not None and (said := difference(old, identity, "and these parts with")):
        raise UserError(f"-o {run.path}: holds another run, which was started with {said}; {way_out}")
    if not run.finished:
        if (run.path / "attempt").exists() or run.commit_paths() or (old is None and run.results.exists()):
            raise UserError(f"-o {run.path}: holds a run that was not merged and is not finished; {way_out}")
        return None
    match read_json(run.success):
        case {"documents": int(documents), "failed": int(failed), "content_sha256": str(digest), "parts": [*parts]}:
            before = [part.get("content_sha256") for part in parts if isinstance(part, dict)]
            if before != [source.content_sha256 for source in sources]:
                raise UserError(f"-o {run.path}: was merged from other results of these parts; {way_out}")
            done = Merged(run.path, len(sources), documents, failed, digest, anew=False)
            return done if run.results.exists() else None
    raise UserError(f"-o {run.path}: holds a finished run that was not merged; {way_out}")


def _check_room(run: RunFolder, sources: Sequence[Source]) -> None:
    """Say before the work that the disk is too small, as far as the system tells (quotas show up while writing)."""
    needed = sum(source.path.stat().st_size for source in sources)
    free = shutil.disk_usage(run.path).free
    if needed > free:
        raise UserError(
            f"{run.path}: results.h5 needs about {needed:,} bytes, but {free:,} are free; "
            "free some space, then the same command writes it"
        )


def _write(
    run: RunFolder,
    identity: Mapping[str, Any],
    job: Job,
    sources: Sequence[Source],
    whole: Mapping[str, Layout],
    tell: Callable[[str], None],
) -> str:
    """Write results.h5; its content digest (hex)."""
    attributes = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "task": identity["task"],
        "model_sha256": identity["model"],
        "tokenizer": " ".join(map(str, identity["tokenizer"])),
    }
    with H5Output(run.results) as output:
        for path, layout in whole.items():
            dtype = str if dtype_word(layout.dtype) == STRING else layout.dtype
            chunks = layout.chunks if len(layout.shape) >= _STATES_NDIM else None
            output.create(path, layout.shape, dtype, chunks, pack=path == _PACKED)
        copy = _Copy(output, attributes)
        told = []
        for number, source in enumerate(sources, 1):
            with source.open() as results:
                copy.add(source, results)
                told.append(_provenance_of(source, results))
            tell(f"part {number} of {len(sources)} is copied")
        digest = output.digest(attributes)
        text = json.dumps(job.model_dump(), sort_keys=True, ensure_ascii=False)
        output.set_attributes(
            "/", **attributes, creator=f"rwkvmpi {__version__}", job=printable(text), content_sha256=digest
        )
        facts = {"parts": json.dumps(told), "versions": json.dumps(_versions()), "platform": platform.platform()}
        output.set_attributes("provenance", **{key: printable(fact) for key, fact in facts.items()})
        output.publish()
    return digest


class _Copy:
    """Appends parts to the whole, in their order."""

    def __init__(self, output: H5Output, attributes: Mapping[str, Any]) -> None:
        self._output, self._attributes = output, attributes
        self._rows: dict[str, int] = {}  # of each dataset, so far
        self._tokens = 0

    def add(self, source: Source, results: Results) -> None:
        """Copy all of a part. UserError unless what was read are the values that it was finished with."""
        # Where the part's own rows begin: of its documents, and of their tokens laid end to end.
        shifts = {"embeddings/document": self._rows.get("documents/id", 0), "documents/first_token": self._tokens}
        digests = {}
        for path, shape in results.shapes().items():
            digests[f"/{path}"] = self._copy(results, path, shape, shifts.get(path, 0))
        source.check_digest(combine(self._attributes, digests))

    def _copy(self, results: Results, path: str, shape: tuple[int, ...], shift: int) -> DatasetDigest:
        dtype, _ = results.layout(path)
        digest, start = DatasetDigest(dtype_word(dtype), shape), self._rows.get(path, 0)
        text = dtype_word(dtype) == STRING
        step = _STRINGS if text else max(1, _BLOCK_BYTES // max(dtype.itemsize * math.prod(shape[1:]), 1))
        for low in range(0, shape[0], step):
            values = results.read(path, low, min(low + step, shape[0]))
            if text:
                digest.update_strings(values)
                self._output.append(path, start + low, values.tolist())
                continue
            digest.update(values)
            if path == "documents/tokens":
                self._tokens += int(values.sum())
            self._output.append(path, start + low, values + shift if shift else values)
        self._rows[path] = start + shape[0]
        return digest


def _job_of(sources: Sequence[Source]) -> Job:
    """The job that would have read everything: the first part's, where parts differ in nothing that counts; of grid and
    run, which may differ, what all have in common, else the default."""
    jobs = []
    for source in sources:
        with source.open() as results:
            jobs.append(results.job)
    try:
        job = Job.model_validate(jobs[0])
        job.input.shard = ""
        for section in ("grid", "run"):
            own = getattr(job, section)
            for key, default in type(own)().model_dump().items():
                if any(other.get(section, {}).get(key) != jobs[0].get(section, {}).get(key) for other in jobs):
                    setattr(own, key, default)
    except ValidationError as error:
        raise explain(error, str(sources[0].path)) from None
    return job


def _provenance_of(source: Source, results: Results) -> dict[str, Any]:
    """Which part, and what wrote it; its ranks are told of in its own results.h5."""
    told: dict[str, Any] = {**source.summary(), "results_sha256": source.results_sha256, "creator": results.creator}
    return told | {key: fact for key, fact in results.provenance.items() if key in ("versions", "mpi", "platform")}


def _versions() -> dict[str, str]:
    import h5py

    return {
        "rwkvmpi": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
    }
