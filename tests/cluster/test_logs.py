"""Who hears what, and what progress looks like."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from rwkvmpi.cluster import logs


@pytest.mark.parametrize("rank", [0, 3])
def test_screen_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int) -> None:
    log = logs.setup(tmp_path, rank, 8)
    try:
        log.debug("detail")
        log.info("news")
        log.warning("trouble \udc80")
        warnings.warn("from a library", stacklevel=1)
        logs.to_file("only here")
        screen = capsys.readouterr().err
        file = (tmp_path / "logs" / f"rank_{rank:05d}.log").read_text()
    finally:
        logs.close()
    assert ("news" in screen) == (rank == 0)
    assert ("[3/8] trouble" in screen) == (rank == 3)
    assert "detail" not in screen
    assert "only here" not in screen
    assert "from a library" not in screen
    assert all(word in file for word in ("DEBUG detail", "INFO news", "WARNING trouble \\udc80", "only here"))
    assert "from a library" in file
    log.info("after the end")
    assert "after the end" not in (tmp_path / "logs" / f"rank_{rank:05d}.log").read_text()


def test_a_native_crash_leaves_the_python_lines_in_the_log(tmp_path: Path) -> None:
    code = (
        "import ctypes, sys, pathlib; from rwkvmpi.cluster import logs;"
        "logs.setup(pathlib.Path(sys.argv[1])); ctypes.string_at(0)"
    )
    package = Path(logs.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=package).returncode < 0
    assert "Segmentation fault" in logs.log_path(tmp_path, 0).read_text()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_at_3_10_and_then_every_30_seconds() -> None:
    clock, stream = Clock(), io.StringIO()
    heard: list[int] = []
    with logs.Progress(340, 1_000_000, done_before=(50_000, 100_000), stream=stream, clock=clock) as progress:
        for second in range(1, 100):
            clock.now = 100.0 + second
            before = stream.tell()
            progress.update(second, 50_000 + 10_000 * second, 100_000 + 5_000 * second, failed=second // 60)
            if stream.tell() > before:
                heard.append(second)
    assert heard == [3, 10, 30, 60, 90]
    lines = stream.getvalue().splitlines()
    assert lines[2] == "25%: 30 of 340 documents, 350 k tokens, 10 k tokens/s, about 2 min left"
    assert lines[4].startswith("55%: 90 of 340 documents, 950 k tokens, 10 k tokens/s, 1 failed")


def test_numbers_for_reading() -> None:
    assert [logs.quantity(n) for n in (0, 950, 9999, 45_100, 1_230_000, 2e9)] == [
        "0", "950", "9999", "45.1 k", "1.23 M", "2 G",
    ]  # fmt: skip
    assert [logs.duration(s) for s in (0, 45, 720, 12600)] == ["0 s", "45 s", "12 min", "3.5 h"]
