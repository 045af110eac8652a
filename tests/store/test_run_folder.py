"""The run folder: refusals, the lock and what it survives, housekeeping."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from store_cases import ENVIRONMENT, new_run

from rwkvmpi.errors import UserError
from rwkvmpi.store import lock
from rwkvmpi.store.files import write_durably
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.status import status

HOLD = """
import sys, time
from rwkvmpi.store.files import write_durably
from rwkvmpi.store.run_folder import RunFolder
run = RunFolder(sys.argv[1])
run.create()
run.lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of a run."""
    env = {**ENVIRONMENT, "SLURM_JOB_ID": "4711"}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_job_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = hold(path)
    try:
        with pytest.raises(UserError) as caught:
            RunFolder(path).lock.acquire()
        assert f"in use by process {process.pid} on host " in str(caught.value)
        assert "Slurm job 4711, started 20" in str(caught.value)
        assert status(path)["state"] == "running"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert status(path)["state"] == "crashed"
    run = RunFolder(path)
    begun = time.perf_counter()
    run.lock.acquire()
    assert time.perf_counter() - begun < 2
    assert status(path)["state"] == "running"
    with pytest.raises(UserError, match="in use by"):
        RunFolder(path).lock.acquire()
    run.lock.release()
    assert status(path)["state"] == "not started"
    run.lock.acquire()
    run.lock.release()


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_whom_the_lock_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool) -> None:
    """Locks that reach one host only: a holder elsewhere is recognised by its beat, and a dead one by its silence."""
    monkeypatch.setattr(lock, "_WATCH_SECONDS", 2.0)
    run = new_run(tmp_path / "run")
    facts = {"host": "elsewhere", "pid": 1, "job_id": "", "started": "yesterday", "beat": 0}
    path = run.path / "lock.json"
    path.write_text(json.dumps(facts))
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.2):
            facts["beat"] = int(facts["beat"]) + 1
            (run.path / "new").write_text(json.dumps(facts))
            os.replace(run.path / "new", path)

    thread = threading.Thread(target=beat)
    if alive:
        thread.start()
    try:
        if alive:
            with pytest.raises(UserError, match="process 1 on host elsewhere, started yesterday"):
                run.lock.acquire()
        else:
            run.lock.acquire()
            assert "elsewhere" not in str(run.lock.holder())
            run.lock.release()
    finally:
        over.set()
        if alive:
            thread.join()


def test_without_locks_the_beat_alone_protects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_WATCH_SECONDS", 1.5)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lock, "_lock", lambda file: False)
    run = new_run(tmp_path / "run")
    run.lock.acquire()
    lock._held_here.clear()  # as if the other were another process
    with pytest.raises(UserError, match="in use by"):
        RunFolder(run.path).lock.acquire()
    run.lock.release()


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, not a folder"):
        RunFolder(tmp_path / "file").create()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunFolder(tmp_path / "precious").create()
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").create()
    run = new_run(tmp_path / "a" / "b" / "run")
    run.create()
    assert run.exists
    assert not run.finished
    with pytest.raises(UserError, match="holds no run of rwkvmpi"):
        status(tmp_path / "precious")
    with pytest.raises(UserError, match="no such folder"):
        status(tmp_path / "nowhere")


def test_attempts_are_never_counted_twice(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    assert [run.next_attempt(), RunFolder(run.path).next_attempt()] == [1, 2]
    (run.path / "attempt").unlink()
    (run.shards / "0007-00000-00000-000.h5").touch()
    assert run.next_attempt() == 8
    (run.path / "attempt").write_text("{broken")
    assert run.next_attempt() == 8


def test_a_file_is_replaced_as_a_whole_and_safe_before_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, told = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def note(what: str, done: object) -> None:
        told.append((what, path.read_bytes()))

    monkeypatch.setattr(
        os, "fsync", lambda n: note("folder" if stat.S_ISDIR(os.fstat(n).st_mode) else "file", fsync(n))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: note("rename", replace(a, b)))
    path.write_bytes(b"old")
    write_durably(path, b"new")
    assert told == [("file", b"old"), ("rename", b"new"), ("folder", b"new")]

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(
        UserError, match=r"file \(5 bytes\) cannot be written: No space left on device; free some space"
    ):
        write_durably(path, b"newer")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_only_our_own_files_are_swept_out(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    ours = ["shards/0001-00000-00000-000.h5", "shards/0001-00000-s00001-000.h5", "shards/0001-00000-00002-000.h5.tmp"]
    ours += ["results.h5.tmp", "commits/000003.json.tmp"]
    theirs = ["shards/notes.h5", "shards/0001-00001-00000-000.h5", "shards/mine.tmp", "mine.tmp", "logs/rank_00000.log"]
    for name in ours + theirs:
        (run.path / name).touch()
    removed = run.remove_orphans({"0001-00001-00000-000.h5"})
    assert sorted(removed) == sorted(Path(name).name for name in ours)
    assert all((run.path / name).exists() for name in theirs)
    with pytest.raises(RuntimeError, match="unfinished"):
        run.remove_parts()
