"""Single-token steps of many states: the same bits as reading the documents whole, whatever stands beside them."""

import pytest
import torch
from model_cases import SMALL, VERSIONS, model, tokens

from rwkvmpi.errors import UserError
from rwkvmpi.models.state import ModelState

KINDS = ["float32", "bfloat16", "int8"]


def same(a: ModelState, b: ModelState) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_steps_are_the_bits_of_reading(version: str, kind: str) -> None:
    case, count, length = SMALL[version], 3, 40
    whole = model(case, kind)
    documents = [torch.from_numpy(tokens(case, length, seed=seed)) for seed in range(count)]
    states, logits = whole.states(count), []
    for position in range(length):
        step, states = whole.step(torch.stack([ids[position] for ids in documents]), states)
        logits.append(step)
    for n, ids in enumerate(documents):
        truth, end = whole.forward(ids)
        assert torch.equal(torch.stack([step[n] for step in logits]), truth), f"document {n}"
        assert same(states.segment(n), end), f"state of document {n}"


@pytest.mark.parametrize("count", [1, 2, 17, 64])
def test_any_number_of_states(count: int) -> None:
    """Also that a recorded step works on the states it is given, not on those it was recorded with."""
    case = SMALL["7"]
    whole = model(case)
    ids = torch.from_numpy(tokens(case, count, seed=5))
    begun = [whole.forward(tokens(case, 10 + n, seed=n))[1] for n in range(count)]
    expected = [whole.forward(ids[n : n + 1], begun[n]) for n in range(count)]
    for _ in range(2):
        states = ModelState.join(begun)
        logits, after = whole.step(ids, states)
        assert after is states
        assert torch.equal(logits, torch.cat([each for each, _ in expected]))
        assert all(same(states.segment(n), end) for n, (_, end) in enumerate(expected))


def test_prefill_is_the_end_of_forward() -> None:
    case = SMALL["6"]
    whole, ids = model(case, "bfloat16"), tokens(case, 1100)
    logits, state = whole.forward(ids)
    last, end = whole.prefill(ids)
    assert torch.equal(last, logits[-1])
    assert same(end, state)


def test_wrong_steps_are_refused() -> None:
    whole = model(SMALL["7"])
    with pytest.raises(UserError, match="2 tokens for 3 states"):
        whole.step([1, 2], whole.states(3))
    with pytest.raises(UserError, match=r"token 99999 at position 1 is not in the vocabulary"):
        whole.step([1, 99999], whole.states(2))
    with pytest.raises(UserError, match="the state given has 4 layers"):
        whole.step([1], model(SMALL["4"]).states(1))
    broken = whole.states(2)
    broken.layers[1].wkv = broken.layers[1].wkv.transpose(2, 3)
    with pytest.raises(UserError, match="not contiguous"):
        whole.step([1, 2], broken)
