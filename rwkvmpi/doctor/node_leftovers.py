"""Session folders that MPI's daemons left behind when they were killed.

A later mpirun that gets the process id of a dead one finds its folder and fails: "The PMIx server's listener thread
failed to start", code 213.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rwkvmpi.doctor.diagnosis import Finding

# Open MPI 5 and PRRTE: ompi.PID, prte.PID; older ones: ompi.HOST.USER/pid.PID
_OF_A_PROCESS = re.compile(r"(?:ompi|prte|prted|prterun|pmix|openmpi)\.(\d+)$")
_OF_A_USER = re.compile(r"(?:ompi|prte|openmpi-sessions)[-.]\S*?[-.@](\d+)(?:_\d+)?$")
_BELOW_A_USER = re.compile(r"(?:pid|dvm)\.(\d+)$")
_ADDRESS = re.compile(rb"tcp4://([\d.]+):(\d+)")
CONNECT_LIMIT_S = 0.5
SMALL_FILE = 4096
SHOWN = 3


def session_folders() -> Iterator[Finding]:
    """Those of dead processes; --fix removes them."""
    dead = of_dead_processes(Path(tempfile.gettempdir()))
    if not dead:
        yield Finding("left-over folders", "ok", "no session folder of a dead MPI process")
        return
    names = ", ".join(str(path) for path in dead[:SHOWN]) + (f" and {len(dead) - SHOWN} more" if dead[SHOWN:] else "")
    value = (
        f'{names}: of processes that are gone; an mpirun that gets the same process id will fail with code 213 ("The '
        "PMIx server's listener thread failed to start\")"
    )
    facts = {"folders": [str(path) for path in dead]}
    yield Finding("left-over folders", "warn", value, "remove them", lambda: _remove(dead), facts=facts)


def of_dead_processes(folder: Path) -> list[Path]:
    """Session folders in `folder` of this user's processes that are gone: the process id is free, and nobody listens
    where the folder's files say so (a container that shares /tmp has process ids of its own)."""
    found: list[tuple[Path, int]] = []
    for path in _own_folders(folder):
        if match := _OF_A_PROCESS.match(path.name):
            found.append((path, int(match[1])))
        elif _OF_A_USER.match(path.name):
            below = [(one, _BELOW_A_USER.match(one.name)) for one in _own_folders(path)]
            found += [(one, int(match[1])) for one, match in below if match]
    return [path for path, pid in found if not _alive(pid) and not _listens(path)]


def _own_folders(folder: Path) -> list[Path]:
    """Folders in it, no links, that belong to this user."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return []
    found = []
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                found.append(Path(entry.path))
        except OSError:
            continue  # it has gone meanwhile
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _listens(folder: Path) -> bool:
    """Whether a server whose address is in one of the folder's small files takes connections."""
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file() or path.stat().st_size > SMALL_FILE:
            continue
        for host, port in _ADDRESS.findall(path.read_bytes()):
            try:
                socket.create_connection((host.decode(), int(port)), CONNECT_LIMIT_S).close()
            except OSError:
                continue
            return True
    return False


def _remove(folders: list[Path]) -> None:
    again = {path for folder in {folder.parent for folder in folders} for path in _still_dead(folder)}
    for folder in folders:
        if folder in again:
            shutil.rmtree(folder)


def _still_dead(parent: Path) -> list[Path]:
    """Looked at once more: a process may have begun meanwhile."""
    if _OF_A_USER.match(parent.name):
        return of_dead_processes(parent.parent)
    return of_dead_processes(parent)
