"""The head's log-probabilities against float64, for every kind of weights."""

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


def packed(weight: torch.Tensor) -> ops.Packed:
    return ops.pack(weight, "float32")


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (33, 257), (100, 1000), (14, 513), (300, 512)])
def test_against_float64(rows: int, vocabulary: int, isa: str) -> None:
    x, weight, targets = make(rows, 48, vocabulary)
    got = ops.head_logprobs(x, packed(weight), targets)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), reference.head_logprobs(x, weight, targets), rtol=1e-6, atol=1e-5)
    assert not got[::5].any()
    assert torch.equal(ops.head_logprobs(x, packed(weight), targets.int()), got)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_it_is_the_softmax_of_the_products_logits(kind: str, isa: str) -> None:
    """Above all that bfloat16 and int8 logits are not rounded once more."""
    x, weight, targets = make(64, 48, 1000)
    x = x if kind == "float32" else x.bfloat16()
    head = ops.pack(weight, kind)
    exact = torch.log_softmax(ops.product(x, head).double(), 1).gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1)
    got = ops.head_logprobs(x, head, targets)
    assert torch.allclose(got.double(), exact * (targets >= 0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_bits_depend_on_the_row_alone(kind: str, isa: str) -> None:
    x, weight, targets = make(300, 40, 1700)
    targets[:] = targets.abs()
    x = x if kind == "float32" else x.bfloat16()
    head = ops.pack(weight, kind)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.head_logprobs(x, head, targets))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for row in (0, 7, 299):
        assert torch.equal(ops.head_logprobs(x[row : row + 1], head, targets[row : row + 1]), found[0][row : row + 1])
    targets[1::2] = -1  # rows without a target are left out, and the others move up
    assert torch.equal(ops.head_logprobs(x, head, targets)[::2], found[0][::2])


def test_huge_logits_and_a_certain_token(isa: str) -> None:
    """Logits of 1e4 in the first or the last block neither overflow nor drown the others."""
    weight = torch.zeros(2000, 1)
    weight[3], weight[1990] = 1e4, -1e4
    for x in (torch.ones(2, 1), -torch.ones(2, 1)):
        targets = torch.tensor([3, 1990], dtype=torch.int32)
        got = ops.head_logprobs(x, packed(weight), targets)
        assert torch.equal(got.double(), reference.head_logprobs(x, weight, targets))


def test_nan_and_infinite_logits_show(isa: str) -> None:
    weight = packed(torch.ones(100, 1))
    for bad in (torch.nan, torch.inf, -torch.inf):
        got = ops.head_logprobs(torch.tensor([[1.0], [bad]]), weight, torch.tensor([5, 5]))
        assert torch.isfinite(got[0])
        assert not torch.isfinite(got[1])


def test_wrong_arguments_are_refused() -> None:
    x, weight, _ = make(4, 8, 10)
    for bad in (-2, 10):
        with pytest.raises(ValueError, match=r"targets must be -1 or 0 to 9"):
            ops.head_logprobs(x, packed(weight), torch.tensor([0, 1, bad, 2]))
    with pytest.raises(TypeError, match="x must be bfloat16"):
        ops.head_logprobs(x, ops.pack(weight, "bfloat16"), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.head_logprobs(x[:, :7].contiguous(), packed(weight), torch.zeros(4, dtype=torch.int64))


def test_nothing_to_do() -> None:
    x, weight, _ = make(4, 8, 10)
    assert not ops.head_logprobs(x * torch.nan, packed(weight), torch.full([4], -1)).any()
    assert ops.head_logprobs(x[:0], packed(weight), torch.zeros(0, dtype=torch.int64)).shape == (0,)
