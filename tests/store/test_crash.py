"""kill -9 at any moment, again and again, loses nothing and changes nothing."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from kill_worker import LENGTHS
from store_cases import ENVIRONMENT, logprobs_of

from rwkvmpi.store.inspect import check
from rwkvmpi.store.results import content_digest, open_results
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.status import status

WORKER = Path(__file__).with_name("kill_worker.py")
ROUNDS = 2


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(WORKER), str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def commits_of(path: Path) -> int:
    return max((int(commit.stem) for commit in RunFolder(path).commit_paths()), default=0)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    process = start(tmp_path / "undisturbed")
    done, errors = process.communicate(timeout=60)
    assert done.startswith("DONE"), errors
    source, kills, resumed = random.Random(5), 0, 0
    for number in range(ROUNDS):
        path = tmp_path / f"run{number}"
        for attempt in range(40):
            process, seen, begun = start(path), commits_of(path), time.monotonic()
            wanted = seen + source.randrange(1, 8)  # die at some commit from here, at some moment around it
            while process.poll() is None and commits_of(path) < wanted and time.monotonic() < begun + 20:
                time.sleep(0.001)
            time.sleep(source.random() * 0.01)
            if attempt < 30 and process.poll() is None:
                process.kill()
                kills += 1
            said, errors = process.communicate(timeout=60)
            if process.returncode == 0:
                break
            assert process.returncode == -9, errors
            assert check(path) == []
            assert status(path)["state"] == "crashed"
            resumed += status(path)["commit"] is not None
        assert said == done
        assert content_digest(path / "results.h5") == done.split()[1]
        assert check(path) == []
        assert status(path)["state"] == "finished"
    assert kills >= 8
    assert resumed >= 6
    with open_results(tmp_path / "run0") as results:
        assert [row.tokens for row in results.documents] == LENGTHS
        assert results.tokens(7)[1].tobytes() == logprobs_of(7, 0, LENGTHS[7]).tobytes()
