"""What a run folder or an HDF5 file of ours is, and whether all of it is still what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rwkvmpi.errors import UserError
from rwkvmpi.store.commits import Commit, verify_shards
from rwkvmpi.store.digest import content_digest
from rwkvmpi.store.files import read_json, sha256_file
from rwkvmpi.store.results_file import open_results
from rwkvmpi.store.run_folder import SHARD_NAME, RunFolder
from rwkvmpi.store.shard_file import COLUMNS, ShardFile
from rwkvmpi.store.status import status

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


def is_ours(path: str | Path) -> bool:
    """Whether `describe` and `check` are for this path: a run folder, or a file that is HDF5 or called so."""
    path = Path(path)
    if path.is_dir():
        return RunFolder(path).exists
    try:
        with open(path, "rb") as file:
            return path.suffix == ".h5" or file.read(len(HDF5_MAGIC)) == HDF5_MAGIC
    except OSError:
        return False


def describe(path: str | Path) -> dict[str, Any]:
    """What it is, as plain values; `kind` is "run", "results" or "shard". UserError when it is none of them."""
    path = Path(path)
    if path.is_dir():
        return {"kind": "run", **status(path), "files": _sizes(RunFolder(path))}
    return _describe_shard(path) if _format_of(path) == "rwkvmpi-shard" else _describe_results(path)


def check(path: str | Path) -> list[str]:
    """Verify every checksum; what is wrong, a sentence each (empty: all is well).

    Run: the commits' own, every listed shard's SHA-256, and results.h5. Results: its SHA-256 where SUCCESS lies beside
    it, the Fletcher-32 of every block, and the digest of all values against the one recorded. Shard: Fletcher-32 and
    its tables; SHA-256 where a commit of its run lists it.
    """
    path = Path(path)
    if path.is_dir():
        return _check_run(RunFolder(path))
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    try:
        return _check_shard(path) if _format_of(path) == "rwkvmpi-shard" else check_results(path)
    except UserError as error:
        return [str(error)]


def _format_of(path: Path) -> str:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("format"))
    except OSError as error:
        if not path.exists():
            raise UserError(f"{path}: there is no such file or folder") from None
        raise UserError(f"{path}: cannot be opened as HDF5 ({error}); it is damaged or no HDF5 file") from error


def _sizes(run: RunFolder) -> dict[str, Any]:
    shards = [size for path in run.shard_paths() if (size := _size(path)) is not None]
    return {"results_bytes": _size(run.results), "shards": len(shards), "shards_bytes": sum(shards)}


def _size(path: Path) -> int | None:
    """Bytes; None when it is not there, or no more: a running job removes what it has rewritten."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _describe_results(path: Path) -> dict[str, Any]:
    with open_results(path) as results:
        failed = int((results.documents["status"] != 0).sum())
        return {
            "kind": "results",
            "path": str(results.path),
            "bytes": results.path.stat().st_size,
            "task": results.task,
            "creator": results.creator,
            "model_sha256": results.model_sha256,
            "tokenizer": results.tokenizer,
            "content_sha256": results.content_sha256,
            "documents": len(results),
            "failed": failed,
            "tokens": int(results.documents["tokens"].sum()),
            "datasets": {name: list(shape) for name, shape in results.shapes().items()},
            "job": results.job,
            "provenance": results.provenance,
        }


def _describe_shard(path: Path) -> dict[str, Any]:
    match = SHARD_NAME.fullmatch(path.name)
    with ShardFile(path) as shard:
        groups = {group: shard.shape(group, next(iter(COLUMNS[group])))[0] for group in COLUMNS if shard.has(group)}
        return {
            "kind": "shard",
            "path": str(path),
            "bytes": path.stat().st_size,
            "holds": shard.kind,
            "attempt": int(match[1]) if match else None,
            "rank": int(match[2]) if match else None,
            "rows": groups,
        }


def _check_run(run: RunFolder) -> list[str]:
    if not run.exists:
        raise UserError(f"{run.path}: holds no run of rwkvmpi; give the folder that was named with -o")
    faults = []
    for path in run.commit_paths():
        try:
            commit = Commit.read(path)
        except ValueError as error:
            if path.exists():  # else a running job has gone on meanwhile
                faults.append(f"{path}: {error}")
            continue
        found = verify_shards(run.shards, commit.shards)
        if path.exists():
            faults += [f"{path}: {run.shards}/{fault}" for fault in found]
    if run.results.exists():
        faults += check_results(run.results)
    elif run.finished:
        faults.append(f"{run.results}: is missing although the run is finished")
    return faults


def check_results(path: Path) -> list[str]:
    """As `check`, for a results file."""
    recorded = (read_json(path.with_name("SUCCESS")) or {}).get("results_sha256")
    if path.name == "results.h5" and recorded is not None and sha256_file(path) != recorded:
        return [f"{path}: its SHA-256 differs from the one in SUCCESS; restore it from a copy"]
    try:
        with open_results(path) as results:
            recorded = results.content_sha256
        found = content_digest(path)
    except UserError as error:
        return [str(error)]
    if found != recorded:
        return [f"{path}: its values have digest {found}, but {recorded} was recorded; restore it from a copy"]
    return []


def _check_shard(path: Path) -> list[str]:
    with ShardFile(path) as shard:
        for group, columns in COLUMNS.items():
            for column in columns if shard.has(group) else ():
                rows = shard.shape(group, column)[0]
                for start in range(0, rows, 1024):
                    shard.rows(group, column, start, min(start + 1024, rows))
    run = RunFolder(path.resolve().parent.parent)
    for commit_path in run.commit_paths():
        try:
            commit = Commit.read(commit_path)
        except ValueError:
            continue
        for ref in commit.shards:
            if ref.name == path.name and sha256_file(path) != ref.sha256:
                return [f"{path}: its SHA-256 differs from the one in {commit_path.name}; restore it from a copy"]
    return []
