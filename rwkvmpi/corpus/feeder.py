"""Reading and tokenising ahead of the compute, in a child process of its own.

Not in a thread: tokenizers hold the GIL, and the loop over chunks must never wait for one. Not by fork(): the parent
has MPI, threads and perhaps a GPU in its hands.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, cast

import rwkvmpi
from rwkvmpi.corpus.events import Begin, Block, End, Event, Failed, InFlight, TokenCursor
from rwkvmpi.corpus.feeder_child import HANDLED_BY_PARENT
from rwkvmpi.corpus.frames import read_event
from rwkvmpi.corpus.index import DocumentRef

__all__ = ["Begin", "Block", "End", "Event", "Failed", "Feeder", "InFlight", "TokenCursor"]

READ_AHEAD = 2 << 20  # bytes of events that wait in the parent; a pipe's and a block's worth more is under way


class Feeder:
    """Documents in, events out, in the order of the requests.

    For every request: Begin, Blocks, End; or Failed at any point. Make it in a thread that lives as long as it does:
    the kernel ends the child with that thread. A crash of the child is a RuntimeError in request() or read().
    """

    def __init__(
        self,
        tokenizer_spec: str,
        vocab_size: int,
        *,
        text_key: str = "text",
        digests: bool = False,
        read_ahead: int = READ_AHEAD,
    ) -> None:
        """tokenizer_spec, vocab_size: as load_tokenizer() takes them; text_key: as build_index() takes it; digests:
        whether every End shall carry the SHA-256 of the text."""
        self.waited = 0.0  # seconds that read() had nothing to give
        self._events: deque[tuple[Event, int]] = deque()
        self._queued = 0
        self._read_ahead = read_ahead
        self._outstanding = 0
        self._ended = False
        self._closed = False
        self._condition = threading.Condition()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._child = _start(self._errors)
        self._stdin = cast(BinaryIO, self._child.stdin)
        self._thread = threading.Thread(target=self._take_events, name="feeder", daemon=True)
        self._thread.start()
        config = {"tokenizer": tokenizer_spec, "vocab_size": vocab_size, "text_key": text_key, "digests": digests}
        self._send({**config, "parent": os.getpid()})

    def request(self, ref: DocumentRef, resume: InFlight | None = None) -> None:
        """Ask for a document, to be read after those asked for before; from where it was left if `resume` says so.

        One that is handed on (ref.handed_sha256) is Failed unless its text begins with what was read of it; else its
        events tell what comes after that. Returns at once. ValueError when `resume` belongs to another document or
        contradicts itself.
        """
        doc, position, cursor = resume or InFlight(ref.index, 0, TokenCursor(0, 0))
        if doc != ref.index or cursor.tokens_before > max(0, position - 1):
            raise ValueError(f"document {ref.index} cannot be resumed with {resume}")
        self._outstanding += 1
        self._send({"ref": asdict(ref), "position": position, **cursor._asdict()})

    @property
    def outstanding(self) -> int:
        """Documents asked for whose End or Failed has not been read yet."""
        return self._outstanding

    @property
    def ready(self) -> bool:
        """Whether read() would return, or raise, at once."""
        return bool(self._events) or self._ended

    def read(self, timeout: float | None = None) -> Event | None:
        """The next event, or None when there is none within `timeout` seconds (None: wait as long as it takes).

        RuntimeError when it would wait for ever since nothing was asked for, or when the child crashed.
        """
        with self._condition:
            if not self._events:
                if not self._outstanding and timeout is None:
                    raise RuntimeError("no document was asked for")
                start = time.monotonic()
                self._condition.wait_for(lambda: self._events or self._ended, timeout)
                self.waited += time.monotonic() - start
            if not self._events:
                if self._ended:
                    raise self._crash()
                return None
            event, size = self._events.popleft()
            self._queued -= size
            self._condition.notify_all()
        if isinstance(event, End | Failed):
            self._outstanding -= 1
        return event

    def close(self) -> None:
        """End the child, whatever it is doing. May be called twice."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._child.kill()
        self._child.wait()
        self._thread.join()
        for pipe in (self._child.stdin, self._child.stdout, self._errors):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass

    def __enter__(self) -> Feeder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: dict) -> None:
        try:
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise self._crash() from None

    def _take_events(self) -> None:
        """The reading thread: moves events from the pipe to the queue as long as there is room."""
        pipe = cast(BinaryIO, self._child.stdout)
        while (item := read_event(pipe)) is not None:
            with self._condition:
                self._condition.wait_for(lambda: self._queued < self._read_ahead or self._closed)
                if self._closed:
                    return
                self._events.append(item)
                self._queued += item[1]
                self._condition.notify_all()
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def _crash(self) -> RuntimeError:
        code = self._child.wait()
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 4096))
        said = self._errors.read().decode("utf-8", "replace").strip()
        return RuntimeError(f"the process that reads and tokenises ended {how}; it said: {said or '(nothing)'}")


def _start(errors: object) -> subprocess.Popen[bytes]:
    # -P: the current folder is the user's, and a file tokenize.py in it must not become a module of ours.
    command = [sys.executable, "-P", "-m", "rwkvmpi.corpus.feeder_child"]
    environment = dict(os.environ)
    # Find this very package, also when it is not installed but run from its folder.
    root = str(Path(cast(str, rwkvmpi.__file__)).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    # One core is all it needs; the others belong to the compute.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        environment[variable] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    # A stop signal that comes before the child ignores it would end it: it starts with them blocked.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_BY_PARENT)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,  # type: ignore[call-overload]
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
