"""--from: what another job on other ranks goes on with has the bits of one reading; and what is refused."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time

import h5py
import numpy as np
import pytest
from launching import command, environment
from texts import text_of

from rwkvmpi.store.digest import content_digest
from rwkvmpi.store.results import open_results

pytestmark = pytest.mark.parallel

# bytes that the first job finds, the second, and the third
LENGTHS = [
    (5000, 5100, 9000), (33, 33, 33), (0, 400, 400), (1024, 1025, 3333), (0, 0, 0), (31, 31, 700), (255, 700, 733),
]  # fmt: skip
GRIDS = {"alone": [], "ring": ["--ring", 2], "stages": ["--stages", 2], "replicas": ["--replicas", 2]}


def write(folder, which, lengths=LENGTHS, new=()):
    """The documents as job number `which` finds them; `new` ones are there from the last job on."""
    folder.mkdir()
    for number, counts in enumerate(lengths):
        (folder / f"d{number:03d}.txt").write_bytes(text_of(max(counts), number)[: counts[which]])
    for number, length in enumerate(new):
        (folder / f"new{number}.txt").write_bytes(text_of(length, 500 + number))
    return folder


@pytest.fixture
def documents(tmp_path):
    return [write(tmp_path / f"docs{which}", which, new=[500] if which == 2 else []) for which in range(3)]


@pytest.mark.parametrize(
    ("version", "dtype", "grids", "tasks"),
    [
        ("7", "float32", ["alone", "ring", "stages"], ["score", "embed"]),
        pytest.param("7", "bfloat16", ["ring"], ["score"], marks=pytest.mark.thorough),
        pytest.param("4", "float32", ["stages"], [], marks=pytest.mark.thorough),
        pytest.param("6", "int8", ["alone"], [], marks=pytest.mark.thorough),
    ],
)
def test_states_and_scores_are_those_of_one_reading(
    version, dtype, grids, tasks, rwkvmpi, small_model, documents, tmp_path
):
    model, options = small_model(version), ["--chunk", 256, "--dtype", dtype]

    def start(task, which, name, grid="alone", *more):
        run = tmp_path / name
        ranks = 1 if grid == "alone" else 2
        rwkvmpi(task, model, documents[which], "-o", run, *options, *GRIDS[grid], *more, ranks=ranks)
        return open_results(run)

    start("read", 0, "first").close()
    start("read", 1, "second", grids[0], "--from", tmp_path / "first").close()
    whole = start("read", 2, "whole")
    for grid in grids:
        read_on = start("read", 2, f"read-{grid}", grid, "--from", tmp_path / "second")
        assert read_on.documents["tokens"].tolist() == [*(c - b for _, b, c in LENGTHS), 500]
        assert read_on.documents["tokens_before"].tolist() == [*(b for _, b, _ in LENGTHS), 0]
        for path in ("states/wkv", "states/shift", "states/last", "states/text_sha256"):
            wanted, found = (results.read(path, 0, len(whole)) for results in (whole, read_on))
            assert wanted.tobytes() == found.tobytes(), (grid, path)
        assert not np.isnan(found).any()
    befores = read_on.documents["tokens_before"].tolist()
    if "score" in tasks:
        scored, tail = start("score", 2, "scored"), start("score", 2, "tail", grids[-1], "--from", tmp_path / "second")
        for doc, before in enumerate(befores):
            for wanted, found in zip(scored.tokens(doc, before), tail.tokens(doc), strict=True):
                assert np.array_equal(wanted, found), doc
            assert tail.documents[doc].nll == pytest.approx(-tail.tokens(doc)[1].sum(dtype=np.float64))
    if "embed" in tasks:
        windows = start("embed", 2, "windows", "alone", "--window", 5)
        tail = start("embed", 2, "tail-windows", grids[-1], "--window", 5, "--from", tmp_path / "second")
        for doc, before in enumerate(befores):
            wanted, found = (results.embeddings(doc) for results in (windows, tail))
            assert found["tokens"].sum() == tail.documents[doc].tokens
            if before % 5 == 0:
                assert wanted["vector"][before // 5 :].tobytes() == found["vector"].tobytes(), doc


def test_what_cannot_be_gone_on_from_is_refused(rwkvmpi, small_model, documents, tmp_path):
    model, old, options = small_model("7"), tmp_path / "old", ["--chunk", 256]
    rwkvmpi("read", model, documents[0], "-o", old, *options)

    def refused(*changed, earlier=old, model=model, code=2):
        done = rwkvmpi("score", model, documents[1], "-o", tmp_path / "new", *options, "--from", earlier, *changed,
                       code=code)  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "the very same model file only" in refused(model=small_model("6"))
    assert "the run folder of -o too" in refused("-o", old, "--force")
    damaged, unfinished = (shutil.copytree(old, tmp_path / name) for name in ("damaged", "unfinished"))
    with h5py.File(damaged / "results.h5", "r+") as file:
        file["states/wkv"][2, 1] += 1e-6
    assert "its SHA-256 differs" in refused(earlier=damaged)
    (unfinished / "SUCCESS").unlink()
    assert "is not finished" in refused(earlier=unfinished)
    assert not (tmp_path / "new").exists()

    changed = documents[1] / "d000.txt"
    changed.write_bytes(b"?" + changed.read_bytes()[1:])
    (documents[1] / "d003.txt").write_bytes(b"short")
    refused("--on-error", "stop", code=3)
    refused(code=3)
    with open_results(tmp_path / "new") as results:
        rows = {row.id: row for row in results.documents}
        assert {name for name, row in rows.items() if not row.ok} == {"d000.txt", "d003.txt"}
        assert "does not begin with the 5,000 bytes" in rows["d000.txt"].error
        assert "it has 5 bytes now" in rows["d003.txt"].error
        assert (rows["d006.txt"].tokens, rows["d006.txt"].tokens_before) == (445, 255)


def disturb(kill, *arguments):
    """Start a job on two ranks, wait for its first commit, and kill it or ask it to stop."""
    run = arguments[arguments.index("-o") + 1]
    process = subprocess.Popen(command(2, *arguments), stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 60
    while not any((run / "commits").glob("*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if kill:
        process.kill()
    else:
        (run / "STOP").touch()
    process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if kill else 75)
    assert not (run / "SUCCESS").exists()


def test_a_killed_job_goes_on_and_only_from_the_same_run(rwkvmpi, small_model, tmp_path):
    lengths = [(10_007, 100_000), (3_000, 100_000), (40, 90)]
    docs = [write(tmp_path / f"docs{which}", which, lengths) for which in range(2)]
    model, options = small_model("7"), ["--chunk", 256, "--from", tmp_path / "old", "--commit-every", "10c"]
    for run in ("old", "other"):
        text = (docs[0] / "d002.txt").read_bytes()
        rwkvmpi("read", model, docs[0], "-o", tmp_path / run, "--chunk", 256)
        (docs[0] / "d002.txt").write_bytes(text[:-1])
    for task, kill, first, then in (("embed", False, "replicas", "alone"), ("read", True, "ring", "stages")):
        rwkvmpi(task, model, docs[1], "-o", tmp_path / f"{task}-undisturbed", *options)
        arguments = [task, model, docs[1], "-o", tmp_path / task, *options]
        disturb(kill, *arguments, *GRIDS[first])
        other = ["--from", tmp_path / "other"] if task == "read" else []
        refused = rwkvmpi(*arguments[:-4], *other, code=2)
        assert "--from (the digest of its results)" in refused.stderr
        going_on = rwkvmpi(*arguments, *GRIDS[then], ranks=1 if then == "alone" else 2)
        assert "going on from commit" in going_on.stderr
        digests = {content_digest(tmp_path / name / "results.h5") for name in (task, f"{task}-undisturbed")}
        assert len(digests) == 1, task
