"""The run folder: where everything of a run lies, who holds it, and what may be swept out of it."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rwkvmpi.errors import UserError
from rwkvmpi.store.files import (
    TEMP_SUFFIX,
    dump_json,
    fsync_folder,
    read_json,
    remove_quietly,
    sha256_file,
    write_durably,
    write_errors,
)
from rwkvmpi.store.lock import RunLock

# attempt, rank, serial, version; serial "s" for states in flight. The version tells rewrites of one shard apart.
SHARD_NAME = re.compile(r"(\d{4,})-(\d{5,})-(s?)(\d{5,})-(\d{3,})\.h5")
COMMIT_NAME = re.compile(r"(\d{6,})\.json")
_TRACES = ("job.toml", "identity.json", "lock", "attempt", "shards", "commits", "results.h5", "SUCCESS")


class RunFolder:
    """Paths and housekeeping of one run folder. Making the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.job_toml = self.path / "job.toml"
        self.results = self.path / "results.h5"
        self.shards = self.path / "shards"
        self.commits = self.path / "commits"
        self.logs = self.path / "logs"
        self.success = self.path / "SUCCESS"
        self.stop = self.path / "STOP"
        self.progress = self.logs / "progress.json"
        self._attempt_file = self.path / "attempt"
        self.lock = RunLock(self.path)

    @property
    def exists(self) -> bool:
        """Whether a run has ever been started here."""
        return any((self.path / name).exists() for name in _TRACES)

    @property
    def finished(self) -> bool:
        """Whether the run is done: SUCCESS is written after everything else."""
        return self.success.exists()

    def create(self) -> None:
        """Make the folder and its parts, durably; an existing run is left as it is.

        UserError when the path is a file, cannot be written, or is a folder with something else in it.
        """
        self.check_place()
        with write_errors(self.path, 0):
            missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            for folder in (self.path, self.shards, self.commits, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(self.path)
            for folder in missing:
                fsync_folder(folder.parent)

    def check_place(self) -> None:
        """UserError when the path is a file, or a folder with something else in it; nothing is touched."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file, not a folder; give the run folder another name")
        with write_errors(self.path, 0):
            if self.path.is_dir() and not self.exists and any(self.path.iterdir()):
                raise UserError(
                    f"{self.path}: is not empty and holds no run of rwkvmpi; give a new or an empty folder for the run"
                )

    def next_attempt(self) -> int:
        """The number of this start of the job, from 1; counted durably, so that no name of a shard comes twice.

        Call it once per start, holding the lock.
        """
        counted = read_json(self._attempt_file) or {}
        number = counted.get("attempt", 0)
        last = number if isinstance(number, int) else 0
        for path in self.shard_paths():  # the counter may have been lost with an unclean copy of the folder
            match = SHARD_NAME.match(path.name)
            last = max(last, int(match[1]) if match else 0)
        write_durably(self._attempt_file, dump_json({"attempt": last + 1}))
        return last + 1

    def shard_paths(self) -> list[Path]:
        """All files in shards/ that bear the name of a shard, sorted."""
        if not self.shards.is_dir():
            return []
        return sorted(path for path in self.shards.iterdir() if SHARD_NAME.fullmatch(path.name))

    def commit_paths(self) -> list[Path]:
        """All commit files, the newest first."""
        if not self.commits.is_dir():
            return []
        found = [path for path in self.commits.iterdir() if COMMIT_NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.stem), reverse=True)

    def remove_orphans(self, listed: Collection[str]) -> list[str]:
        """Remove shards whose names are not `listed`, and temp files that a killed process left. Returns their names.

        Only before anybody writes (holding the lock, before the first chunk); only files that bear names of ours.
        """
        keep = set(listed)
        doomed = [path for path in self.shard_paths() if path.name not in keep]
        for folder in (self.path, self.shards, self.commits, self.logs):
            if folder.is_dir():
                doomed += [path for path in folder.glob(f"*{TEMP_SUFFIX}") if self._is_ours(path)]
        return [path.name for path in doomed if remove_quietly(path)]

    def remove_stop(self) -> None:
        """Forget a wish to stop that was meant for an earlier start."""
        remove_quietly(self.stop)

    def write_success(self, summary: dict[str, Any]) -> None:
        """Write SUCCESS (JSON), the very last file of a run: the summary, and the SHA-256 of results.h5."""
        facts = {**summary, "results_sha256": sha256_file(self.results)}
        write_durably(self.success, dump_json(facts) + b"\n")

    def remove_parts(self) -> None:
        """Once results.h5 and SUCCESS are written: remove commits, then shards, which nobody needs any more."""
        if not (self.finished and self.results.exists()):
            raise RuntimeError(f"{self.path}: the parts of an unfinished run must stay")
        for path in [*self.commit_paths(), *self.shard_paths()]:
            remove_quietly(path)

    def _is_ours(self, path: Path) -> bool:
        name = path.name.removesuffix(TEMP_SUFFIX)
        known = SHARD_NAME.fullmatch(name) or COMMIT_NAME.fullmatch(name) or name.startswith("lock.json.")
        return bool(known) or name in (*_TRACES, "progress.json")
