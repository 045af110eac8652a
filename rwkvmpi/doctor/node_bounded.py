"""Work that may never end, such as a look at a file system whose server is gone, done so that nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
LOOK_EVERY_S = 0.05


class Hung(Exception):
    """The work did not end, or did not go on, within its time; the sentence says so."""


class Work(Generic[Result]):
    """A function under way in a thread of its own, which is left behind where it hangs."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._over = threading.Event()
        threading.Thread(target=self._run, name="doctor", daemon=True).start()

    def over(self, wait_s: float = 0.0) -> bool:
        """Whether it has ended, if need be within so many seconds."""
        return self._over.wait(wait_s)

    def result(self) -> Result:
        """What it returned, or its exception raised here; only when it is over."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        finally:
            self._over.set()


def bounded(function: Callable[[], Result], limit_s: float, progress: Callable[[], Any] | None = None) -> Result:
    """The function's result. Hung when it has not ended after `limit_s`, or, with `progress`, when what that returns
    has not changed for so long."""
    work, seen = Work(function), progress() if progress else None
    until = time.monotonic() + limit_s
    while not work.over(LOOK_EVERY_S):
        if progress is not None and (now := progress()) != seen:
            seen, until = now, time.monotonic() + limit_s
        if time.monotonic() > until:
            raise Hung(f"{'nothing came for' if progress else 'it did not end within'} {limit_s:.0f} s")
    return work.result()
