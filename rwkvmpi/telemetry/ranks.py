"""What the samples of a run's ranks say: who reads how fast, who waits for whom, and of whom nothing is heard.

Plain facts and sentences, for `watch` and `status` alike; what a sample leaves out is None or empty here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rwkvmpi.cluster.logs import duration
from rwkvmpi.telemetry.sample import Sample

NETWORK_SILENCE_S = 5.0  # a sample comes every second
FILES_EVERY_S = 5.0  # how often a rank writes its file in a small job; in a large one every size/50 seconds
FILES_SILENCE = 4  # so many of a file's turns may be missed: the file system passes changes on when it likes
LONG_WAIT_S = 10.0
ENDED = "all ranks are done; rank 0 writes what is left to write"


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank as its last sample shows it. None: the sample does not say.

    place: (stage, slot, replica). busy: share of its reading that it computed, 0 to 1. rate: tokens/s. waits_for: the
    rank of the other side; waited: seconds in all; neighbours: of them for each neighbour. memory in bytes.
    """

    rank: int
    host: str
    time: float
    attempt: int
    place: tuple[int, int, int] | None = None
    phase: str = ""
    chunk: int | None = None
    chunks: int | None = None
    rate: float | None = None
    busy: float | None = None
    waits: bool = False
    waits_for: int | None = None
    waits_what: str = ""
    waits_since_s: float = 0.0
    waited: float = 0.0
    neighbours: tuple[tuple[int, float], ...] = ()
    memory: float | None = None
    device_memory: float | None = None
    commit: int | None = None

    @property
    def over(self) -> bool:
        """It has read everything and sends no more samples."""
        return self.phase == "done"


def rank_of(sample: Sample) -> Rank:
    """The rank that a sample, checked by `sample.decode`, speaks of."""
    place = sample.get("stage"), sample.get("slot"), sample.get("replica")
    busy_s, reading_s = sample.get("busy_s"), sample.get("reading_s") or 0.0
    waiting = sample.get("waiting")
    neighbours = [(int(key), value) for key, value in sample.get("neighbours", {}).items() if key.isdecimal()]
    return Rank(
        sample["rank"],
        host=sample.get("host", ""),
        time=sample["time"],
        attempt=sample["attempt"],
        place=None if None in place else place,  # type: ignore[arg-type]
        phase=sample.get("phase", ""),
        chunk=sample.get("chunk"),
        chunks=sample.get("chunks"),
        rate=sample.get("tokens_per_second"),
        busy=min(1.0, max(0.0, busy_s / reading_s)) if busy_s is not None and reading_s > 0 else None,
        waits=waiting is not None,
        waits_for=waiting["rank"] if waiting else None,
        waits_what=waiting["what"] if waiting else "",
        waits_since_s=waiting["since_s"] if waiting else 0.0,
        waited=sum(sample.get("waits", {}).values()),
        neighbours=tuple(sorted(neighbours, key=lambda entry: -entry[1])),
        memory=sample.get("rss_bytes"),
        device_memory=sample.get("device_bytes"),
        commit=sample.get("commit"),
    )


def ranks_of(samples: Iterable[Sample], attempt: int | None = None) -> dict[int, Rank]:
    """All ranks by number; samples that another start of the job left behind are passed over."""
    found = map(rank_of, samples)
    known = [rank for rank in found if attempt is None or rank.attempt == attempt]
    return {rank.rank: rank for rank in sorted(known, key=lambda rank: rank.rank)}


def silence_limit(way: str, size: int) -> float:
    """Seconds without a new sample after which a rank counts as silent. way: "network" or "files"."""
    return NETWORK_SILENCE_S if way == "network" else FILES_SILENCE * max(FILES_EVERY_S, size / 50)


def silent_ranks(ranks: Mapping[int, Rank], ages: Mapping[int, float], limit: float) -> list[int]:
    """Ranks whose sample is older than `limit` seconds and that have not ended, the oldest first."""
    old = [number for number, rank in ranks.items() if not rank.over and ages.get(number, 0.0) > limit]
    return sorted(old, key=lambda number: -ages[number])


def rate_of_all(ranks: Mapping[int, Rank], silent: Collection[int] = ()) -> float | None:
    """Tokens/s of the whole job: what its last stages read, since every stage reads the same tokens. Silent ranks and
    those that have ended do not count. None: unknown."""
    last = max((rank.place[0] for rank in ranks.values() if rank.place is not None), default=None)
    of_last = [r for r in ranks.values() if r.place is not None and r.place[0] == last and r.rank not in silent]
    rates = [rank.rate for rank in of_last if rank.rate is not None and not rank.over]
    return sum(rates) if rates else None


def slowest(ranks: Mapping[int, Rank]) -> Rank | None:
    """The rank with the lowest rate of those that are reading; None where there are not two of them."""
    reading = [rank for rank in ranks.values() if rank.phase == "reading" and rank.rate is not None]
    return min(reading, key=lambda rank: rank.rate or 0.0) if len(reading) > 1 else None


def most_waiting(ranks: Mapping[int, Rank]) -> Rank | None:
    """The rank that has waited longest in all; None where nobody waited worth a word, or there are not two."""
    longest = max(ranks.values(), key=lambda rank: rank.waited, default=None)
    return longest if longest is not None and longest.waited >= 0.1 and len(ranks) > 1 else None


def held_up_by(ranks: Mapping[int, Rank], number: int) -> int | None:
    """The rank at the end of the chain "waits for ... waits for": itself not waiting for another, or unknown here.

    None when the chain closes to a circle, or `number` waits for no rank.
    """
    seen = {number}
    at = ranks.get(number)
    while at is not None and at.waits_for is not None:
        following = at.waits_for
        if following in seen:
            return None
        seen.add(following)
        at = ranks.get(following)
        number = following
    return number if len(seen) > 1 else None


def stalls(ranks: Mapping[int, Rank], ages: Mapping[int, float], limit: float) -> list[str]:
    """A sentence for each thing that holds the run up, the worst first; empty where all is well."""
    silent = silent_ranks(ranks, ages, limit)
    by_host: dict[str, list[int]] = {}
    for number in silent:
        by_host.setdefault(ranks[number].host, []).append(number)
    found = [_silence(host, those, ages) for host, those in by_host.items()]
    behind: dict[int | None, list[Rank]] = {}
    alone: list[Rank] = []
    for rank in ranks.values():
        if rank.waits and rank.waits_since_s >= LONG_WAIT_S and rank.rank not in silent:
            if rank.waits_for is None:
                alone.append(rank)
            else:
                behind.setdefault(held_up_by(ranks, rank.rank), []).append(rank)
    for cause, waiting in sorted(behind.items(), key=lambda entry: -len(entry[1])):
        longest = max(waiting, key=lambda rank: rank.waits_since_s)
        who = numbers([rank.rank for rank in waiting])
        verb = "waits" if len(waiting) == 1 else "wait"
        since = f"{verb} {'' if len(waiting) == 1 else 'up to '}{duration(longest.waits_since_s)}"
        if cause is None:
            found.append(f"{who} {since} for each other")
        else:
            found.append(f"{who} {since} for {_cause(ranks, cause, ages, limit)}")
    alone.sort(key=lambda rank: -rank.waits_since_s)
    found += [f"{named(r)} waits {duration(r.waits_since_s)} for {r.waits_what or 'something'}" for r in alone]
    return found


def named(rank: Rank) -> str:
    """rank 3 (n2)"""
    return f"rank {rank.rank} ({rank.host})" if rank.host else f"rank {rank.rank}"


def numbers(ranks: list[int], most: int = 6) -> str:
    """rank 3; ranks 3, 4, 5; ranks 3, 4, 5, 6, 7, 8 and 90 more"""
    shown = ", ".join(map(str, ranks[:most]))
    more = f" and {len(ranks) - most:,} more" if len(ranks) > most else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def amount(value: Any) -> float | None:
    """A number from 0 up, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value) if value >= 0 else None


def whole(value: Any) -> int | None:
    """A whole number from 0 up, else None."""
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _silence(host: str, silent: list[int], ages: Mapping[int, float]) -> str:
    where = f" ({host})" if host else ""
    if len(silent) == 1:
        return f"rank {silent[0]}{where} has been silent for {duration(ages[silent[0]])}"
    return f"{numbers(sorted(silent))}{where} have been silent for up to {duration(ages[silent[0]])}"


def _cause(ranks: Mapping[int, Rank], number: int, ages: Mapping[int, float], limit: float) -> str:
    rank = ranks.get(number)
    if rank is None:
        return f"rank {number}, of which there is no sample"
    if rank.over:
        return f"{named(rank)}, which has ended"
    if ages.get(number, 0.0) > limit:
        return f"{named(rank)}, which is silent"
    if rank.waits:
        return f"{named(rank)}, which waits for {rank.waits_what or 'something'}"
    return f"{named(rank)}, which waits for nobody"
