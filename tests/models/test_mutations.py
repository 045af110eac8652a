"""The tolerance is sharp: every silent mistake on the list moves the logits by more than it."""

import pytest
from model_cases import SMALL, TOLERANCE, VERSIONS, difference, model, tokens, weights
from oracle import MISTAKES, Oracle

LENGTHS = (40, 37)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_planted_mistake_is_caught(version: str) -> None:
    case = SMALL[version]
    documents = [tokens(case, n, seed=n) for n in LENGTHS]
    found = [model(case).forward(ids)[0] for ids in documents]

    def distance(mistake: str | None) -> float:
        truths = Oracle(weights(case), mistake).read_documents([list(ids) for ids in documents])
        return max(difference(logits, truth) for logits, truth in zip(found, truths, strict=True))

    assert distance(None) <= TOLERANCE
    missed = {mistake: far for mistake in MISTAKES[version] if (far := distance(mistake)) <= TOLERANCE}
    assert not missed, f"mistakes that the tolerance of {TOLERANCE} does not catch: {missed}"
