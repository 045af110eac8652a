"""Every wish to stop is heard once, kept, and never kills."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rwkvmpi.cluster.signals import StopRequest, parse_duration
from rwkvmpi.errors import UserError


@pytest.fixture(autouse=True)
def interrupts_as_on_a_terminal() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored, nohup with SIGHUP."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


@pytest.fixture
def stop(tmp_path: Path) -> Iterator[StopRequest]:
    request = StopRequest(tmp_path, environ={}).install()
    yield request
    request.restore()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_asks_and_its_repetition_does_no_harm(stop: StopRequest, number: signal.Signals) -> None:
    assert stop.reason is None
    for _ in range(3):
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == f"signal {number.name}"


def test_second_interrupt_leaves_at_once(stop: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.reason == "Ctrl-C"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_ignored_signals_stay_ignored_and_all_are_given_back(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        request = StopRequest(tmp_path, environ={}).install()
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.reason is None
        request.restore()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stop_file(stop: StopRequest, tmp_path: Path) -> None:
    assert stop.reason is None
    (tmp_path / "STOP").touch()
    deadline = time.monotonic() + 5
    while stop.reason is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stop.reason == f"the file {tmp_path / 'STOP'}"
    stop.clear_stop_file()
    assert not (tmp_path / "STOP").exists()
    assert stop.reason is not None


def test_deadlines() -> None:
    assert StopRequest(environ={}).deadline == float("inf")
    own = StopRequest(max_time="0.1s", environ={"SLURM_JOB_END_TIME": str(time.time() + 9999)})
    time.sleep(0.12)
    assert own.reason == "the time limit of 0.1s"
    for left, margin in ((36000.0, 120.0), (100.0, 10.0)):
        slurm = StopRequest(environ={"SLURM_JOB_END_TIME": str(int(time.time() + left))})
        assert slurm.deadline - time.monotonic() == pytest.approx(left - margin, abs=2)
        assert slurm.reason is None
    over = StopRequest(environ={"SLURM_JOB_END_TIME": str(int(time.time() - 5))})
    assert over.reason == "the end of the Slurm job"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1.5h", 5400), (" 2D ", 172800), ("12:00:30", 43230), ("1-02:03:04", 93784)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["60", "", "12:00", "-5s", "1:99:00", "0s", "soon", "1h30m", "infs"])
def test_durations_that_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="max_time"):
        parse_duration(text)
