"""What people see of a run: export, inspect and status, through the command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from store_cases import ENVIRONMENT, LAYERS, WIDTH, WKV, entries, ids_of, logprobs_of, new_run, simple_run, vector_of

from rwkvmpi.cli import group
from rwkvmpi.errors import UserError
from rwkvmpi.store.commits import Commit, write_commit
from rwkvmpi.store.results import content_digest, open_results
from rwkvmpi.store.shards import ShardBuilder
from rwkvmpi.store.status import status
from rwkvmpi.telemetry import files
from rwkvmpi.telemetry.sample import encode

LENGTHS = [70_000, 0, 3, 40]


def call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(group, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_scores_as_json_lines_and_parquet(tmp_path: Path) -> None:
    run = simple_run(tmp_path / "run", LENGTHS, failed=[2])
    assert "results.jsonl" in call("export", run.path, "--tokens").output
    call("export", run.path, "--to", "parquet", "--tokens", "-o", tmp_path / "scores.parquet")
    call("export", run.results, "--to", "jsonl", "-o", tmp_path / "short.jsonl")
    told, short = records(run.path / "results.jsonl"), records(tmp_path / "short.jsonl")
    table = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert table == [{**record, "logprobs": np.float32(record["logprobs"]).astype(float).tolist()} for record in told]
    assert short == [{key: record[key] for key in short[0]} for record in told]
    assert call("export", run.path, "-o", "-").output == (tmp_path / "short.jsonl").read_text()
    with open_results(run.path) as results:
        for doc, (record, row) in enumerate(zip(told, results.documents, strict=True)):
            assert (record["id"], record["source"]) == (entries(4)[doc].id, entries(4)[doc].source)
            assert (record["bytes"], record["tokens"], record["status"]) == (row.bytes, row.tokens, row.status)
            if doc == 2:
                assert (record["nll"], record["bits_per_byte"]) == (None, None)
                assert record["error"] == "document 2 is broken"
                continue
            assert (record["nll"], record["bits_per_byte"]) == (row.nll, row.bits_per_byte)
            assert record["token_ids"] == ids_of(doc, 0, LENGTHS[doc]).tolist()
            assert np.array_equal(np.float32(record["logprobs"]), logprobs_of(doc, 0, LENGTHS[doc]))
    assert list(tmp_path.rglob("*.tmp")) == []


def test_embeddings_and_states_are_exported_as_far_as_that_makes_sense(tmp_path: Path) -> None:
    run = simple_run(tmp_path / "embed", [5, 0, 9], "embed", failed=[2])
    call("export", run.path)
    call("export", run.path, "--to", "parquet")
    told, table = records(run.path / "results.jsonl"), pq.read_table(run.path / "results.parquet").to_pylist()
    assert told[0]["windows"][0]["tokens"] == 5
    assert np.array_equal(np.float32(told[0]["windows"][0]["vector"]), vector_of(0, 0))
    assert np.array_equal(np.float32(table[1]["vectors"][0]), vector_of(1, 0))
    assert (told[2]["windows"], table[2]["vectors"], table[2]["error"]) == ([], [], "document 2 is broken")
    run = simple_run(tmp_path / "read", [5, 9], "read", failed=[1])
    call("export", run.path)
    state = records(run.path / "results.jsonl")[0]["state"]
    assert state == {"wkv": [LAYERS, *WKV], "shift": [LAYERS, 2, WIDTH], "file": str(run.results), "row": 0}
    assert records(run.path / "results.jsonl")[1]["state"] is None
    call("export", run.path, "--to", "parquet")
    assert pq.read_table(run.path / "results.parquet").to_pylist()[0]["wkv"] == [LAYERS, *WKV]


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    run = simple_run(tmp_path / "read", [5], "read")
    for arguments, sentence in (
        ((run.path, "--tokens"), "the task read records no tokens"),
        ((run.path, "--to", "parquet", "-o", "-"), "Parquet cannot be written to stdout"),
        ((run.path, "-o", tmp_path / "no" / "where"), "cannot be written"),
        ((tmp_path / "nowhere",), "there is no such file"),
        ((new_run(tmp_path / "new").path,), "has no results.h5 yet; `rwkvmpi status"),
    ):
        with pytest.raises(UserError, match=sentence):
            call("export", *arguments)


def test_inspect_says_what_it_is(tmp_path: Path) -> None:
    run = simple_run(tmp_path / "run", LENGTHS)
    told = json.loads(call("inspect", run.results, "--json").output)
    assert (told["kind"], told["task"], told["documents"], told["tokens"]) == ("results", "score", 4, sum(LENGTHS))
    assert told["content_sha256"] == content_digest(run.results)
    assert told["datasets"]["tokens/id"] == [sum(LENGTHS)]
    shard = run.shard_paths()[0]
    told = json.loads(call("inspect", shard, "--json", "--check").output)
    assert (told["kind"], told["holds"], told["attempt"], told["rank"], told["faults"]) == (
        "shard",
        "results",
        1,
        0,
        [],
    )
    assert told["rows"]["documents"] == 4
    assert "every checksum holds" in call("inspect", run.path, "--check").output
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError):
        call("inspect", tmp_path / "other")
    with pytest.raises(UserError):
        call("inspect", tmp_path / "nowhere", "--check")


def test_check_finds_every_flipped_bit_of_a_finished_run(tmp_path: Path) -> None:
    run = simple_run(tmp_path / "run", [400, 3])
    run.write_success({"documents": 2})
    data, source = run.results.read_bytes(), random.Random(3)
    for _ in range(100):
        changed = bytearray(data)
        changed[source.randrange(len(data))] ^= 1 << source.randrange(8)
        run.results.write_bytes(changed)
        assert "results.h5: its SHA-256 differs" in call("inspect", run.path, "--check", code=1).output
    run.results.unlink()
    assert "is missing although the run is finished" in call("inspect", run.path, "--check", code=1).output


def test_check_finds_changed_values_without_success(tmp_path: Path) -> None:
    """A results file alone: text has no Fletcher-32, but the digest covers it."""
    run = simple_run(tmp_path / "run", [400, 3], failed=[1])
    data = run.results.read_bytes()
    for pattern in (b"doc0", b"/in/file0.txt", b"document 1 is broken", logprobs_of(0, 0, 8).tobytes()):
        place = data.index(pattern) + 3
        run.results.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert "DAMAGED" in call("inspect", run.results, "--check", code=1).output, pattern
    run.results.write_bytes(data)
    call("inspect", run.results, "--check")


def test_check_finds_a_damaged_shard(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    builder = ShardBuilder(run.shards, 1, 0)
    builder.add_tokens(0, 0, ids_of(0, 0, 5000), logprobs_of(0, 0, 5000))
    write_commit(run, Commit(1, 1, "job", 1, tuple(builder.flush())))
    shard = run.shard_paths()[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for path in (run.path, shard):
        assert shard.name in call("inspect", path, "--check", code=1).output
    shard.unlink()
    assert "is missing" in call("inspect", run.path, "--check", code=1).output


def test_status_before_during_and_after(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    assert status(run.path)["state"] == "not started"
    builder = ShardBuilder(run.shards, 1, 0)
    builder.add_tokens(0, 0, ids_of(0, 0, 50), logprobs_of(0, 0, 50))
    builder.add_document(0, 50, 50, True)
    for doc in range(1, 13):
        builder.add_document(doc, 0, 0, False, f"reason {doc}")
    write_commit(run, Commit(1, 1, "job", 20, tuple(builder.flush())))
    facts = status(run.path)
    assert (facts["state"], facts["documents_done"], facts["documents_failed"]) == ("stopped", 13, 12)
    assert (facts["documents_total"], facts["tokens_done"], facts["commit"], facts["progress"]) == (20, 50, 1, None)
    assert facts["failures"][0] == {"document": 1, "id": None, "error": "reason 1"}
    assert 0 <= facts["commit_age_s"] < 60
    said = call("status", run.path).output
    assert "13 of 20, 12 failed" in said
    assert "document 3: reason 3" in said
    assert "... and 2 more" in said
    run.lock.acquire()
    run.progress.write_text(json.dumps({"documents_done": 15, "tokens_done": 70, "tokens_per_second": 1234.5}))
    facts = status(run.path)
    assert (facts["state"], facts["documents_done"], facts["tokens_done"]) == ("running", 15, 70)
    assert "1,234 tokens/s" in call("status", run.path).output
    for broken in ("", "[1]", '{"documents_done": "x"}'):
        run.progress.write_text(broken)
        assert status(run.path)["documents_done"] == 13
    run.lock.release()
    done = simple_run(tmp_path / "done", [5, 6], failed=[1])
    done.write_success({})
    done.remove_parts()
    facts = json.loads(call("status", done.path, "--json").output)
    assert (facts["state"], facts["documents_done"], facts["documents_failed"]) == ("finished", 2, 1)
    assert facts["failures"] == [{"document": 1, "id": "doc1", "error": "document 1 is broken"}]
    assert "doc1: document 1 is broken" in call("status", done.path).output


ENDS = """
import ctypes, logging, os, sys
from rwkvmpi.cluster import logs, mpi
from rwkvmpi.errors import FabricError
from rwkvmpi.store.run_folder import RunFolder
run, rank, how = RunFolder(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
run.lock.acquire()
run.next_attempt()
logger = logs.setup(run.path, rank, 8)
logger.info("transport: mpi")
if how == "bug":
    mpi.install_abort_hook()
    raise ValueError("the third layer")
if how == "fabric":
    mpi.fail(FabricError("rank 3 on n1 is silent"))
if how == "segmentation fault":
    ctypes.string_at(0)
if how == "stop":
    logger.info("stopped by signal SIGUSR1 (rank 0): 0 of 20 documents are done")
    logger.info("exit code 75 (stopped, resumable)")
    run.lock.release()
os._exit(1)
"""


def test_status_says_why_a_run_ended_in_the_words_of_its_ranks(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    write_commit(run, Commit(1, 1, "job", 20))

    def end(rank: int, how: str) -> tuple[str, list[dict[str, Any]], str]:
        program = [sys.executable, "-c", ENDS, str(run.path), str(rank), how]
        subprocess.run(program, env=ENVIRONMENT, stderr=subprocess.DEVNULL, timeout=60, check=False)
        facts = status(run.path)
        return facts["state"], facts["words"], call("status", run.path).output

    state, words, said = end(3, "bug")
    assert (state, len(words), words[0]["rank"]) == ("crashed", 1, 3)
    assert words[0]["log"] == str(run.logs / "rank_00003.log")
    assert words[0]["text"].startswith("rwkvmpi: crash on rank 0 of 1 on ")
    assert words[0]["text"].endswith(": ValueError: the third layer")
    assert "ValueError: the third layer" in said
    assert str(run.logs / "rank_00003.log") in said
    state, words, said = end(3, "killed")  # what the start before left in the same log does not count
    assert (state, words) == ("crashed", [])
    assert "no rank left a word in its log" in said
    assert [entry["text"] for entry in end(4, "fabric")[1]] == ["rwkvmpi: rank 3 on n1 is silent"]
    assert [entry["text"] for entry in end(5, "segmentation fault")[1]] == ["Fatal Python error: Segmentation fault"]
    state, words, said = end(0, "stop")
    assert (state, words[0]["text"]) == (
        "stopped",
        "stopped by signal SIGUSR1 (rank 0): 0 of 20 documents are done",
    )
    assert "rank 0: stopped by signal SIGUSR1" in said


def test_status_of_a_running_job_from_its_files(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    run.lock.acquire()
    run.next_attempt()
    assert "none yet from this start" in call("status", run.path).output
    for number in (4, 5):
        write_commit(run, Commit(number, 1, "job", 20))
    os.utime(run.commits / "000004.json", (time.time() - 61, time.time() - 61))
    job = {"attempt": 1, "documents_done": 15, "tokens_per_second": 1234.5, "seconds_left": 600, "slurm_restarts": 2}
    run.progress.write_text(json.dumps(job))
    place = {"ranks": 3, "attempt": 1, "stage": 0, "replica": 0, "phase": "reading"}
    for rank, (rate, age) in enumerate(((100.0, 0), (40.0, 0), (60.0, 900))):
        sample = {**place, "rank": rank, "slot": rank, "host": f"n{rank}", "time": time.time() - age}
        sample |= {"tokens_per_second": rate, "waits": {"tokens": 10.0 * rank}}
        files.write_sample(run.path, rank, encode(sample))
    facts = status(run.path)
    assert facts["ranks"]["silent"][0]["rank"] == 2
    assert facts["rate_now"] is None  # it would leave out what the silent rank reads
    assert 60 <= facts["commit_every_s"] < 70
    said = call("status", run.path).output
    for words in (
        "attempt    1, the Slurm job's restart 2",
        "documents  15 of 20",
        "after the one before",
        "rate       1,234 tokens/s on average of the last start",
        "left       about 10 min",
        "slowest    rank 1 (n1), 40 tokens/s",
        "waited     rank 2 (n2) longest, 20 s",
        "stalled    rank 2 (n2) has been silent for 15 min",
        "rank_00002.log",
    ):
        assert words in said
    files.write_sample(run.path, 2, encode({**sample, "time": time.time()}))
    assert status(run.path)["rate_now"] == 200.0
    os.utime(run.progress, (time.time(), time.time() - 100))
    os.utime(run.path / "attempt", (time.time(), time.time() - 200))
    os.utime(run.path / "lock.json", (time.time(), time.time() - 300))
    said = call("status", run.path).output
    assert "100 s old: rank 0 has written nothing since" in said
    assert "its last sign of life is 5 min old" in said
    run.next_attempt()  # what the earlier start said last was perhaps never committed
    facts = status(run.path)
    assert (facts["documents_done"], facts["progress"], facts["ranks"]) == (0, None, None)
    run.lock.release()


def test_status_of_several_runs(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = simple_run(runs / "a", [5, 6], failed=[1])
    done.write_success({})
    begun = new_run(runs / "b")
    write_commit(begun, Commit(1, 1, "job", 20))
    for arguments in ((runs,), (runs / "a", runs / "b")):
        said = call("status", *arguments).output
        assert "2 runs: 1 finished, 1 stopped" in said
        assert "documents  2 of 22, 1 failed" in said
        assert [line.split()[-1] for line in said.splitlines() if line.startswith("  -")] == [
            str(runs / "a"),
            str(runs / "b"),
        ]
        assert f"{runs / 'b'} is stopped" in said
        assert json.loads(call("status", *arguments, "--json").output)["counts"] == {"finished": 1, "stopped": 1}
    with pytest.raises(UserError, match=r"nowhere: .*; give run folders"):
        call("status", runs / "a", tmp_path / "nowhere")


def test_status_and_inspect_while_a_job_writes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    worker = str(Path(__file__).with_name("kill_worker.py"))
    process = subprocess.Popen([sys.executable, worker, str(path)], stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    states, tokens = [], 0
    while process.poll() is None:
        if os.path.exists(path / "attempt"):
            facts = status(path)
            call("inspect", path, "--check")
            states.append(facts["state"])
            assert facts["state"] in ("running", "finished", "not started", "stopped")
            assert (facts["tokens_done"] or 0) >= tokens or facts["state"] == "finished"
            tokens = facts["tokens_done"] or tokens
        time.sleep(0.001)
    assert process.returncode == 0
    assert "running" in states
    assert tokens > 0
