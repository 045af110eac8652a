"""Why a run stopped, in the words that its ranks left in their log files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

MAX_WORDS = 3
_TAIL = 1 << 14
_LOG_NAME = re.compile(r"rank_(\d{5,})\.log")
_RECORD = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ([A-Z]+) ", re.MULTILINE)
_NATIVE_CRASH = re.compile(r"^Fatal Python error: .*", re.MULTILINE)
_STOPPED, _NOTICE = "stopped by ", "exit code "  # rank 0's last words in good order; the second may follow the first
_CONSEQUENCE = "the launcher is gone"  # every rank of a killed mpirun says so


def last_words(logs: Path, since: float) -> list[dict[str, Any]]:
    """What ranks wrote as the very last thing before they ended, the earliest first, at most 3.

    logs: RUN/logs. since: seconds since the epoch, by the file system's clock; files not written to after it are of an
    earlier start of the job and are passed over. Each {rank, time (UTC, by the rank's host), log, text}: a crash's
    first line and its exception, the sentence of an error, or rank 0's word on what stopped it. A rank that was killed
    leaves none.
    """
    found: list[dict[str, Any]] = []
    try:
        entries = [(match, entry) for entry in os.scandir(logs) if (match := _LOG_NAME.fullmatch(entry.name))]
    except OSError:
        return []
    for match, entry in entries:
        try:
            if entry.stat().st_mtime < since:
                continue
            words = _of_file(Path(entry.path))
        except OSError:
            continue
        if words is not None:
            found.append({"rank": int(match[1]), "time": words[0], "log": entry.path, "text": words[1]})
    return sorted(found, key=lambda words: (_CONSEQUENCE in words["text"], words["time"], words["rank"]))[:MAX_WORDS]


def _of_file(path: Path) -> tuple[str, str] | None:
    """(time, text) of a log's last words, if its last record is one that ends a rank."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        tail = file.read().decode("utf-8", "replace")
    records = list(_RECORD.finditer(tail))
    ends = [record.start() for record in records[1:]] + [len(tail)]
    texts = [
        (record[1], record[2], tail[record.end() : end].strip()) for record, end in zip(records, ends, strict=True)
    ]
    last = texts[-1][2] if texts else tail
    if native := _NATIVE_CRASH.search(last):  # written by the interpreter itself, without a time
        return "", native[0]
    if not texts:
        return None
    if texts[-1][1] == "CRITICAL":
        return texts[-1][0], _in_short(last)
    if len(texts) > 1 and last.startswith(_NOTICE):
        texts.pop()
    return (texts[-1][0], texts[-1][2]) if texts[-1][2].startswith(_STOPPED) else None


def _in_short(text: str) -> str:
    """A sentence as it is; a traceback as its first and its last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and any(line.startswith("Traceback ") for line in lines):
        return f"{lines[0]}: {lines[-1].strip()}"
    return " ".join(line.strip() for line in lines)
