"""--shard: the parts of a corpus, read on whatever ranks and merged, are what one job would have written."""

from __future__ import annotations

import json
import shlex
import subprocess
import time

import pytest
from launching import command, environment
from texts import text_of

from rwkvmpi.errors import UserError
from rwkvmpi.store.digest import content_digest
from rwkvmpi.store.inspect import check
from rwkvmpi.store.merge import merge
from rwkvmpi.store.parts import parts_status
from rwkvmpi.store.results import open_results

pytestmark = pytest.mark.parallel

GRIDS = {"alone": [], "ring": ["--ring", 2], "stages": ["--stages", 2], "replicas": ["--replicas", 2]}


def digest_of(run):
    return content_digest(run / "results.h5")


def test_parts_on_other_grids_one_of_them_killed(rwkvmpi, small_model, write_documents, tmp_path):
    docs = write_documents(tmp_path / "docs", [4000, 0, 33, 60_000, 1, 1025, 3000, 700])
    runs, arguments = tmp_path / "runs", ["score", small_model("7"), docs, "--chunk", 256, "--commit-every", "20c"]
    rwkvmpi(*arguments, "-o", tmp_path / "whole")
    # The fourth document is more than three quarters of all: the middle part is that one alone.
    plan = json.loads(rwkvmpi("plan", *arguments[1:3], "--shard", "2/3", "--json").stdout)
    assert (plan["documents"], plan["tokens"]) == (1, 60_000)
    rwkvmpi(*arguments, "--shard", "1/3", "-o", runs / "part-1", *GRIDS["ring"], ranks=2)
    middle = [*arguments, "--shard", "2/3", "-o", runs / "part-2"]
    process = subprocess.Popen(command(2, *middle, *GRIDS["stages"]), stderr=subprocess.PIPE, env=environment())
    deadline = time.monotonic() + 240
    while not any((runs / "part-2" / "commits").glob("*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    with pytest.raises(UserError, match=r"part 3 of 3 is missing; read it .--shard 3/3 -o .*part-3"):
        merge([runs], tmp_path / "all")
    rwkvmpi(*arguments, "--shard", "3/3", "-o", runs / "part-3", *GRIDS["replicas"], ranks=2)

    refused = rwkvmpi("merge", runs, "-o", tmp_path / "all", code=2)
    assert f"{runs / 'part-2'} (part 2 of 3): not finished" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "all").exists()
    facts = parts_status([runs])
    assert (facts["counts"], facts["array"]) == ({"finished": 2, "crashed": 1}, "2")
    [again] = facts["again"]
    assert (again["shard"], again["run"]) == ([2, 3], str(runs / "part-2"))
    other = rwkvmpi(*arguments, "--shard", "3/3", "-o", runs / "part-2", code=2)
    assert "was started with --shard = 2/3, now it is 3/3" in other.stderr
    assert "going on from commit" in rwkvmpi(*shlex.split(again["command"])[1:]).stderr

    assert "8 documents, merged from 3 parts" in rwkvmpi("merge", runs, "-o", runs / "all").stderr
    assert digest_of(runs / "all") == digest_of(tmp_path / "whole")
    assert check(runs / "all") == []
    facts = parts_status([runs])
    assert (facts["state"], facts["merged"]["state"]) == ("finished", "finished")
    # What was merged is the run of the single job, down to its identity.
    assert "is finished: 8 documents" in rwkvmpi(*arguments, "-o", runs / "all").stderr


@pytest.mark.thorough
def test_more_parts_than_documents_and_going_on_from_what_was_merged(rwkvmpi, small_model, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "d9.txt").symlink_to(docs / "nowhere")

    def job(task, name, *more, grid="alone", code=3):
        arguments = [task, small_model("7"), docs, "--chunk", 256, "-o", tmp_path / name, *GRIDS[grid], *more]
        rwkvmpi(*arguments, ranks=1 if grid == "alone" else 2, code=code)

    (docs / "d0.txt").write_bytes(text_of(5000, 1)[:3000])
    job("read", "whole")
    for number, grid in enumerate(["ring", "alone", "alone"], 1):
        job("read", f"parts/{number}", "--shard", f"{number}/3", grid=grid, code=3 if number == 3 else 0)
    held = []
    for number in range(1, 4):
        with open_results(tmp_path / f"parts/{number}") as results:
            held.append([row.id for row in results.documents])
    assert held == [[], ["d0.txt"], ["d9.txt"]]
    rwkvmpi("merge", tmp_path / "parts", "-o", tmp_path / "merged", code=3)
    assert digest_of(tmp_path / "merged") == digest_of(tmp_path / "whole")
    for task, grid, path in (("embed", "replicas", "embeddings/vector"), ("score", "stages", "tokens/id")):
        job(task, task, "--shard", "1/3", grid=grid, code=0)
        with open_results(tmp_path / task) as results:
            assert (len(results), results.shapes()[path][0]) == (0, 0)

    (docs / "d0.txt").write_bytes(text_of(5000, 1))
    job("score", "tail", "--from", tmp_path / "whole")
    for number, code in ((1, 0), (2, 3)):
        job("score", f"tails/{number}", "--shard", f"{number}/2", "--from", tmp_path / "merged", code=code)
    merge([tmp_path / "tails"], tmp_path / "tail-merged")
    assert digest_of(tmp_path / "tail-merged") == digest_of(tmp_path / "tail")
    with open_results(tmp_path / "tail-merged") as results:
        assert results.documents["tokens_before"].tolist() == [3000, 0]
