"""The lock that keeps two jobs off one run folder.

An fcntl lock, which the kernel drops when its holder dies, however it dies. Beside it lies a JSON file that says who
holds it and whose beat goes on as long as the holder lives: file systems whose locks reach only one host, or that have
none, are recognised by a beat that goes on while the lock seems free.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time
from pathlib import Path
from typing import IO, Any

from rwkvmpi.errors import UserError
from rwkvmpi.store.files import TEMP_SUFFIX, dump_json, read_json, remove_quietly, write_errors

BEAT_SECONDS = 4.0
_WATCH_SECONDS = 12.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_BUSY = {errno.EACCES, errno.EAGAIN}
_held_here: set[str] = set()  # an fcntl lock never refuses the process that holds it already


class RunLock:
    """The lock of one run folder: RUN/lock (never removed) and RUN/lock.json (the holder)."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._facts_path = folder / "lock.json"
        self._file: IO[bytes] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._facts: dict[str, Any] = {}

    def acquire(self) -> None:
        """Take the lock, or raise a UserError that names the holder. Released by `release` or the process's end."""
        key = str(self._path.resolve())
        with write_errors(self._path, 0):
            file = open(self._path, "ab")  # noqa: SIM115 - it stays open as long as the lock is held
        try:
            if key in _held_here:
                raise self._refusal()
            exclusive = _lock(file)
            if exclusive is None:
                raise self._refusal()
            self._wait_for_silence(exclusive)
            self._facts = _facts_of_this_process()
            self._write_facts()
            if not exclusive:  # without locks two starters may have got here together: the last writer wins
                time.sleep(1.0)
                if not self._ours():
                    raise self._refusal()
        except BaseException:
            file.close()
            raise
        self._file = file
        _held_here.add(key)
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back. Does nothing when it is not held."""
        if self._file is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._ours():
            remove_quietly(self._facts_path)
        _held_here.discard(str(self._path.resolve()))
        self._file.close()
        self._file = None

    def held_here(self) -> bool:
        """Whether this process holds it, through this object or another."""
        return str(self._path.resolve()) in _held_here

    def other_host(self) -> bool:
        """Whether the last holder ran on another host than this one."""
        facts = read_json(self._facts_path)
        return facts is not None and facts.get("host") != socket.gethostname()

    def last_beat(self) -> float:
        """When the holder last said that it lives, in seconds since the epoch; 0.0: never."""
        try:
            return self._facts_path.stat().st_mtime
        except OSError:
            return 0.0

    def holder(self) -> str | None:
        """Who holds the lock, in words, as far as the JSON file tells; None when nobody does."""
        facts = read_json(self._facts_path)
        return None if facts is None else _in_words(facts)

    def _refusal(self) -> UserError:
        holder = self.holder() or "another process (which has not said who it is)"
        return UserError(
            f"{self._path.parent}: this run folder is in use by {holder}; wait for it to end, "
            f"ask it to stop with `touch {self._path.parent / 'STOP'}`, or choose another folder"
        )

    def _wait_for_silence(self, exclusive: bool) -> None:
        """The lock is ours as far as the file system says; make sure that a holder it does not know of is gone."""
        facts = read_json(self._facts_path)
        if facts is None or (facts.get("host") == socket.gethostname() and (exclusive or not _alive(facts.get("pid")))):
            return
        deadline = time.monotonic() + _WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.5)
            now = read_json(self._facts_path)
            if now is None:
                return
            if now != facts:
                raise self._refusal()

    def _write_facts(self) -> None:
        """Replaced as a whole, so that no reader sees half of it; not synced, for it is worth nothing after a crash."""
        temp = self._facts_path.with_name(f"{self._facts_path.name}.{os.getpid()}{TEMP_SUFFIX}")
        data = dump_json(self._facts)
        with write_errors(self._facts_path, len(data)):
            temp.write_bytes(data)
            os.replace(temp, self._facts_path)

    def _ours(self) -> bool:
        facts = read_json(self._facts_path) or {}
        keys = ("host", "pid", "started")
        return [facts.get(key) for key in keys] == [self._facts.get(key) for key in keys]

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._facts["beat"] += 1
            try:
                self._write_facts()
            except UserError:  # a full disk is reported by whoever writes results
                continue


def _lock(file: IO[bytes]) -> bool | None:
    """True: locked; None: somebody else has it; False: this file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return None
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _facts_of_this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job_id": os.environ.get("SLURM_JOB_ID", ""),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "beat": 0,
    }


def _in_words(facts: dict[str, Any]) -> str:
    job = f", Slurm job {facts['job_id']}" if facts.get("job_id") else ""
    return f"process {facts.get('pid')} on host {facts.get('host')}{job}, started {facts.get('started')}"


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
