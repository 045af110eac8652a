"""The promise on the level of a model: a document's bits do not depend on its neighbours, its chunks or the stages."""

import pytest
import torch
from model_cases import SMALL, VERSIONS, Case, model, model_file, tokens, weights
from oracle import Oracle

from rwkvmpi.models.checkpoint import open_checkpoint
from rwkvmpi.models.model import Stage
from rwkvmpi.models.state import LayerState

BEGUN, IN_FLIGHT = 64, 100  # a document that came from the chunk before, and one that goes on into the next


def run(stages: list[Stage], ids: torch.Tensor, states: list[LayerState], rows: list[list[int]]) -> torch.Tensor:
    """One chunk through all stages as the engine does it; the normalised output [G, C]."""
    rows_d2 = torch.tensor(rows, dtype=torch.int32)
    x, v_first = stages[0].embed(ids), None
    for stage in stages:
        for i, layer in enumerate(stage.layers):
            x, v_first = layer.forward(x, v_first, states[stage.lo + i], rows_d2)
    return stages[-1].finish(x)


def initial(stages: list[Stage], segments: int) -> list[LayerState]:
    return [stage.initial_state(i, segments) for stage in stages for i in range(len(stage.layers))]


def segment(states: list[LayerState], d: int) -> list[LayerState]:
    return [LayerState(state.wkv[d : d + 1].clone(), state.shift[d : d + 1].clone()) for state in states]


def same(a: list[LayerState], b: list[LayerState]) -> bool:
    return all(torch.equal(s.wkv, t.wkv) and torch.equal(s.shift, t.shift) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize(("dtype", "threads"), [("float32", 1), ("bfloat16", 2), ("int8", 2)])
@pytest.mark.parametrize("version", VERSIONS)
def test_documents_in_one_chunk_are_as_alone(version: str, dtype: str, threads: int) -> None:
    torch.set_num_threads(threads)
    case: Case = SMALL[version]
    stages = [model(case, dtype).stage]
    documents = [torch.from_numpy(tokens(case, n, seed=n)) for n in (BEGUN + 33, 1, 31, 32, 200, 512)]
    documents[0][0] = 5

    before = initial(stages, 1)  # the first document begins in an earlier chunk
    run(stages, torch.cat([documents[0][:BEGUN], torch.zeros(192, dtype=torch.int64)]), before, [[0, BEGUN]])

    chunk = torch.zeros(1024, dtype=torch.int64)
    rows, first = [], 0
    for n, ids in enumerate(documents):
        ids = ids[BEGUN:] if n == 0 else ids
        ids = ids[:IN_FLIGHT] if n == 5 else ids
        chunk[first : first + len(ids)] = ids
        rows.append([first, len(ids)])
        first += -(-len(ids) // 32) * 32
    chunk[first:] = 9  # the padding at the end is of no document
    states = initial(stages, len(documents))
    for state, own in zip(states, before, strict=True):
        state.wkv[0], state.shift[0] = own.wkv[0], own.shift[0]
    together = run(stages, chunk, states, rows)
    assert all(torch.isfinite(state.wkv).all() for state in states)

    for n, (start, count) in enumerate(rows):
        alone = [own.clone() for own in before] if n == 0 else initial(stages, 1)
        h = run(stages, chunk[start : start + count], alone, [[0, count]])
        assert torch.equal(h, together[start : start + count]), f"document {n}"
        assert same(alone, segment(states, n)), f"state of document {n}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("version", VERSIONS)
def test_cuts_and_stages_do_not_change_a_bit(version: str, dtype: str) -> None:
    case = SMALL[version]
    whole = model(case, dtype)
    ids = torch.from_numpy(tokens(case, 1100))
    logits, end = whole.forward(ids)
    for cuts in ([32], [512, 1024], [1088], [96, 192, 640], [1, 2, 33, 700, 701], [511, 513]):
        parts, state = [], None
        for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            part, state = whole.forward(ids[start:stop], state)
            parts.append(part)
        assert state is not None
        assert torch.equal(torch.cat(parts), logits), cuts
        assert same(state.layers, end.layers), cuts

    checkpoint = open_checkpoint(model_file(case))
    stages = [Stage(checkpoint, lo, hi, dtype) for lo, hi in ((0, 1), (1, 2), (2, 4))]
    assert [(stage.first, stage.last) for stage in stages] == [(True, False), (False, False), (False, True)]
    states = initial(stages, 1)
    h = run(stages, ids[:1024], states, [[0, 1024]])
    assert torch.equal(stages[-1].logits(h), logits[:1024])


def test_a_stage_past_the_first_needs_v_first() -> None:
    case = SMALL["7"]
    stage = Stage(open_checkpoint(model_file(case)), 1, 2)
    with pytest.raises(ValueError, match="layer 0 makes v_first"):
        stage.layers[0].forward(torch.zeros(256, 40), None, stage.initial_state(0, 1), torch.tensor([[0, 256]]).int())


def test_documents_against_the_truth_in_one_chunk() -> None:
    """The same as the first test, but against the oracle: equal bits alone could be equally wrong."""
    case = SMALL["7"]
    stages = [model(case).stage]
    documents = [torch.from_numpy(tokens(case, n, seed=n)) for n in (40, 90)]
    chunk = torch.zeros(256, dtype=torch.int64)
    chunk[:40], chunk[64:154] = documents
    h = run(stages, chunk, initial(stages, 2), [[0, 40], [64, 90]])
    logits = stages[0].logits(h)
    truth = Oracle(weights(case)).read_documents([list(ids) for ids in documents])
    for start, expected in ((0, truth[0]), (64, truth[1])):
        found = logits[start : start + len(expected)].double()
        assert (found - torch.from_numpy(expected)).abs().max() <= 1e-5 * abs(expected).max()
