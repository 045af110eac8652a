"""The folder of runs as several nodes see it at the same time: is it the same one, how soon is what one writes seen by
the others, does a file ever vanish while it is replaced, does a lock of one keep the others off?

Rank 0 writes and the first rank of every other node looks. Everything lies in a folder of its own, which is removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkvmpi.doctor.node_disks import mount_of
from rwkvmpi.doctor.nodes_circle import Answer, Circle
from rwkvmpi.errors import UserError
from rwkvmpi.store.lock import RunLock

ROUNDS = 3
SLOW_S = 5.0  # no second round after that
SEEN_LIMIT_S = 75.0  # NFS keeps what it knows of a folder for up to a minute
SAME_LIMIT_S = {True: 15.0, False: 2.0}  # over the network or not, until a new folder is listed
FREED_LIMIT_S = 10.0
STEP_LIMIT_S = SEEN_LIMIT_S + 15.0
NBYTES = 1 << 16
REPLACED_S, READ_LIMIT_S = 0.5, 10.0
LAST = 255
POLL_S = 5e-3
NEWS = "news"


def examine(circle: Circle, folder: Path, leaders: dict[int, str]) -> dict[str, dict[str, Any]]:
    """node -> what it saw of the folder, on rank 0; {} elsewhere, or where rank 0 cannot write there (another check
    says so). Every rank calls it; `leaders`: the ranks that look, each with its node."""
    scene = _Scene(circle, folder, leaders)
    name = scene.by_rank_0("a new folder", scene.make)
    if name is None:
        return {}
    scene.scratch = folder / name
    try:
        reports: dict[str, dict[str, Any]] = {node: {} for node in leaders.values()} if circle.rank == 0 else {}
        scene.looked(reports, "the folder of rank 0", scene.same)
        for number in range(1, ROUNDS + 1):
            if not scene.round(reports, number):
                break
        scene.replacing(reports)
        scene.locking(reports)
    finally:
        circle.collect("cleaning up", scene.clean)
    return reports


class _Scene:
    """One rank's part in all of it."""

    def __init__(self, circle: Circle, folder: Path, leaders: dict[int, str]) -> None:
        self.scratch = folder
        self._circle, self._folder, self._leaders = circle, folder, leaders
        self._looks = circle.rank in leaders and circle.rank != 0
        self._visible = False
        self._lock: RunLock | None = None

    def by_rank_0(self, what: str, work: Callable[[], Any]) -> Any:
        """What rank 0's work returned, on every rank; None where it failed."""
        answers = self._circle.collect(what, work if self._circle.rank == 0 else lambda: None)
        return self._circle.tell(answers[0].value if answers else None)

    def looked(self, reports: dict[str, dict[str, Any]], what: str, work: Callable[[], dict[str, Any]]) -> None:
        """Let every node look, and put what it says into its report (on rank 0)."""
        for rank, answer in enumerate(self._circle.collect(what, work if self._looks else dict, STEP_LIMIT_S)):
            if rank in self._leaders:
                _add(reports[self._leaders[rank]], answer)

    def make(self) -> str:
        scratch = self._folder / f".doctor-{secrets.token_hex(6)}"
        scratch.mkdir()
        (scratch / "token").write_bytes(scratch.name.encode())
        return scratch.name

    def clean(self) -> None:
        if self._lock is not None:
            self._lock.release()
        if self._circle.rank == 0 and self.scratch != self._folder:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def same(self) -> dict[str, Any]:
        """Whether rank 0's folder is in this node's one. Listing it asks a server anew, which a mere look need not."""
        until = time.monotonic() + SAME_LIMIT_S[mount_of(self._folder).over_network]
        while not self._visible:
            try:
                listed = self.scratch.name in os.listdir(self._folder)
                self._visible = listed and (self.scratch / "token").read_bytes() == self.scratch.name.encode()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
            if time.monotonic() > until:
                break
            time.sleep(POLL_S)
        return {"seen": self._visible}

    def round(self, reports: dict[str, dict[str, Any]], number: int) -> bool:
        """A new file and a replaced one: how long after rank 0 has written them does every node see them? Whether
        another round is worth it."""
        new = self.scratch / f"new-{number}"
        # whoever looked for a file in vain may believe for a while that it is not there
        self._circle.collect("a look before", lambda: {"there": self._looks and self._visible and new.exists()})
        age = self.by_rank_0("writing", lambda: self._write(new, number))
        self.looked(reports, "what rank 0 has written", lambda: self._delays(new, number))
        if age is not None and self._circle.rank == 0:
            reports[self._leaders[0]].setdefault("file_clock", age)
        worst = max((max(one.get("new", [0])) for one in reports.values()), default=0.0)
        return bool(self._circle.tell(worst < SLOW_S and age is not None))

    def replacing(self, reports: dict[str, dict[str, Any]]) -> None:
        """While rank 0 replaces a file again and again, every node reads it."""
        work = self._replace if self._circle.rank == 0 else self._read
        for rank, answer in enumerate(self._circle.collect("replacing a file", work)):
            if rank in self._leaders and rank != 0:
                _add(reports[self._leaders[rank]], answer)

    def locking(self, reports: dict[str, dict[str, Any]]) -> None:
        """Rank 0 holds the lock of a run: is everybody else refused, and may another have it afterwards?"""
        held = self.by_rank_0("taking a lock", self._take)
        if held is not True:
            if self._circle.rank == 0:
                reports[self._leaders[0]]["lock"] = "not given"
            return
        self.looked(reports, "the lock that rank 0 holds", self._try)
        self.by_rank_0("giving a lock back", self._give_back)
        heir = min((rank for rank in self._leaders if rank != 0), default=0)
        mine = self._circle.rank == heir and self._visible
        for rank, answer in enumerate(self._circle.collect("the lock given back", self._inherit if mine else dict)):
            if rank == heir and rank != 0:
                _add(reports[self._leaders[rank]], answer)

    def _write(self, new: Path, number: int) -> float:
        """The age that the file server's clock gives the file beside this node's clock, seconds."""
        _replace_with(self.scratch / NEWS, number)
        before = time.time()
        new.write_bytes(b"new")
        after = time.time()
        stamp = new.stat().st_mtime
        return stamp - before if stamp < before else max(0.0, stamp - after)

    def _delays(self, new: Path, number: int) -> dict[str, Any]:
        if not self._visible:
            return {}
        begun, seen_new, seen_old = time.monotonic(), -1.0, -1.0
        while seen_new < 0 or seen_old < 0:
            now = time.monotonic() - begun
            if seen_new < 0 and new.exists():
                seen_new = now
            if seen_old < 0 and _content(self.scratch / NEWS)[:1] == bytes([number]):
                seen_old = now
            if now > SEEN_LIMIT_S:
                break
            time.sleep(POLL_S)
        limit = SEEN_LIMIT_S
        return {"new": [seen_new if seen_new >= 0 else limit], "replaced": [seen_old if seen_old >= 0 else limit]}

    def _replace(self) -> dict[str, Any]:
        until, number = time.monotonic() + REPLACED_S, ROUNDS
        while time.monotonic() < until:
            number = number % (LAST - 1) + 1
            _replace_with(self.scratch / NEWS, number)
        _replace_with(self.scratch / NEWS, LAST)
        return {}

    def _read(self) -> dict[str, Any]:
        """Reads until the last version is there: how many, and how many found no file, or a part of one."""
        counts = {"reads": 0, "missing": 0, "torn": 0}
        if not (self._looks and self._visible):
            return {}
        until = time.monotonic() + READ_LIMIT_S
        while time.monotonic() < until:
            try:
                content = (self.scratch / NEWS).read_bytes()
            except FileNotFoundError:
                counts["missing"] += 1
                continue
            except OSError as error:
                if error.errno != errno.ESTALE:  # NFS says so of a file that was open when it was replaced
                    raise
                continue
            counts["reads"] += 1
            counts["torn"] += content != content[:1] * NBYTES
            if content[:1] == bytes([LAST]):
                break
            time.sleep(POLL_S / 5)
        return counts

    def _take(self) -> bool:
        self._lock = RunLock(self.scratch)
        self._lock.acquire()
        return True

    def _give_back(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _try(self) -> dict[str, Any]:
        """The lock itself, and what keeps two jobs off one run."""
        if not self._visible:
            return {}
        found = {"lock": _locked(self.scratch / "lock")}
        mine = RunLock(self.scratch)
        try:
            mine.acquire()
        except UserError:
            return {**found, "run_lock": "refused"}
        mine.release()
        return {**found, "run_lock": "taken"}

    def _inherit(self) -> dict[str, Any]:
        until = time.monotonic() + FREED_LIMIT_S
        while (found := _locked(self.scratch / "lock")) == "refused" and time.monotonic() < until:
            time.sleep(POLL_S)
        return {"freed": found != "refused"}


def _add(report: dict[str, Any], answer: Answer) -> None:
    if answer.trouble:
        report.setdefault("trouble", answer.trouble)
    for key, value in (answer.value or {}).items():
        if isinstance(value, list):
            report.setdefault(key, []).extend(value)
        else:
            report[key] = value


def _replace_with(path: Path, number: int) -> None:
    temp = path.with_suffix(".tmp")
    temp.write_bytes(bytes([number]) * NBYTES)
    os.replace(temp, path)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _locked(path: Path) -> str:
    """Try to lock it: "refused", "taken" (and given back at once), or "none" where there are no locks."""
    with path.open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return "refused" if error.errno in (errno.EACCES, errno.EAGAIN) else "none"
    return "taken"
