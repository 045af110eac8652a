"""Who says what: rank 0 speaks on stderr, the others only warn, and every rank keeps a log file of its own."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

LOGGER = "rwkvmpi"
LINE_EVERY_S = 30.0
FIRST_LINES_S = (3.0, 10.0)  # sooner at first: half a minute of silence looks like a fault


def log_path(run: Path, rank: int) -> Path:
    """RUN/logs/rank_00003.log"""
    return run / "logs" / f"rank_{rank:05d}.log"


def setup(run: Path | None, rank: int = 0, size: int = 1) -> logging.Logger:
    """Set up the logger "rwkvmpi" and return it; `run` None: no file. A second call replaces the first.

    The file is appended to by every start of the job, one line per event with its UTC time, and takes the Python
    tracebacks of a crash in native code; SIGUSR2 writes where every thread stands into it, for a job that hangs.
    """
    logger = logging.getLogger(LOGGER)
    close()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    prefix = "" if rank == 0 else f"[{rank}/{size}] "
    screen = _Stderr(logging.INFO if rank == 0 else logging.WARNING)
    screen.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.addHandler(screen)
    if run is not None:
        path = log_path(run, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        logger.addHandler(handler)
        assert handler.stream is not None
        faulthandler.enable(handler.stream)
        faulthandler.register(signal.SIGUSR2, handler.stream, all_threads=True)
    logging.captureWarnings(True)
    warnings = logging.getLogger("py.warnings")
    warnings.propagate = False
    for other in logger.handlers[1:]:  # third parties' warnings go to the file only
        warnings.addHandler(other)
    return logger


def close() -> None:
    """Flush and close the log file; later words go nowhere but stderr."""
    logging.captureWarnings(False)
    for name in (LOGGER, "py.warnings"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            if isinstance(handler, logging.FileHandler):
                _release_faulthandler()
            handler.close()


def to_file(text: str) -> None:
    """Write to this rank's log file only, if there is one: what is already on stderr need not be there twice."""
    logger = logging.getLogger(LOGGER)
    record = logger.makeRecord(LOGGER, logging.CRITICAL, __file__, 0, text, (), None)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
            handler.flush()


class Progress:
    """Rank 0's word on how far the job is: a bar on a terminal, else a line after 3, 10, 30, 60, 90, ... seconds.

    Under mpirun stderr is a pipe even on a terminal, so there the lines appear. All counts given are totals of the
    whole job, earlier attempts included; the rate counts from this start.

    documents, nbytes: what there is to do; done_before: (tokens, bytes) finished by earlier attempts
    """

    def __init__(
        self,
        documents: int,
        nbytes: int,
        done_before: tuple[int, int] = (0, 0),
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._documents, self._nbytes, self._before = documents, max(1, nbytes), done_before
        self._stream, self._clock, self._start = stream, clock, clock()
        self._next_line = self._start + FIRST_LINES_S[0]
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        stream = self._stream or sys.stderr
        if stream.isatty():
            self._start_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, documents: int, tokens: int, nbytes: int, failed: int = 0) -> None:
        """Tell the state of the job; call it as often as you like, it writes when it is time."""
        now = self._clock()
        if self._bar is not None:
            self._bar.update(self._task, completed=nbytes, words=self._words(now, documents, tokens, failed))
        elif now >= self._next_line:
            self._next_line = self._line_after(now)
            stream = self._stream or sys.stderr
            percent = 100 * min(1.0, nbytes / self._nbytes)
            left = self._seconds_left(now, nbytes)
            ending = f", about {duration(left)} left" if left is not None else ""
            print(f"{percent:.0f}%: {self._words(now, documents, tokens, failed)}{ending}", file=stream, flush=True)

    def _words(self, now: float, documents: int, tokens: int, failed: int) -> str:
        rate = (tokens - self._before[0]) / max(now - self._start, 1e-9)
        words = f"{documents} of {self._documents} documents, {quantity(tokens)} tokens, {quantity(rate)} tokens/s"
        return words + (f", {failed} failed" if failed else "")

    def _seconds_left(self, now: float, nbytes: int) -> float | None:
        done = nbytes - self._before[1]
        if done <= 0 or nbytes > self._nbytes:
            return None
        return (self._nbytes - nbytes) * (now - self._start) / done

    def _line_after(self, now: float) -> float:
        elapsed = now - self._start
        for moment in FIRST_LINES_S:
            if elapsed < moment:
                return self._start + moment
        return self._start + (elapsed // LINE_EVERY_S + 1) * LINE_EVERY_S

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[words]}"), TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(file=self._stream or sys.stderr))
        self._task = self._bar.add_task("", total=self._nbytes, completed=self._before[1], words="")
        self._bar.start()


def quantity(number: float) -> str:
    """A number for reading: 950, 45.1 k, 1.23 M."""
    for limit, divisor, unit in ((1e9, 1e9, " G"), (1e6, 1e6, " M"), (1e4, 1e3, " k")):
        if abs(number) >= limit:
            scaled = number / divisor
            return f"{scaled:.3g}{unit}" if scaled < 1000 else f"{scaled:.0f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds for reading: 0.4 s, 45 s, 12 min, 3.5 h, 4 days."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds else "0 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.0f} days"


class _Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at the moment, so that lines pass above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that went away must not end a job
            words = self.format(record).encode("utf-8", "backslashreplace").decode()  # ids of files may be any bytes
            print(words, file=sys.stderr, flush=True)


def _release_faulthandler() -> None:
    faulthandler.unregister(signal.SIGUSR2)
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    else:
        faulthandler.disable()
