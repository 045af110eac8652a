"""Commits: points from which a run can go on. One JSON file each, complete in itself, written last.

A commit stays small although it lists every shard: results lie in shards of full size (see shard_builder), names are
four numbers, and shards are grouped by the rank that wrote them. A job of a billion tokens has some 2,000 shards and
commits of some 200 KB.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rwkvmpi.errors import UserError
from rwkvmpi.store.files import dump_json, read_json, remove_quietly, sha256_file, write_durably
from rwkvmpi.store.run_folder import SHARD_NAME, RunFolder
from rwkvmpi.store.shard_file import Kind, ShardRef

FORMAT = "rwkvmpi-commit"
FORMAT_VERSION = 1
KEPT = 2
_HASHING_THREADS = 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InFlight:
    """A document that goes on: its states enter `position` (a multiple of 32); tokens before it have their results.

    byte_start, tokens_before: the block boundary (corpus.events.TokenCursor) from which tokenising goes on.
    """

    doc: int
    position: int
    byte_start: int
    tokens_before: int


@dataclass(frozen=True, slots=True)
class ReplicaCommit:
    """Where one replica stands: the number of its own last cut, and the document that crosses it."""

    replica: int
    cut: int
    in_flight: InFlight | None = None


@dataclass(frozen=True)
class Commit:
    """Everything that counts at one moment. It refers to no other commit.

    shards: all that count, of all attempts. waiting: documents in flight at an earlier attempt's end that no replica
    has taken up yet (their state shards are among `shards`). restarted: document -> attempt; what earlier attempts
    wrote about that document does not count, because it is read from its start again. extra: the lead's own facts.
    """

    number: int
    attempt: int
    job_sha256: str
    documents_total: int
    shards: tuple[ShardRef, ...] = ()
    replicas: tuple[ReplicaCommit, ...] = ()
    waiting: tuple[InFlight, ...] = ()
    restarted: Mapping[int, int] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def in_flight(self) -> list[InFlight]:
        """All documents that go on, by document."""
        found = [replica.in_flight for replica in self.replicas if replica.in_flight is not None]
        return sorted([*found, *self.waiting], key=lambda entry: entry.doc)

    @property
    def documents_done(self) -> int:
        """Finished documents, those that failed included."""
        return sum(ref.documents for ref in self.shards)

    @property
    def documents_failed(self) -> int:
        return sum(ref.failed for ref in self.shards)

    @property
    def tokens_done(self) -> int:
        """Tokens of finished documents, and those of documents in flight that were read already."""
        return sum(ref.tokens for ref in self.shards) + sum(entry.position for entry in self.in_flight)

    def to_bytes(self) -> bytes:
        """The commit's file: JSON; its key sha256 holds the SHA-256 of the JSON of everything else."""
        groups: dict[tuple[int, int], list[list[Any]]] = {}
        for ref in self.shards:
            stem = ref.name.removesuffix(".h5").split("-", 2)[2]
            row = [stem, ref.nbytes, ref.sha256, ref.documents, ref.failed, ref.tokens]
            groups.setdefault(ref.writer, []).append(row)
        value = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "number": self.number,
            "attempt": self.attempt,
            "job_sha256": self.job_sha256,
            "documents_total": self.documents_total,
            "shards": [{"attempt": a, "rank": r, "list": rows} for (a, r), rows in sorted(groups.items())],
            "replicas": [asdict(replica) for replica in self.replicas],
            "waiting": [asdict(entry) for entry in self.waiting],
            "restarted": [[doc, attempt] for doc, attempt in sorted(self.restarted.items())],
            "extra": dict(self.extra),
        }
        return dump_json({**value, "sha256": _self_hash(value)})

    @classmethod
    def read(cls, path: Path) -> Commit:
        """The commit in a file. ValueError when it is damaged or of another format."""
        value = read_json(path)
        if value is None or value.get("format") != FORMAT:
            raise ValueError("it is damaged or no commit")
        if value.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"it has format version {value.get('format_version')!r} instead of {FORMAT_VERSION}")
        if value.pop("sha256", None) != _self_hash(value):
            raise ValueError("it does not agree with its own checksum")
        try:
            return cls(
                number=value["number"],
                attempt=value["attempt"],
                job_sha256=value["job_sha256"],
                documents_total=value["documents_total"],
                shards=tuple(_refs(value["shards"])),
                replicas=tuple(
                    ReplicaCommit(entry["replica"], entry["cut"], _in_flight(entry["in_flight"]))
                    for entry in value["replicas"]
                ),
                waiting=tuple(InFlight(**entry) for entry in value["waiting"]),
                restarted=dict(value["restarted"]),
                extra=value["extra"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is incomplete ({error!r})") from error


def write_commit(run: RunFolder, commit: Commit) -> Path:
    """Write a commit durably, then remove all but it and the newest good one before it, with the shards that only the
    removed ones listed. Every shard that it lists must be on disk already. UserError when the disk is full."""
    path = run.commits / f"{commit.number:06d}.json"
    write_durably(path, commit.to_bytes())
    kept: list[Commit] = [commit]
    doomed: list[Commit] = []
    for other in run.commit_paths():
        if other == path:
            continue
        try:
            parsed = Commit.read(other)
        except ValueError:
            remove_quietly(other)
            continue
        (kept if len(kept) < KEPT and parsed.number < commit.number else doomed).append(parsed)
    needed = {ref.name for keeper in kept for ref in keeper.shards}
    for old in doomed:
        remove_quietly(run.commits / f"{old.number:06d}.json")
    for name in {ref.name for old in doomed for ref in old.shards} - needed:
        remove_quietly(run.shards / name)
    return path


def load_last_commit(run: RunFolder, discard_bad: bool = False) -> Commit | None:
    """The newest commit whose own checksum and whose shards' SHA-256 all hold; None when there is no commit.

    A bad newest one is passed over with a warning on this module's logger (and removed with `discard_bad`, for the
    holder of the lock: going on from the one before makes it worthless). UserError when all are bad.
    """
    complaints = []
    for path in run.commit_paths():
        try:
            commit = Commit.read(path)
        except ValueError as error:
            complaints.append(f"{path.name}: {error}")
        else:
            faults = verify_shards(run.shards, commit.shards)
            if not faults:
                for complaint in complaints:
                    _log.warning("%s: passed over commit %s; going on from %s", run.path, complaint, path.name)
                if discard_bad:
                    for bad in run.commit_paths():
                        if int(bad.stem) > commit.number:
                            remove_quietly(bad)
                return commit
            complaints.append(f"{path.name}: {faults[0]}")
    if complaints:
        raise UserError(
            f"{run.path}: no commit can be used ({'; '.join(complaints)}); "
            "restore the folder from a copy, or start again in a new one"
        )
    return None


def verify_shards(folder: Path, refs: Iterable[ShardRef]) -> list[str]:
    """What is wrong with the listed shards, a sentence each: missing, of another size, or of another SHA-256.

    Files are read in blocks, a few at a time (hashing leaves Python's lock), so memory does not grow with them.
    """
    with ThreadPoolExecutor(max_workers=_HASHING_THREADS) as pool:
        found = pool.map(lambda ref: _fault(folder / ref.name, ref), list(refs))
        return [fault for fault in found if fault is not None]


def remove_unlisted(run: RunFolder) -> list[str]:
    """Remove shards that no kept commit lists, and temp files; their names. For the lock's holder, before it starts."""
    listed: set[str] = set()
    for path in run.commit_paths():
        try:
            listed |= {ref.name for ref in Commit.read(path).shards}
        except ValueError:
            continue
    return run.remove_orphans(listed)


def _fault(path: Path, ref: ShardRef) -> str | None:
    try:
        size = path.stat().st_size
        if size != ref.nbytes:
            return f"{path.name} has {size:,} bytes instead of {ref.nbytes:,}"
        return None if sha256_file(path) == ref.sha256 else f"{path.name} is damaged (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def _self_hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(dump_json(dict(value))).hexdigest()


def _refs(groups: Iterable[Mapping[str, Any]]) -> Iterable[ShardRef]:
    for group in groups:
        for stem, nbytes, sha256, documents, failed, tokens in group["list"]:
            name = f"{group['attempt']:04d}-{group['rank']:05d}-{stem}.h5"
            if not SHARD_NAME.fullmatch(name):
                raise ValueError(f"it lists a shard with the impossible name {name!r}")
            kind: Kind = "state" if stem.startswith("s") else "results"
            yield ShardRef(name, sha256, nbytes, kind, documents, failed, tokens)


def _in_flight(value: Mapping[str, Any] | None) -> InFlight | None:
    return None if value is None else InFlight(**value)
