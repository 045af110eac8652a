"""A sample: what one rank says of itself at one moment, as a flat JSON object on one line.

{"rank":3,"ranks":16,"host":"n2","pid":4711,"time":<unix s>,"attempt":2,"stage":0,"slot":1,"replica":0,
 "phase":"reading","chunk":17,"chunks":40,"tokens":40960,"tokens_per_second":812.5,"busy_s":9.1,"reading_s":9.9,
 "waits":{"activations or tokens":0.5},"neighbours":{"2":0.5},
 "waiting":{"rank":2,"what":"a message (state of layer 3)","since_s":0.4},
 "rss_bytes":..,"device_bytes":..,"commit":12,"sampling_s":0.01,"job":{..}}

Readers take nothing on trust: a file may be torn and a network peer anybody, so sizes are bounded, known keys must have
their types, numbers are finite and strings printable. Keys that are not known pass with the same bounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

Sample = dict[str, Any]

MAX_BYTES = 1 << 16
_MAX_TEXT, _MAX_ITEMS, _MAX_DEPTH, _MAX_INTEGER = 300, 8192, 5, 1 << 63


def encode(sample: Sample) -> bytes:
    """One line of JSON, with its newline. ValueError or TypeError for what JSON has no word for, or too much of it."""
    data = json.dumps(sample, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    if len(data) > MAX_BYTES:
        raise ValueError(f"a sample of {len(data):,} bytes; at most {MAX_BYTES:,} are allowed")
    return data


def decode(data: bytes) -> Sample:
    """The sample in the first line of `data`. ValueError says why there is none."""
    line, _, _ = data[: MAX_BYTES + 1].partition(b"\n")
    if len(line) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes")
    try:
        sample = _clean(json.loads(line), 0)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(sample, dict):
        raise ValueError("no JSON object")
    for key, is_right in _KNOWN.items():
        if key in sample and not is_right(sample[key]):
            raise ValueError(f"{key} is {str(sample[key])[:40]!r}")
    if missing := [key for key in _ALWAYS if key not in sample]:
        raise ValueError(f"{missing[0]} is missing")
    return sample


def parse(data: bytes) -> Sample | None:
    """`decode`, or None for what is no sample."""
    try:
        return decode(data)
    except ValueError:
        return None


def printable(text: str) -> str:
    """For a terminal: what could move its cursor or change its colours becomes a question mark."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def _clean(value: Any, depth: int) -> Any:
    """The JSON value within bounds, and its texts without anything that a terminal would obey."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if abs(value) >= _MAX_INTEGER:
            raise ValueError("a number that is too large")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number that is not finite")
        return value
    if isinstance(value, str):
        text = value[:_MAX_TEXT]
        return printable(text)
    if depth >= _MAX_DEPTH or len(value) > _MAX_ITEMS:
        raise ValueError("nested too deeply, or too many items")
    if isinstance(value, list):
        return [_clean(item, depth + 1) for item in value]
    return {_clean(key, depth): _clean(item, depth + 1) for key, item in value.items()}


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return _integer(value) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _seconds_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


def _waiting(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    rank, what, since = value.get("rank"), value.get("what"), value.get("since_s")
    return _or_none(_count)(rank) and _text(what) and _number(since)


def _or_none(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


_ALWAYS = ("rank", "ranks", "time", "attempt")
_KNOWN: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("rank", "ranks", "attempt", "pid", "stage", "slot", "replica", "chunks", "tokens"), _count),
    **dict.fromkeys(("time", "tokens_per_second", "busy_s", "reading_s", "sampling_s"), _number),
    **dict.fromkeys(("chunk", "rss_bytes", "device_bytes", "commit"), _or_none(_integer)),
    **dict.fromkeys(("host", "phase"), _text),
    **dict.fromkeys(("waits", "neighbours"), _seconds_by_name),
    "waiting": _or_none(_waiting),
    "job": _or_none(lambda value: isinstance(value, dict)),
}
