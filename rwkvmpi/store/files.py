"""Files that are either complete or not there: temp file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rwkvmpi.errors import UserError

TEMP_SUFFIX = ".tmp"
_BLOCK = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WAY_OUT = {
    errno.EROFS: "the file system is mounted read-only; choose another run folder",
    errno.EACCES: "permission denied; choose a run folder that you may write to",
    errno.EPERM: "permission denied; choose a run folder that you may write to",
}


def write_error(path: Path, nbytes: int, error: OSError) -> UserError:
    """The sentence for a write of `nbytes` to `path` that the system refused."""
    if error.errno in _FULL:
        reason = f"{error.strerror}; free some space or raise the quota, then the same command goes on"
    else:
        reason = _WAY_OUT.get(error.errno or 0, error.strerror or str(error))
    size = f" ({nbytes:,} bytes)" if nbytes else ""
    return UserError(f"{path.parent}: {path.name}{size} cannot be written: {reason}")


@contextmanager
def write_errors(path: Path, nbytes: int) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names the folder, the file and its bytes."""
    try:
        yield
    except OSError as error:
        raise write_error(path, nbytes, error) from error


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` durable. File systems that cannot do it are left alone."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file so that a kill or a power loss at any moment leaves the old one or the new one.

    UserError when the system refuses (disk full, no permission); nothing is left behind then.
    """
    temp = path.with_name(path.name + TEMP_SUFFIX)
    with write_errors(path, len(data)):
        try:
            with open(temp, "wb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
            publish(temp, path)
        except OSError:
            with suppress(OSError):
                temp.unlink()
            raise


def publish(temp: Path, path: Path) -> None:
    """Give a finished and synced temp file its name, durably."""
    os.replace(temp, path)
    fsync_folder(path.parent)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks of 1 MiB. OSError as open() raises it."""
    digest = hashlib.sha256()
    block = bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def dump_json(value: dict[str, Any]) -> bytes:
    """Compact JSON with sorted keys: the same value always gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None when there is no such file or no object in it."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def remove_quietly(path: Path) -> bool:
    """Remove a file that is no longer needed; False when it could not be removed."""
    try:
        path.unlink()
    except OSError:
        return False
    return True
