"""The head's log-probabilities against float64, in blocks of any size."""

from __future__ import annotations

import pytest
import torch

from rwkvmpi import ops
from rwkvmpi.ops import reference


def make(
    rows: int, channels: int, vocabulary: int, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rows + vocabulary)
    x = torch.randn(rows, channels, generator=g) * scale
    weight = torch.randn(vocabulary, channels, generator=g)
    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    targets[::5] = -1
    return x, weight, targets


@pytest.mark.parametrize("block", [1, 7, 256, 4096])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 256), (33, 257), (100, 1000)])
def test_against_float64(rows: int, vocabulary: int, block: int, isa: str) -> None:
    x, weight, targets = make(rows, 48, vocabulary)
    got = ops.head_logprobs(x, weight, targets, block)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), reference.head_logprobs(x, weight, targets), rtol=1e-6, atol=1e-5)
    assert not got[::5].any()
    assert torch.equal(ops.head_logprobs(x, weight, targets.int(), block), got)


def test_bfloat16_is_the_softmax_of_torchs_logits(isa: str) -> None:
    x, weight, targets = make(64, 48, 1000)
    x, weight = x.bfloat16(), weight.bfloat16()
    logits = torch.cat([torch.mm(x, part.t()) for part in weight.split(256)], 1)
    exact = torch.log_softmax(logits.double(), 1).gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1)
    got = ops.head_logprobs(x, weight, targets, 256)
    assert torch.allclose(got.double(), exact * (targets >= 0), rtol=1e-6, atol=1e-6)


def test_huge_logits_and_a_certain_token(isa: str) -> None:
    """Logits of 1e4 in the first or the last block neither overflow nor drown the others."""
    weight = torch.zeros(1000, 1)
    weight[3], weight[990] = 1e4, -1e4
    for x in (torch.ones(2, 1), -torch.ones(2, 1)):
        targets = torch.tensor([3, 990], dtype=torch.int32)
        got = ops.head_logprobs(x, weight, targets, 100)
        assert torch.equal(got.double(), reference.head_logprobs(x, weight, targets))


def test_nan_and_infinite_logits_show(isa: str) -> None:
    weight = torch.ones(100, 1)
    for bad in (torch.nan, torch.inf, -torch.inf):
        got = ops.head_logprobs(torch.tensor([[1.0], [bad]]), weight, torch.tensor([5, 5]), 64)
        assert torch.isfinite(got[0])
        assert not torch.isfinite(got[1])


def test_targets_beyond_the_vocabulary_are_refused() -> None:
    x, weight, _ = make(4, 8, 10)
    for bad in (-2, 10):
        with pytest.raises(ValueError, match=r"targets must be -1 or 0 to 9"):
            ops.head_logprobs(x, weight, torch.tensor([0, 1, bad, 2]))


def test_nothing_to_do() -> None:
    x, weight, _ = make(4, 8, 10)
    assert not ops.head_logprobs(x * torch.nan, weight, torch.full([4], -1)).any()
    assert ops.head_logprobs(x[:0], weight, torch.zeros(0, dtype=torch.int64)).shape == (0,)
