"""The promise: results are the same bits whatever the grid, the documents around, and the task's carry."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rwkvmpi.store.digest import content_digest
from rwkvmpi.store.results import open_results

pytestmark = pytest.mark.parallel

LENGTHS = [1, 31, 32, 33, 1023, 1024, 1025, 0, 9000, 255, 256, 257, 5, 2000]
LONG = 100_000
# (stages, ring, replicas): 1 to 8 ranks, each of the three up to 4
GRIDS = [
    (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 3, 1), (4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 1),
    (2, 2, 2), (3, 2, 1),
]  # fmt: skip
LONG_GRIDS = [(1, 1, 1), (2, 2, 1)]
# Neither the chunk nor the threads change a bit of an operator's result, so none of a run's.
CHUNKS = [1024, 256, 2048, 800]


def grid_options(stages, ring, replicas):
    return ["--stages", stages, "--ring", ring, "--replicas", replicas]


@pytest.mark.parametrize(("grids", "lengths"), [(GRIDS, LENGTHS), (LONG_GRIDS, [LONG, 700])], ids=["many", "long"])
def test_score_is_the_same_on_every_grid(grids, lengths, rwkvmpi, small_model, write_documents, tmp_path):
    model, documents = small_model("7"), write_documents(tmp_path / "docs", lengths)
    digests = {}
    for i, grid in enumerate(grids):
        run = tmp_path / "-".join(map(str, grid))
        ranks = grid[0] * grid[1] * grid[2]
        others = ["--chunk", CHUNKS[i % len(CHUNKS)], "--threads", 2 if ranks == 2 else 1]
        rwkvmpi("score", model, documents, "-o", run, *others, *grid_options(*grid), ranks=ranks)
        digests[grid] = content_digest(run / "results.h5")
    assert len(set(digests.values())) == 1, digests
    with open_results(tmp_path / "1-1-1" / "results.h5") as results:
        assert results.documents["tokens"].tolist() == lengths
        assert np.isfinite(results.documents["nll"]).all()
        assert max(results.documents["nll"]) > max(lengths)  # random weights know nothing: about 5.5 nats a byte


@pytest.mark.parametrize(
    ("version", "dtype", "tasks"),
    [
        ("4", "bfloat16", ["embed", "read"]),
        ("5.2", "int8", ["embed", "read"]),
        ("6", "float32", ["embed", "read"]),
        ("7", "bfloat16", ["score"]),
        ("7", "int8", ["score"]),
    ],
)
def test_other_versions_dtypes_and_tasks_are_the_same_on_every_grid(
    version, dtype, tasks, rwkvmpi, small_model, write_documents, tmp_path
):
    model, documents = small_model(version), write_documents(tmp_path / "docs", [3000, 31, 0, 257, 900], seed=1)
    for task in tasks:
        extra = ["--window", 100] if task == "embed" else []
        digests = set()
        for grid in ((1, 1, 1), (2, 2, 1), (1, 3, 1)):
            run = tmp_path / f"{task}-{'-'.join(map(str, grid))}"
            ranks = grid[0] * grid[1] * grid[2]
            options = [*extra, "--dtype", dtype, "--chunk", 256, *grid_options(*grid)]
            rwkvmpi(task, model, documents, "-o", run, *options, ranks=ranks)
            digests.add(content_digest(run / "results.h5"))
        assert len(digests) == 1


def test_a_document_alone_is_the_same_as_among_others(rwkvmpi, small_model, write_documents, tmp_path):
    model, lengths = small_model("7"), [700, 33, 5000, 1, 1024]
    documents = write_documents(tmp_path / "docs", lengths, seed=2)
    for task in ("score", "embed", "read"):
        rwkvmpi(task, model, documents, "-o", tmp_path / task, "--chunk", 256)
        with open_results(tmp_path / task / "results.h5") as together:
            for doc in (0, 2, 4):
                alone_run = tmp_path / f"{task}-{doc}"
                rwkvmpi(task, model, documents / f"d{doc:03d}.txt", "-o", alone_run, "--chunk", 256)
                with open_results(alone_run / "results.h5") as alone:
                    if task == "score":
                        pairs = zip(together.tokens(doc), alone.tokens(0), strict=True)
                    elif task == "embed":
                        pairs = [(together.embeddings(doc)["vector"], alone.embeddings(0)["vector"])]
                    else:
                        pairs = zip(together.state(doc), alone.state(0), strict=True)
                    for left, right in pairs:
                        np.testing.assert_array_equal(left, right)


def test_results_are_those_of_the_model_itself(rwkvmpi, small_model, write_documents, tmp_path):
    """The whole way through feeder, stream, grid and store against one call of the Python API."""
    import torch

    import rwkvmpi as package

    documents = write_documents(tmp_path / "docs", [900, 2500], seed=3)
    rwkvmpi("score", small_model("7"), documents, "-o", tmp_path / "run", "--chunk", 1024, "--ring", 2, ranks=2)
    model = package.load_model(small_model("7"))
    with open_results(tmp_path / "run" / "results.h5") as results:
        for doc in range(2):
            ids, logprobs = results.tokens(doc)
            text = (documents / f"d{doc:03d}.txt").read_bytes()
            assert bytes(ids.astype(np.uint8)) == text
            logits, _ = model.forward(torch.tensor([0, *text]))
            expected = logits[:-1].double().log_softmax(-1)[torch.arange(len(text)), torch.tensor(list(text))]
            np.testing.assert_allclose(logprobs, expected.numpy(), atol=2e-6)


def test_grids_of_the_list_cover_what_is_promised():
    assert len(GRIDS) >= 12
    for column in range(3):
        assert max(grid[column] for grid in GRIDS) == 4
    assert {p * s * d for p, s, d in GRIDS} >= {1, 2, 3, 4, 8}
    assert all(len(set(pair)) == 2 for pair in itertools.pairwise(GRIDS))
