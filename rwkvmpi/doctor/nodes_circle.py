"""Rank 0 asks all ranks and tells them what is next, and nobody waits for a silent one for ever.

Work is done in a thread while the rank itself gives signs of life, so that "still busy" and "lost" are told apart: a
collective call of MPI would wait for a lost rank without end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rwkvmpi.doctor.node_bounded import Hung, Work
from rwkvmpi.errors import UserError

SILENCE_S = 120.0  # while Python loads a library from a slow file system, nothing else of it runs
WORK_LIMIT_S = 120.0
BEAT_EVERY_S = 1.0
LOOK_EVERY_S = 1e-3
CLOCK_ROUNDS = 16
CLOCK_RANKS = 16  # asked at a time: more would wait for each other and look far away
_ALIVE, _ANSWER, _TOLD, _ASKS_TIME, _TIME = range(5)


class SilenceError(Exception):
    """Rank 0 has not been heard of for too long."""


@dataclass(frozen=True)
class Answer:
    """What a rank's work returned; `trouble` says why there is nothing."""

    value: Any = None
    trouble: str = ""


class Circle:
    """All ranks of `comm`. Every rank calls `collect` and `tell` in the same order; only rank 0 gets the answers."""

    def __init__(self, comm: Any, silence_s: float = SILENCE_S) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.lost: dict[int, str] = {}  # who was silent for too long, and when
        self._comm, self._silence_s, self._step = comm, silence_s, 0
        others = range(1, self.size) if self.rank == 0 else [0]
        self._heard = dict.fromkeys(others, time.monotonic())
        self._next_beat = 0.0
        self._sends: list[Any] = []
        self._receives: list[Any] = []
        self._answers: dict[tuple[int, int], Answer] = {}
        self._told: dict[int, Any] = {}
        self._times: dict[tuple[int, int], tuple[float, float]] = {}  # (rank, round): theirs, ours when it came

    def collect(self, what: str, work: Callable[[], Any], limit_s: float = WORK_LIMIT_S) -> list[Answer]:
        """The answers of all ranks in their order, on rank 0 ([] elsewhere). Work that takes longer than `limit_s` is
        left behind. Whoever has been silent for too long is `lost` from then on; `what` says in what."""
        self._step += 1
        under_way, until = Work(work), time.monotonic() + limit_s
        self._heard = dict.fromkeys(self._heard, time.monotonic())
        while not under_way.over(LOOK_EVERY_S) and time.monotonic() < until:
            self._look()
        own = _answer(under_way, f"{what}: not done within {limit_s:.0f} s")
        if self.rank != 0:
            self._send(0, _ANSWER, (self._step, own))
            return []
        self._answers[self._step, 0] = own
        while missing := [rank for rank in self._present() if (self._step, rank) not in self._answers]:
            self._look()
            for rank in missing:
                if self._silent(rank):
                    self.lost[rank] = what
            time.sleep(LOOK_EVERY_S)
        return [self._answers.pop((self._step, rank), self._no_answer(rank)) for rank in range(self.size)]

    def tell(self, value: Any = None) -> Any:
        """Rank 0's value on every rank. SilenceError on a rank that hears nothing of rank 0 for too long."""
        self._step += 1
        if self.rank == 0:
            for rank in self._present()[1:]:
                self._send(rank, _TOLD, (self._step, value))
            self._look()
            return value
        self._heard[0] = time.monotonic()
        while self._step not in self._told:
            self._look()
            if self._silent(0):
                raise SilenceError(f"rank 0 has not been heard of for {self._silence_s:.0f} s")
            time.sleep(LOOK_EVERY_S)
        return self._told.pop(self._step)

    def allgather(self, value: Any) -> list[Any]:
        """Every rank's value on every rank, as MPI's own, but SilenceError where one is lost."""
        answers = self.tell(self.collect("a short exchange", lambda: value))
        if any(answer.trouble for answer in answers):
            raise SilenceError(
                f"not all ranks answer: {'; '.join(answer.trouble for answer in answers if answer.trouble)}"
            )
        return [answer.value for answer in answers]

    def clocks(self, ranks: list[int]) -> dict[int, tuple[float, float]]:
        """rank -> (its wall clock minus rank 0's, seconds of the quickest round trip), on rank 0 while the others wait
        in `tell`. Ranks that do not answer are left out."""
        found: dict[int, tuple[float, float]] = {}
        for first in range(0, len(ranks), CLOCK_RANKS):
            some = [rank for rank in ranks[first : first + CLOCK_RANKS] if rank not in self.lost]
            for number in range(CLOCK_ROUNDS):
                for rank in some:
                    if trip := self._ask_time(rank, number):
                        found[rank] = min(found.get(rank, trip), trip, key=lambda one: one[1])
        return found

    def _ask_time(self, rank: int, number: int) -> tuple[float, float] | None:
        self._times.clear()
        begun = time.time()
        self._send(rank, _ASKS_TIME, number)
        until = time.monotonic() + self._silence_s
        while (rank, number) not in self._times:
            self._look()
            if time.monotonic() > until:
                self.lost[rank] = "the clocks"
                return None
        theirs, ended = self._times[rank, number]
        return theirs - (begun + ended) / 2, ended - begun

    def _present(self) -> list[int]:
        return [rank for rank in range(self.size) if rank not in self.lost]

    def _no_answer(self, rank: int) -> Answer:
        return Answer(trouble=f"silent for more than {self._silence_s:.0f} s, at {self.lost.get(rank, '?')}")

    def _silent(self, rank: int) -> bool:
        return rank in self._heard and time.monotonic() > self._heard[rank] + self._silence_s

    def _send(self, rank: int, kind: int, content: Any) -> None:
        self._sends.append(self._comm.isend((kind, self.rank, content), dest=rank))

    def _look(self) -> None:
        """Take what has come, let go of what has been sent, give a sign of life when one is due. Does not block."""
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + BEAT_EVERY_S
            for rank in self._heard:
                if rank not in self.lost:
                    self._send(rank, _ALIVE, None)
        self._sends = [request for request in self._sends if not request.test()[0]]
        while (message := self._comm.improbe()) is not None:
            self._receives.append(message.irecv())
        under_way = []
        for request in self._receives:
            done, content = request.test()
            if done:
                self._take(*content)
            else:
                under_way.append(request)
        self._receives = under_way

    def _take(self, kind: int, rank: int, content: Any) -> None:
        self._heard[rank] = time.monotonic()
        if kind == _ANSWER:
            step, answer = content
            self._answers[step, rank] = answer
        elif kind == _TOLD:
            step, value = content
            self._told[step] = value
        elif kind == _ASKS_TIME:
            self._send(rank, _TIME, (content, time.time()))
        elif kind == _TIME:
            number, theirs = content
            self._times[rank, number] = theirs, time.time()


def _answer(work: Work[Any], late: str) -> Answer:
    if not work.over():
        return Answer(trouble=late)
    try:
        return Answer(work.result())
    except (Hung, OSError, UserError) as error:
        return Answer(trouble=str(error))
    except Exception as error:
        return Answer(trouble=f"{type(error).__name__}: {error}")
