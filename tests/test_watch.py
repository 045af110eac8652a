"""Watching a run: what is drawn of it, when the watching ends, and a real one from beginning to end."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import command, environment
from rich.console import Console
from texts import text_of

from rwkvmpi import watching
from rwkvmpi.cli.watch import parse_ranks
from rwkvmpi.errors import UserError
from rwkvmpi.store.commits import Commit, write_commit
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.telemetry import files
from rwkvmpi.telemetry.ranks import held_up_by, ranks_of, stalls
from rwkvmpi.telemetry.sample import encode
from rwkvmpi.telemetry.screen import arranged, draw
from rwkvmpi.watching import Watching


def sample(rank: int, ranks: int = 4, age: float = 0.0, **changed: Any) -> dict[str, Any]:
    """What a rank on a grid of 2 stages x 2 slots says of itself."""
    return {
        "rank": rank,
        "ranks": ranks,
        "host": f"n{rank // 2}",
        "time": time.time() - age,
        "attempt": 1,
        "stage": rank % 2,
        "slot": rank // 2,
        "replica": 0,
        "phase": "reading",
        "chunk": 1000 + rank,
        "chunks": 500,
        "tokens_per_second": 100.0 * (rank + 1),
        "busy_s": 30.0,
        "reading_s": 40.0,
        "waits": {"activations or tokens": 9.0, "writing": 1.0},
        "neighbours": {str(rank ^ 1): 9.0},
        "waiting": None,
        "rss_bytes": 2_000_000_000,
        "commit": 7,
        **changed,
    }


def write(run: RunFolder, *samples: dict[str, Any]) -> None:
    for one in samples:
        files.write_sample(run.path, one["rank"], encode(one))


@pytest.fixture(autouse=True)
def size_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the terminal alone: where Python has GNU's readline, it sets these for the workers of pytest-xdist."""
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of four ranks that this process seems to hold, with a commit and what rank 0 says of it."""
    run = RunFolder(tmp_path / "run")
    run.create()
    run.lock.acquire()
    run.next_attempt()
    write_commit(run, Commit(12, 1, "job", 20))
    job = {"attempt": 1, "task": "score", "grid": [2, 2, 1], "ranks": 4, "documents_done": 13, "documents_total": 20}
    job |= {"documents_failed": 2, "tokens_done": 1_234_567, "tokens_per_second": 290.5, "seconds_left": 600.0}
    job |= {"bytes_done": 50, "bytes_total": 100, "slurm_end": time.time() + 7100, "time": time.time()}
    run.progress.write_text(json.dumps(job))
    return run


def drawn(path: Path, width: int, height: int | None = None, sort: Any = "rank", only: Any = None) -> list[str]:
    """The lines of one view."""
    with Watching(path) as watched:
        moment = watched.look()
    console = Console(width=width, file=io.StringIO(), record=True, color_system=None)
    order = arranged(moment.ranks, sort, only)
    console.print(draw(moment.facts, moment.ranks, moment.ages, order, width, height, "q leaves"))
    lines = console.export_text().rstrip("\n").split("\n")
    assert max(map(len, lines)) <= width
    return [line.rstrip() for line in lines]


def test_a_view_of_the_whole_and_of_every_rank(run: RunFolder) -> None:
    waiting = {"rank": 3, "what": "a message (state of layer 3)", "since_s": 2.5}
    write(run, *map(sample, (0, 1, 3)), sample(2, waiting=waiting, device_bytes=40_000_000_000))
    lines = drawn(run.path, 170)
    text = "\n".join(lines)
    for words in (
        "running",
        "4 ranks   attempt 1",
        "50%   documents 13 of 20   2 failed   tokens 1,234,567   600 tokens/s   290 tokens/s on average   about",
        "commit 12, ",
        "allocation ends in 118 min   ranks from files, heard",
        "q leaves",
    ):
        assert words in text
    (row,) = (line for line in lines if line.split()[:2] == ["2", "n1"])
    assert row.split()[2:7] == ["0/1/0", "reading", "1,002", "300", "75%"]
    for words in ("2.5 s: rank 3, a message (state of layer 3)", "in all 10 s, 3: 9.0 s", "2 GB", "40 GB", " 7 "):
        assert words in row
    assert "not shown" not in text
    narrow = "\n".join(drawn(run.path, 60))
    assert "2.5 s: rank 3" in narrow
    assert "n1" not in narrow


def test_who_holds_the_run_up_is_said(run: RunFolder) -> None:
    """2 is silent, 3 waits for it and 1 for 3; 0 waits for the disk."""
    write(
        run,
        sample(0, waiting={"rank": None, "what": "writing", "since_s": 11.0}),
        sample(1, waiting={"rank": 3, "what": "tokens", "since_s": 20.0}),
        sample(2, age=300.0),
        sample(3, waiting={"rank": 2, "what": "a state", "since_s": 45.0}),
    )
    text = "\n".join(drawn(run.path, 150))
    assert "rank 2 (n1) has been silent for 5 min" in text
    assert "ranks 1, 3 wait up to 45 s for rank 2 (n1), which is silent" in text
    assert "rank 0 (n0) waits 11 s for writing" in text
    assert "600 tokens/s without 1 silent rank " in text
    nobody = ranks_of(map(sample, range(4)))
    assert stalls(nobody, dict.fromkeys(range(4), 1.0), 5.0) == []
    assert stalls(nobody, {0: 7.0, 1: 0.0, 2: 8.0, 3: 9.0}, 5.0) == [
        "ranks 2, 3 (n1) have been silent for up to 9.0 s",
        "rank 0 (n0) has been silent for 7.0 s",
    ]
    circle = ranks_of([sample(0, waiting={"rank": 1, "what": "", "since_s": 0}), sample(1)])
    assert held_up_by(circle, 0) == 1
    assert held_up_by(circle, 1) is None
    circle = ranks_of(sample(rank, waiting={"rank": 1 - rank, "what": "", "since_s": 0}) for rank in range(2))
    assert held_up_by(circle, 0) is None


def test_many_ranks_are_sorted_and_cut_to_the_terminal(run: RunFolder) -> None:
    since = [0.1, 0.2, 9.5]
    write(run, *(sample(rank, 60, tokens_per_second=1000.0 - rank) for rank in range(57)))
    write(run, *(sample(57 + n, 61, waiting={"rank": 0, "what": "x", "since_s": s}) for n, s in enumerate(since)))
    lines = drawn(run.path, 120, 20)
    assert len(lines) == 20
    titles = next(number for number, line in enumerate(lines) if line.startswith("rank "))
    shown = [line.split()[0] for line in lines[titles + 1 : -1]]
    assert shown == list(map(str, range(len(shown))))
    more = f"{60 - len(shown)} of 60 ranks not shown (--sort rate|wait, --ranks 0-7)"
    assert lines[-1] == f"{more}; 1 of 61 not heard yet; q leaves"

    def order(**how: Any) -> list[str]:
        return [line.split()[0] for line in drawn(run.path, 120, 20, **how)[titles + 1 : -1]]

    assert order(sort="wait")[:3] == ["59", "58", "57"]
    assert order(sort="rate")[:2] == ["56", "55"]
    assert order(only={3, 40, 700}) == ["3", "40"]
    assert len(drawn(run.path, 100, 5)) <= 5


def test_the_end_of_reading_is_not_yet_the_end(run: RunFolder) -> None:
    write(run, *(sample(rank, age=60.0, phase="done") for rank in range(4)))
    text = "\n".join(drawn(run.path, 120))
    assert "all ranks are done; rank 0 writes what is left to write" in text
    assert "silent" not in text


def test_samples_of_an_earlier_start_do_not_count(run: RunFolder) -> None:
    write(run, sample(0), sample(1))
    run.next_attempt()
    with Watching(run.path) as watched:
        moment = watched.look()
    assert moment.ranks == {}
    assert moment.facts["note"] == "nothing from its ranks yet: it looks at the model and the input, or loads weights"
    assert (moment.facts["way"], moment.facts["tokens_per_second"], moment.facts["seconds_left"]) == (
        "none",
        None,
        None,
    )
    assert moment.facts["documents_done"] == 0  # committed; what the earlier start read after that is lost


def test_it_waits_for_a_run_stays_between_its_starts_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "FILES_EVERY_S", 0.0)
    monkeypatch.setattr(watching, "RESTART_WITHIN_S", 0.0)
    run = RunFolder(tmp_path / "run")
    with Watching(run.path) as watched:

        def look() -> tuple[str, Any, Any]:
            moment = watched.look()
            return moment.facts["state"], moment.facts["note"], moment.ending and moment.ending.code

        assert look() == ("not started", "there is no such folder yet; waiting for a run to start", None)
        run.create()
        write_commit(run, Commit(1, 1, "job", 20))  # stopped before anybody watched: it will be started again
        assert look() == ("stopped", "waiting for it to go on", None)
        run.lock.acquire()
        run.next_attempt()
        assert look()[0] == "running"
        monkeypatch.setattr(watching, "RESTART_WITHIN_S", 3600.0)
        run.lock.release()
        assert look() == ("stopped", "waiting for it to go on", None)
        run.lock.acquire()
        run.next_attempt()
        assert look()[0] == "running"
        monkeypatch.setattr(watching, "RESTART_WITHIN_S", 0.0)
        run.lock.release()
        assert look() == ("stopped", None, 75)
        shutil.rmtree(run.path)
        assert look() == ("not started", None, 1)


def test_a_job_in_a_queue_that_cannot_be_seen_is_waited_for(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "FILES_EVERY_S", 0.0)
    monkeypatch.setattr(watching, "RESTART_WITHIN_S", 0.0)
    monkeypatch.setenv("PATH", "/nowhere")
    run.progress.write_text(json.dumps({"attempt": 1, "slurm_job": "4711"}))
    with Watching(run.path) as watched:
        assert watched.look().facts["slurm_job"] == "4711"
        run.lock.release()
        moment = watched.look()
    assert moment.ending is None
    assert moment.facts["note"].startswith("whether Slurm job 4711 is queued again cannot be seen from this machine;")


def test_what_is_no_run_is_refused(tmp_path: Path, rwkvmpi: Callable[..., Any]) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for path, once, sentence in (
        (tmp_path, False, "holds no run of rwkvmpi"),
        (tmp_path / "thesis.tex", False, "is a file, not a run folder"),
        (tmp_path / "no" / "where", True, "there is no such folder"),
    ):
        with pytest.raises(UserError, match=sentence):
            Watching(path, once)
    for text in ("", "a", "3-", "5-3", "1,,2", "0-99999999999"):
        with pytest.raises(UserError, match="--ranks"):
            parse_ranks(text)
    assert parse_ranks("0, 3,8-10") == {0, 3, 8, 9, 10}
    said = rwkvmpi("watch", tmp_path / "run", code=2).stderr  # a pipe: once, so there is nothing to wait for
    assert said.startswith("rwkvmpi: ")
    assert "Traceback" not in said


def test_a_real_run_from_before_its_beginning_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(text_of(60_000, 1))
    watch = subprocess.Popen(
        command(1, "watch", tmp_path / "run", "--json", "--every", "0.2"),
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    score = subprocess.run(
        command(1, "score", "bundled", tmp_path / "text.txt", "-o", tmp_path / "run"),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=environment(),
    )
    assert score.returncode == 0, score.stderr
    told, _ = watch.communicate(timeout=60)
    assert watch.returncode == 0
    moments = [json.loads(line) for line in told.splitlines()]
    last = moments[-1]
    assert (last["state"], last["documents_done"], last["tokens_done"]) == ("finished", 1, 60_000)
    assert last["ended"] == {"code": 0, "sentence": "finished: 1 documents, 0 failed, 60,000 tokens"}
    assert all(moment["ended"] is None for moment in moments[:-1])
    running = [moment for moment in moments if moment["state"] == "running"]
    assert running
    assert all(moment["attempt"] in (None, 1) and moment["tokens_done"] in (None, *range(60_001)) for moment in running)
    assert [(rank["rank"], rank["phase"]) for rank in last["ranks"]] == [(0, "done")]
    once = subprocess.run(command(1, "watch", tmp_path / "run"), capture_output=True, text=True, env=environment())
    assert (once.returncode, once.stderr) == (0, "")
    assert "finished: 1 documents" in once.stdout


@pytest.mark.parametrize("leave", ["q", "Ctrl-C"])
def test_a_terminal_is_drawn_on_and_given_back(run: RunFolder, leave: str) -> None:
    write(run, *map(sample, range(4)))
    pid, terminal = pty.fork()
    if pid == 0:
        arguments = [sys.executable, "-m", "rwkvmpi", "watch", str(run.path), "--every", "0.2"]
        os.execvpe(arguments[0], arguments, {**environment(), "TERM": "xterm-256color"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    before = termios.tcgetattr(terminal)
    seen = read_until(terminal, b"q leaves")
    assert b"\x1b[?1049h" in seen
    assert b"documents 13 of 20" in seen
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 9, 120, 0, 0))
    read_until(terminal, b"of 4 ranks not shown")
    write(run, sample(1, waiting={"rank": 3, "what": "a state", "since_s": 33.0}))
    read_until(terminal, b"rank 1 waits 33 s for rank 3 (n1), which waits for nobody")
    os.write(terminal, b"q") if leave == "q" else os.kill(pid, signal.SIGINT)
    after = read_until(terminal, b"running; the run takes no notice")
    assert b"\x1b[?1049l" in after
    assert termios.tcgetattr(terminal) == before
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)
    assert run.lock.held_here()


def read_until(terminal: int, words: bytes, seconds: float = 60.0) -> bytes:
    """Everything that is drawn until the words appear."""
    seen, deadline = b"", time.monotonic() + seconds
    while words not in seen:
        ready = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]
        assert ready, f"no {words!r} in {seen!r}"
        try:
            seen += os.read(terminal, 1 << 16)
        except OSError:
            raise AssertionError(f"it ended without {words!r}: {seen!r}") from None
    return seen
