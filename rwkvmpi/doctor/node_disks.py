"""File systems: which one a folder lies on, what is free there, quotas, and the place for temporary files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rwkvmpi.doctor.diagnosis import Finding

MOUNTS = Path("/proc/self/mountinfo")
NETWORK = ("nfs", "lustre", "beegfs", "gpfs", "cifs", "smb", "ceph", "9p", "fuse.", "afs", "panfs", "orangefs")
TEMPORARY_ENOUGH = 256 << 20
INODES_ENOUGH = 10_000
QUOTA_LIMIT_S = 5
NEARLY = 0.9


class Mount(NamedTuple):
    """Where a folder lies."""

    kind: str  # "ext4", "nfs4", "lustre"
    source: str  # a device, or SERVER:/PATH
    point: str
    options: str

    @property
    def over_network(self) -> bool:
        """Whether other machines may see the same files."""
        return self.kind.startswith(NETWORK)


def mount_of(path: Path, mounts: Path = MOUNTS) -> Mount:
    """The mount that `path` (which need not exist) lies on; of several on one place the last one counts."""
    real = os.path.realpath(path)
    best = Mount("unknown", "", "", "")
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return best
    for line in lines:
        front, _, back = line.partition(" - ")
        first, last = front.split(), back.split()
        if len(first) < 6 or len(last) < 2:
            continue
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), first[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best.point):
            best = Mount(last[0], last[1], point, ",".join([first[5], *last[2:]]))
    return best


def usage(folder: Path) -> dict[str, int]:
    """Bytes and inodes that this user may still fill there, and of how many; inodes -1 where they are not counted."""
    told = os.statvfs(folder)
    counted = told.f_files > 0
    return {
        "free": told.f_bavail * told.f_frsize,
        "total": told.f_blocks * told.f_frsize,
        "inodes_free": told.f_favail if counted else -1,
        "inodes": told.f_files if counted else -1,
    }


def file_system(folder: Path) -> Iterator[Finding]:
    """What the folder of runs lies on: kind and source, inodes, a quota that is nearly used up, options that take the
    locks away."""
    if not folder.is_dir():
        return  # the check of the folder says it
    mount, room = mount_of(folder), usage(folder)
    value = f"{mount.kind} from {mount.source or '?'} at {mount.point}"
    if room["inodes"] > 0:
        value += f", {room['inodes_free']:,} files free"
    facts = {**mount._asdict(), **room}
    quota = _quota(mount.source)
    value += f", {quota[0]}" if quota else ""
    if mount.kind in ("tmpfs", "ramfs"):
        remedy = "memory: what lies there is gone after a reboot, and other nodes do not see it; choose a disk"
        yield Finding("file system", "warn", value, remedy, facts=facts)
    elif no_locks := _without_locks(mount):
        remedy = "mount it with locks that reach all nodes (NFS without nolock and local_lock; Lustre with flock)"
        yield Finding("file system", "warn", f"{value}, mounted with {no_locks}", remedy, facts=facts)
    elif 0 <= room["inodes_free"] < INODES_ENOUGH:
        yield Finding("file system", "warn", value, "few files are left: remove some, or ask for more", facts=facts)
    elif quota and quota[1] > NEARLY:
        yield Finding("file system", "warn", value, "the quota is nearly used up: remove files or ask", facts=facts)
    else:
        yield Finding("file system", "ok", value, facts=facts)


def temporary_files() -> Iterator[Finding]:
    """TMPDIR: MPI's session folders and sockets lie there, so it should be this node's own, with some room."""
    folder = Path(tempfile.gettempdir())
    mount, room = mount_of(folder), usage(folder)
    value = f"{folder} on {mount.kind}, {room['free'] >> 20:,} MiB free"
    facts = {"folder": str(folder), "kind": mount.kind, **room}
    wanted = os.environ.get("TMPDIR", "")
    if wanted and os.path.realpath(wanted) != os.path.realpath(folder):
        remedy = f"TMPDIR={wanted} cannot be used: create it on every node, or leave TMPDIR out"
        yield Finding("temporary files", "warn", value, remedy, facts=facts)
    elif mount.over_network:
        remedy = "export TMPDIR=/tmp: MPI keeps sockets and shared memory there, which must be the node's own"
        yield Finding("temporary files", "warn", value, remedy, facts=facts)
    elif room["free"] < TEMPORARY_ENOUGH:
        remedy = f"make room in {folder}, or set TMPDIR to a local folder that has some"
        yield Finding("temporary files", "warn", value, remedy, facts=facts)
    else:
        yield Finding("temporary files", "ok", value, facts=facts)


def _without_locks(mount: Mount) -> str:
    """The mount options by which locks do not reach other nodes."""
    options = mount.options.split(",")
    bad = {"nolock", "local_lock=all", "local_lock=posix"} if mount.kind.startswith("nfs") else set()
    if mount.kind == "lustre":
        bad = {"noflock", "localflock"}
    return ", ".join(option for option in options if option in bad)


def _quota(source: str) -> tuple[str, float] | None:
    """(words, share used) of this user's quota on that file system, if `quota` is there and knows of one."""
    program = shutil.which("quota")
    if program is None or not source:
        return None
    try:
        done = subprocess.run([program, "-w", "-p"], capture_output=True, text=True, timeout=QUOTA_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return quota_in(done.stdout, source)


def quota_in(listing: str, source: str) -> tuple[str, float] | None:
    """The line of a file system in what `quota -w -p` prints: blocks of 1 KiB used, the quota, the limit, ..."""
    for line in listing.splitlines():
        words = line.replace("*", " ").split()
        if words[:1] == [source] and len(words) > 3 and all(word.isdigit() for word in words[1:4]):
            used, limit = int(words[1]), int(words[2]) or int(words[3])
            if limit:
                return f"quota {used >> 20:,} of {limit >> 20:,} GiB used", used / limit
    return None
