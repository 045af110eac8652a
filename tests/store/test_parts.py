"""The parts of a corpus as status tells of them: which there are, which are missing, and how to read one again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from corpus_parts import all_parts, part_run

from rwkvmpi.errors import UserError
from rwkvmpi.store.identity import read_identity, write_identity
from rwkvmpi.store.merge import merge
from rwkvmpi.store.parts import parts_status, ranges
from rwkvmpi.store.run_folder import RunFolder

PLANNER = "--stages 0 --ring 0 --replicas 0 --threads 0"


def test_every_part_is_told_of(tmp_path: Path) -> None:
    folder = tmp_path / "the runs"
    runs = all_parts(folder)
    facts = parts_status([folder])
    assert (facts["state"], facts["parts_total"], facts["counts"]) == ("finished", 4, {"finished": 4})
    assert [row["shard"] for row in facts["parts"]] == [[1, 4], [2, 4], [3, 4], [4, 4]]
    assert [row["documents_done"] for row in facts["parts"]] == [0, 3, 1, 4]
    assert facts["totals"] == {
        "documents_done": 8,
        "documents_failed": 2,
        "documents_total": 8,
        "tokens_done": 70_406,
    }
    assert [facts[key] for key in ("missing", "array", "again", "merged", "others")] == [[], "", [], None, []]

    merge([folder], folder / "all")
    shutil.rmtree(runs[0].path)
    (runs[1].path / "SUCCESS").unlink()
    (runs[2].path / "results.h5").write_bytes(b"no HDF5")
    lock = RunFolder(runs[3].path)
    (lock.path / "SUCCESS").unlink()
    lock.lock.acquire()
    strange = part_run(folder / "strange", 2, chunk=512)
    (folder / "begun").mkdir()
    (folder / "begun" / "lock").touch()
    try:
        facts = parts_status([folder])
        named = parts_status(sorted(folder.iterdir()))
        assert all(named[key] == facts[key] for key in ("counts", "again", "others", "merged", "totals"))
    finally:
        lock.lock.release()
    assert facts["state"] == "running"
    assert facts["counts"] == {"missing": 1, "stopped": 1, "damaged": 1, "running": 1}
    assert facts["merged"] == {"run": str(folder / "all"), "state": "finished"}
    assert (facts["missing"], facts["array"]) == ([1], "1-3")
    where = f"'{folder}/part-0"
    assert [again["command"] for again in facts["again"]] == [
        f"rwkvmpi run {where}2/job.toml' -o {where}2' {PLANNER}",
        f"rwkvmpi run {where}3/job.toml' -o {where}3' --force {PLANNER}",
        f"rwkvmpi run {where}2/job.toml' --shard 1/4 -o {where}1' {PLANNER}",
    ]
    assert "cannot be opened as HDF5" in facts["parts"][1]["error"]
    others = {os.path.basename(other["run"]): other["why"] for other in facts["others"]}
    assert "which was started with chunk = 1024, and this one with 512" in others.pop(strange.path.name)
    assert "has not come so far as to say what it reads" in others.pop("begun")
    assert others == {}


def test_runs_that_are_no_parts_are_only_counted(tmp_path: Path) -> None:
    one, other = part_run(tmp_path / "runs" / "a"), part_run(tmp_path / "runs" / "b", 0, "embed")
    (other.path / "SUCCESS").unlink()
    facts = parts_status([tmp_path / "runs"])
    assert (facts["state"], facts["parts_total"], facts["missing"]) == ("unfinished", None, [])
    assert [(row["run"], row["shard"]) for row in facts["parts"]] == [(str(one.path), None), (str(other.path), None)]
    for shard in ("none", [1], ["1", "2"], [1, 2, 3], {"a": 1}):
        write_identity(one, {**(read_identity(one) or {}), "shard": shard})
        assert parts_status([one.path])["parts_total"] is None
    with pytest.raises(UserError, match="No such file or directory; give run folders, or one folder that holds them"):
        parts_status([tmp_path / "none"])


def test_ranges() -> None:
    assert ranges([]) == ""
    assert ranges([11, 1, 3, 2, 9, 10]) == "1-3,9-11"
