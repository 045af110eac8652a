"""A run as its user meets it: resumed, refused, stopped, killed, with bad documents and bad models."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launching import command, environment

from rwkvmpi.store.digest import content_digest
from rwkvmpi.store.results import open_results

pytestmark = pytest.mark.parallel
ROOT = Path(__file__).resolve().parents[2]
LENGTHS = [120_000, 33, 1024, 5000, 1, 20_000]


@pytest.fixture(scope="module")
def undisturbed(rwkvmpi, small_model, write_documents, tmp_path_factory):
    """(model, documents, digest of the results) of a job that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    model, documents = small_model("7"), write_documents(folder / "docs", LENGTHS, seed=7)
    rwkvmpi("score", model, documents, "-o", folder / "run", "--chunk", 256)
    return model, documents, content_digest(folder / "run" / "results.h5")


def start(ranks, *arguments):
    return subprocess.Popen(command(ranks, *arguments), stderr=subprocess.PIPE, text=True, env=environment())


def wait_for_commit(run, process, number=2):
    """Until the job has committed at least `number` times; it must not have ended before."""
    deadline = time.monotonic() + 60
    while not any(int(path.stem) >= number for path in (run / "commits").glob("*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1 to mpirun", "STOP", "max-time"])
def test_a_stopped_job_commits_and_goes_on_with_another_grid(how, undisturbed, rwkvmpi, tmp_path):
    model, documents, digest = undisturbed
    run = tmp_path / "run"
    arguments = ["score", model, documents, "-o", run, "--chunk", 256, "--commit-every", "20c"]
    ranks = 1 if how == "SIGTERM" else 2
    options = ["--max-time", "6s"] if how == "max-time" else []
    if ranks == 2:
        options += ["--ring", 2]
    process = start(ranks, *arguments, *options)
    if how != "max-time":
        wait_for_commit(run, process)
    if how == "STOP":
        (run / "STOP").touch()
    elif how != "max-time":
        process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    if how == "max-time" and process.returncode == 0:  # a fast machine was done before its time was up
        assert content_digest(run / "results.h5") == digest
        return
    assert process.returncode == 75, said
    assert "the same command goes on from here" in said
    assert not (run / "SUCCESS").exists()
    status = json.loads(rwkvmpi("status", run, "--json").stdout)
    assert status["state"] == "stopped"
    going_on = rwkvmpi(*arguments, "--stages", 2, ranks=2)
    assert "going on from commit" in going_on.stderr
    assert content_digest(run / "results.h5") == digest


def test_killed_runs_lose_nothing():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "kill_runs.py", "--kills", "4", "--kills-per-run", "2", "--seed", "11",
         "--bytes", "200000"],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "results that differ: 0" in done.stdout


def test_a_finished_run_says_so_and_a_changed_job_is_refused(undisturbed, rwkvmpi, small_model, tmp_path):
    model, documents, _ = undisturbed
    run, text = tmp_path / "run", tmp_path / "a.txt"
    text.write_text("some words " * 30)
    rwkvmpi("score", model, text, "-o", run, "--chunk", 256)
    assert "is finished: 1 documents; nothing to do" in rwkvmpi("score", model, text, "-o", run, "--chunk", 256).stderr
    for changed, named in (
        (["score", small_model("6"), text, "--chunk", 256], "model (its SHA-256)"),
        (["score", model, text, "--chunk", 512], "chunk = 256, now it is 512"),
        (["score", model, text, "--chunk", 256, "--dtype", "bfloat16"], "dtype = float32, now it is bfloat16"),
        (["embed", model, text, "--chunk", 256], "task = score, now it is embed"),
        (["score", model, documents, "--chunk", 256], "input"),
    ):
        refused = rwkvmpi(*changed, "-o", run, code=2)
        assert named in refused.stderr
        assert "--force" in refused.stderr
        assert "Traceback" not in refused.stderr
    text.write_text("other words " * 30)
    assert "has changed" in rwkvmpi("score", model, text, "-o", run, "--chunk", 256, code=2).stderr
    rwkvmpi("score", model, text, "-o", run, "--chunk", 256, "--force")
    with open_results(run / "results.h5") as results:
        assert results.documents["bytes"].tolist() == [360]


def test_two_jobs_on_one_folder_the_second_refuses(undisturbed, rwkvmpi, tmp_path):
    model, documents, digest = undisturbed
    run = tmp_path / "run"
    arguments = ["score", model, documents, "-o", run, "--chunk", 256, "--commit-every", "5c"]
    first = start(2, *arguments)
    wait_for_commit(run, first, number=1)
    refused = rwkvmpi(*arguments, code=2)
    assert "in use by process" in refused.stderr
    assert first.wait(timeout=120) == 0
    assert content_digest(run / "results.h5") == digest


def test_bad_documents_become_rows_and_stop_nobody(rwkvmpi, small_model, tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a_empty.txt").write_bytes(b"")
    (folder / "b_nul.txt").write_bytes(b"\0\0a\0" * 50)
    (folder / "c_invalid.txt").write_bytes(bytes(range(256)) * 4)
    (folder / "d_cut.txt.gz").write_bytes(gzip.compress(os.urandom(300_000))[:200_000])
    records = ['{"text": "fine"}', '{"words": "no text"}', "{broken", '{"text": 5}', '{"text": "also fine"}']
    (folder / "e.jsonl").write_text("\n".join(records))
    os.symlink(folder / "nowhere", folder / "f_vanished.txt")
    (folder / "g.parquet").write_bytes(b"PAR1 not really")
    for ranks, grid in ((1, []), (2, ["--ring", 2])):
        run = tmp_path / f"run{ranks}"
        done = rwkvmpi("score", small_model("7"), folder, "-o", run, "--chunk", 256, *grid, ranks=ranks, code=3)
        assert "failed" in done.stderr
        with open_results(run / "results.h5") as results:
            rows = {row.id: row for row in results.documents}
            failed = {name for name, row in rows.items() if not row.ok}
            assert failed == {"d_cut.txt.gz", "e.jsonl#2", "e.jsonl#3", "e.jsonl#4", "f_vanished.txt", "g.parquet#1"}
            assert all(rows[name].error and rows[name].tokens == 0 and np.isnan(rows[name].nll) for name in failed)
            assert rows["a_empty.txt"].tokens == 0
            assert rows["b_nul.txt"].tokens == 200
            assert rows["c_invalid.txt"].tokens == 1024
            assert rows["e.jsonl#5"].tokens == len("also fine")
    assert content_digest(tmp_path / "run1" / "results.h5") == content_digest(tmp_path / "run2" / "results.h5")
    stopped = rwkvmpi(
        "score", small_model("7"), folder, "-o", tmp_path / "stop", "--chunk", 256, "--on-error", "stop", code=3
    )
    assert "stopped by a document that failed" in stopped.stderr
    assert not (tmp_path / "stop" / "SUCCESS").exists()


def test_a_bad_model_on_one_rank_ends_all_with_a_sentence(rwkvmpi, small_model, tmp_path):
    import torch
    from safetensors.torch import save_file

    from rwkvmpi.models.random_weights import random_weights

    weights = random_weights("7", n_layer=4, n_embd=64, vocab_size=256, head_size=32, seed=1, dtype=torch.float32)
    text = tmp_path / "a.txt"
    text.write_text("words " * 500)
    weights["blocks.3.att.key.weight"][5, 5] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    done = rwkvmpi("score", tmp_path / "nan.safetensors", text, "-o", tmp_path / "r1", "--stages", 2, ranks=2, code=2)
    assert "blocks.3.att.key.weight" in done.stderr
    assert "Traceback" not in done.stderr
    weights["blocks.3.att.key.weight"][5, 5] = 0.0
    weights["blocks.2.att.value.weight"][:] = 3e38  # finite weights whose products are not
    save_file(weights, tmp_path / "huge.safetensors")
    begun = time.monotonic()
    done = rwkvmpi("score", tmp_path / "huge.safetensors", text, "-o", tmp_path / "r2", "--stages", 2, ranks=2, code=1)
    assert "layer 2 for document 'a.txt'" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begun < 30
    assert not (tmp_path / "r2" / "SUCCESS").exists()


def test_a_crash_on_one_rank_ends_all_with_rank_host_and_traceback(undisturbed, tmp_path):
    """A planted bug: rank 1's shard folder is a file, which no user of the program can bring about."""
    model, documents, _ = undisturbed
    code = (
        "import sys, rwkvmpi.grid.relay as relay, rwkvmpi.cluster.launcher as launcher\n"
        "if launcher.launch_facts().rank == 1:\n"
        "    def broken(*_): raise ZeroDivisionError('planted')\n"
        "    relay.Relay.leave = broken\n"
        "from rwkvmpi.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    launcher = command(2)[:3]
    arguments = ["score", str(model), str(documents), "-o", str(tmp_path / "run"), "--ring", "2"]
    begun = time.monotonic()
    done = subprocess.run(
        [*launcher, sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env=environment(), check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "crash on rank 1 of 2 on" in done.stderr
    assert "ZeroDivisionError: planted" in done.stderr
    assert time.monotonic() - begun < 30


def test_more_ranks_than_the_model_or_the_launch_allow_is_refused(undisturbed, rwkvmpi, tmp_path):
    model, documents, _ = undisturbed
    done = rwkvmpi("score", model, documents, "-o", tmp_path / "run", "--stages", 5, code=2)
    assert "--stages 5" in done.stderr
    done = rwkvmpi("score", model, documents, "-o", tmp_path / "run", "--ring", 2, code=2)
    assert "needs 2 ranks, but 1 were started" in done.stderr
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "job.toml").exists()


def test_job_file_overrides_and_dry_run(undisturbed, rwkvmpi, tmp_path):
    model, documents, digest = undisturbed
    job = tmp_path / "job.toml"
    job.write_text(f'[model]\npath = "{model}"\n[input]\npaths = ["{documents}"]\n[run]\ncommit_every = "7c"\n')
    dry = rwkvmpi("run", job, "-o", tmp_path / "run", "--set", "model.chunk=256", "--dry-run")
    assert "chunk = 256" in dry.stdout
    assert not (tmp_path / "run").exists()
    rwkvmpi("run", job, "-o", tmp_path / "run", "--set", "model.chunk=256", "--set", "grid.ring=2", ranks=2)
    assert content_digest(tmp_path / "run" / "results.h5") == digest
    resolved = (tmp_path / "run" / "job.toml").read_text()
    assert "ring = 2" in resolved
    assert 'dtype = "float32"' in resolved
    job.write_text('[model]\npath = "x"\nlayers = 3\n[input]\npaths = ["y"]\n')
    assert "unknown key 'model.layers'" in rwkvmpi("run", job, "-o", tmp_path / "r", code=2).stderr
    job.write_text("[model\n")
    assert "not a TOML file" in rwkvmpi("run", job, "-o", tmp_path / "r", code=2).stderr
