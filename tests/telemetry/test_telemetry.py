"""Telemetry between real processes over real sockets: who hears what, and what is lost without harm."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from launching import environment, mpirun

from rwkvmpi.telemetry import Telemetry, client, files, network, sample

zmq = pytest.importorskip("zmq")

PROGRAM = Path(__file__).with_name("ranks_program.py")
LIMIT_S = 60.0


def until(is_so: Callable[[], Any]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


@contextmanager
def job(run: Path, attempt: int, ranks: int, *launcher: str) -> Iterator[subprocess.Popen[str]]:
    """A job whose ranks tell; killed at the end of the block if it still runs."""
    command = [*launcher, sys.executable, str(PROGRAM), str(run), str(attempt), str(ranks)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "up"
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def end(process: subprocess.Popen[str], run: Path) -> None:
    (run / "end").touch()
    assert process.wait(LIMIT_S) == 0


@contextmanager
def one_rank(run: Path, facts: Callable[[], dict[str, Any]] = dict, mode: str = "on") -> Iterator[Telemetry]:
    (run / "logs").mkdir(parents=True, exist_ok=True)
    telemetry = Telemetry(run, 0, 1, facts, mode, attempt=1)
    telemetry.start()
    yield telemetry
    telemetry.close()


def test_samples_come_over_the_network_while_the_job_runs_and_stay_in_files(tmp_path: Path) -> None:
    with client.follow(tmp_path / "run") as follower:  # which is not there yet
        assert (follower.way, follower.age_s, follower.latest()) == ("none", None, {})
        with job(tmp_path / "run", 1, 3) as process:
            until(lambda: follower.way == "network" and set(follower.latest()) == {0, 1, 2})
            until(lambda: follower.latest()[2].get("tokens_per_second", 0) > 0)
            assert follower.latest()[2].items() >= {"ranks": 3, "attempt": 1, "slot": 2, "phase": "reading"}.items()
            assert follower.latest()[1]["rss_bytes"] > 1 << 20
            ticket = files.folder_of(tmp_path / "run") / files.ENDPOINT
            assert stat.S_IMODE(ticket.stat().st_mode) == 0o600
            end(process, tmp_path / "run")
        assert not ticket.exists()
        until(lambda: {s["phase"] for s in follower.latest().values()} == {"done"})
    assert {s["phase"] for s in client.latest(tmp_path / "run").values()} == {"done"}


def test_a_killed_job_is_seen_in_its_files_and_the_next_start_over_the_network_again(tmp_path: Path) -> None:
    with client.follow(tmp_path) as follower:
        with job(tmp_path, 1, 3) as process:
            until(lambda: follower.way == "network" and len(follower.latest()) == 3)
            os.killpg(process.pid, signal.SIGKILL)
        until(lambda: follower.way == "files")
        assert set(follower.latest()) == {0, 1, 2}
        assert files.read_endpoint(tmp_path) is not None  # it had no time to remove it
        with job(tmp_path, 2, 2):
            until(lambda: follower.way == "network")
            until(lambda: {s["attempt"] for s in follower.latest().values()} == {2})
            until(lambda: set(follower.latest()) == {0, 1})
            assert set(client.latest(tmp_path)) <= {0, 1}  # not what the first start's third rank has left


@pytest.mark.parallel
def test_the_ranks_of_an_mpi_job_learn_where_to_send(tmp_path: Path) -> None:
    launcher = mpirun()
    assert launcher is not None
    with client.follow(tmp_path) as follower, job(tmp_path, 1, 3, launcher, "-n", "3") as process:
        until(lambda: follower.way == "network" and set(follower.latest()) == {0, 1, 2})
        assert len({s["pid"] for s in follower.latest().values()}) == 3
        end(process, tmp_path)


def test_a_stranger_hears_nothing_and_a_watcher_cannot_inject(tmp_path: Path) -> None:
    forged = sample.encode({"rank": 7, "ranks": 8, "time": time.time(), "attempt": 1})
    with one_rank(tmp_path) as telemetry, client.follow(tmp_path) as follower, zmq.Context() as context:
        published, for_ranks = files.read_endpoint(tmp_path), telemetry.endpoint()
        assert published is not None
        assert for_ranks is not None
        assert for_ranks["key"] != published["key"]
        stranger, open_stranger = context.socket(zmq.SUB), context.socket(zmq.SUB)
        network.connect(stranger, {**published, "key": zmq.curve_keypair()[0].decode()}, "127.0.0.1", LINGER=0)
        open_stranger.connect(f"tcp://127.0.0.1:{published['port']}")  # speaks no CURVE at all
        rank_7, watcher = context.socket(zmq.PUB), context.socket(zmq.XSUB)
        network.connect(rank_7, {**for_ranks, "key": published["key"]}, "127.0.0.1", LINGER=0)
        network.connect(watcher, published, "127.0.0.1", LINGER=0)
        watcher.send(b"\1")  # subscribes, as it may
        for subscriber in (stranger, open_stranger):
            subscriber.subscribe(b"")
        until(lambda: follower.way == "network" and watcher.poll(0))
        before = follower.latest()[0]["time"]
        while follower.latest()[0]["time"] < before + 2:
            rank_7.send(forged)
            watcher.send(forged)
            time.sleep(0.1)
        assert set(follower.latest()) == {0}
        assert not stranger.poll(0)
        assert not open_stranger.poll(0)
        context.destroy(linger=0)


def test_watchers_that_do_not_read_hold_up_nobody(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    exchange = network.Exchange(tmp_path, 100, 1)
    elsewhere = {**exchange.endpoint, "host": "nowhere.invalid", "addresses": ["127.0.0.1"]}
    senders = [network.Sender(exchange.endpoint) for _ in range(99)] + [network.Sender(elsewhere)]
    with client.follow(tmp_path) as follower, zmq.Context() as context:
        asleep = context.socket(zmq.SUB)
        published = files.read_endpoint(tmp_path)
        assert published is not None
        network.connect(asleep, published, "127.0.0.1", RCVHWM=1, LINGER=0)
        asleep.subscribe(b"")

        def send(**more: Any) -> None:
            for rank, sender in enumerate(senders):
                line = {"rank": rank, "ranks": 100, "time": time.time(), "attempt": 1, **more}
                sender.send(sample.encode(line))

        def all_are_heard() -> bool:
            send()
            return len(follower.latest()) == 100

        until(all_are_heard)
        for _ in range(100):
            send(host="n" * 200, pad=["x" * 200] * 20)

        def the_last_word_is_heard() -> bool:
            send(phase="closing")
            return all(s.get("phase") == "closing" for s in follower.latest().values())

        until(the_last_word_is_heard)
        for sender in senders:
            sender.close()
        exchange.close(5.0)
        assert not exchange._thread.is_alive()
        context.destroy(linger=0)


def test_a_removed_ticket_is_written_again(tmp_path: Path) -> None:
    with one_rank(tmp_path):
        ticket = files.folder_of(tmp_path) / files.ENDPOINT
        until(ticket.exists)
        first = ticket.read_bytes()
        ticket.unlink()
        until(ticket.exists)
        assert ticket.read_bytes() == first


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "rwkvmpi")
    (tmp_path / "logs").mkdir()
    files.folder_of(tmp_path).write_text("in the way")
    calls: list[int] = []

    def facts() -> dict[str, Any]:
        calls.append(1)
        return {}

    with one_rank(tmp_path, facts) as telemetry:
        telemetry._file_every_s = 0.0
        until(lambda: len(calls) > 2)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "cannot be written" in caplog.text
    assert client.latest(tmp_path) == {}


def test_without_pyzmq_there_are_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "rwkvmpi")
    monkeypatch.setitem(sys.modules, "zmq", None)
    with one_rank(tmp_path) as telemetry, client.follow(tmp_path) as follower:
        assert telemetry.endpoint() is None
        until(lambda: follower.way == "files")
    assert "pyzmq is missing" in caplog.text
    assert len(caplog.records) == 1


def test_facts_that_fail_now_and_then_leave_a_sample_out_and_for_ever_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "rwkvmpi")
    monkeypatch.setattr("rwkvmpi.telemetry.sampler.EVERY_S", 0.05)
    calls: list[int] = []

    def facts() -> dict[str, Any]:
        calls.append(1)
        if len(calls) < 5 or len(calls) > 8:
            raise RuntimeError("dictionary changed size during iteration")
        return {"chunks": len(calls)}

    with one_rank(tmp_path, facts, "files") as telemetry:
        assert telemetry._thread is not None
        telemetry._thread.join(LIMIT_S)
    assert len(calls) == 13
    assert client.latest(tmp_path)[0]["chunks"] == 5  # the file's turn comes every 5 s
    assert [record.message.partition(":")[0] for record in caplog.records] == ["telemetry of this rank ends"]


def test_facts_that_hang_do_not_hold_up_the_end(tmp_path: Path) -> None:
    hangs, go_on = threading.Event(), threading.Event()

    def facts() -> dict[str, Any]:
        hangs.set()
        go_on.wait()
        return {}

    with one_rank(tmp_path, facts):
        assert hangs.wait(LIMIT_S)
    assert not go_on.is_set()  # closed all the same
    assert files.read_endpoint(tmp_path) is None
    go_on.set()


def test_off_does_nothing_and_an_end_without_closing_does_not_hang(tmp_path: Path) -> None:
    with one_rank(tmp_path / "off", mode="off") as telemetry:
        assert telemetry.endpoint() is None
    assert list((tmp_path / "off" / "logs").iterdir()) == []
    command = [sys.executable, str(PROGRAM), str(tmp_path / "run"), "1", "2", "end"]
    subprocess.run(command, check=True, timeout=LIMIT_S, env=environment())
