"""Telemetry in the run folder: one small file per rank, and the ticket to the network.

RUN/logs/telemetry/rank_00003.json   the rank's last sample, written in place: no temp file, no rename, no fsync, for a
                                     thousand ranks must not burden the file system; readers bear a torn one
RUN/logs/telemetry/endpoint.json     where samples can be had over the network, and the key to them; mode 0600
"""

from __future__ import annotations

import json
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from rwkvmpi.telemetry.sample import MAX_BYTES, Sample, parse

_RANK_FILE = re.compile(r"rank_(\d{5,9})\.json")
_MAX_FILES = 1 << 17
ENDPOINT = "endpoint.json"


def folder_of(run: str | Path) -> Path:
    """RUN/logs/telemetry"""
    return Path(run) / "logs" / "telemetry"


def write_sample(run: Path, rank: int, data: bytes) -> None:
    """Put the sample into the rank's file. OSError as the system gives it.

    Opened and closed each time: closing is what makes NFS show it to other nodes.
    """
    folder = folder_of(run)
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    path = folder / f"rank_{rank:05d}.json"
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileNotFoundError:
        with suppress(FileExistsError):
            folder.mkdir()  # not its parents: a run folder that somebody has removed stays so
        descriptor = os.open(path, flags, 0o666)
    try:
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)


def read_samples(run: str | Path) -> dict[int, Sample]:
    """The last sample in every rank's file, whatever its attempt; torn and foreign files are left out. No error."""
    folder = folder_of(run)
    found: dict[int, Sample] = {}
    try:
        names = os.listdir(folder)
    except OSError:
        return found
    for name in names[:_MAX_FILES]:
        match = _RANK_FILE.fullmatch(name)
        if match is None:
            continue
        data = _read(folder / name)
        sample = parse(data) if data is not None else None
        if sample is not None and sample["rank"] == int(match[1]):
            found[sample["rank"]] = sample
    return found


def write_endpoint(run: Path, endpoint: dict[str, Any]) -> None:
    """Publish the endpoint for this user's eyes only; whole at every moment. OSError as the system gives it."""
    folder = folder_of(run)
    folder.mkdir(exist_ok=True)
    temp = folder / f"{ENDPOINT}.tmp"  # one that a killed job has left is replaced
    with suppress(FileNotFoundError):
        temp.unlink()
    try:  # created with its mode: there is no moment at which others can open it
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(json.dumps(endpoint).encode())
        os.replace(temp, folder / ENDPOINT)
    except OSError:
        with suppress(OSError):
            temp.unlink()
        raise


def read_endpoint(run: str | Path) -> dict[str, Any] | None:
    """Host, addresses, port and key, as far as they have their types; None when there is no such file or ticket."""
    data = _read(folder_of(run) / ENDPOINT)
    try:
        endpoint = json.loads(data) if data is not None else None
    except (ValueError, RecursionError):
        return None
    return endpoint if is_endpoint(endpoint) else None


def remove_endpoint(run: Path, endpoint: dict[str, Any]) -> None:
    """Remove the file if it is still this endpoint's; a later start may have put its own there. No error."""
    if read_endpoint(run) == endpoint:
        with suppress(OSError):
            (folder_of(run) / ENDPOINT).unlink()


def is_endpoint(value: Any) -> bool:
    """Whether somebody can try to connect with it."""
    if not isinstance(value, dict):
        return False
    host, addresses, port, key = (value.get(name) for name in ("host", "addresses", "port", "key"))
    texts = [host, key, *addresses] if isinstance(addresses, list) and len(addresses) <= 64 else [None]
    return (
        all(isinstance(text, str) and 0 < len(text) <= 255 and text.isascii() for text in texts)
        and len(str(key)) == 40
        and isinstance(port, int)
        and 0 < port < 65536
    )


def _read(path: Path) -> bytes | None:
    """The first bytes of a regular file, one more than a sample may have; None for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError):
        return None
    try:
        return os.read(descriptor, MAX_BYTES + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    except OSError:
        return None
    finally:
        os.close(descriptor)
