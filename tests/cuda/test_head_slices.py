"""The head's softmax on emulated CUDA: against float64, over slices of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops import reference
from rwkvmpi.ops.cuda import head, library, product

pytestmark = pytest.mark.usefixtures("kernels")

EPS = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}  # the logits are given: no rounding


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fold(logits: Tensor, targets: Tensor, slices: list[int], stride: int = 0) -> Tensor:
    """Log-probabilities from slices so wide, each in memory of its own with rows `stride` apart."""
    rows, ids = logits.shape
    running, out = torch.full([rows, 4], torch.nan), torch.full([rows], torch.nan)
    head._head_begin(running, rows)
    first = 0
    for n in slices:
        part = torch.full([rows, stride or n], torch.nan, dtype=logits.dtype)
        part[:, :n] = logits[:, first : first + n]
        head._head_slice(part, targets, running, rows, n, first, stride or n, library.DTYPES[logits.dtype])
        first += n
    assert first == ids
    head._head_end(running, targets, out, rows)
    return out


def wanted(logits: Tensor, targets: Tensor) -> Tensor:
    every = torch.log_softmax(logits.double(), 1)
    return torch.where(targets >= 0, every.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ids", "slices"), [(1, [1]), (300, [300]), (9001, [9001]), (20000, [8192, 8192, 3616])])
def test_against_float64(ids: int, slices: list[int], dtype: torch.dtype) -> None:
    logits = (normal(1, 3, ids) * torch.tensor([[0.1], [4.0], [30.0]])).to(dtype)
    for targets in (torch.tensor([0, ids - 1, ids // 2]), torch.tensor([-1, *logits[1:].argmax(1).tolist()])):
        got, want = fold(logits, targets, slices), wanted(logits, targets)
        assert ((got.double() - want).abs() <= EPS[dtype] * want.abs().clamp_min(1.0)).all(), got.double() - want
        assert not got[targets == -1].any()


def test_an_almost_certain_token_and_one_far_below() -> None:
    logits = torch.zeros(2, 9000)
    logits[:, 100] = 30.0
    got = fold(logits, torch.tensor([100, 99]), [9000])
    want = wanted(logits, torch.tensor([100, 99]))
    assert ((got.double() - want).abs() <= 1e-6 * want.abs() + 1e-9).all()
    logits = torch.full((1, 300), -1e30)
    logits[0, 7] = -1e30 + 1e24
    assert fold(logits, torch.tensor([7]), [300]).item() == 0.0


def test_slices_change_no_bit() -> None:
    logits, targets = normal(1, 2, 20001) * 5, torch.tensor([17, 20000])
    want = fold(logits, targets, [20001])
    assert torch.equal(fold(logits, targets, [8192, 8192, 3617]), want)
    assert torch.equal(fold(logits, targets, [16384, 3617], stride=16401), want)  # rows do not lie on 16 bytes


def test_rows_change_no_bit(orders: Callable[[Callable[[], None]], None]) -> None:
    logits, targets = normal(1, 9, 700) * 5, torch.arange(9)
    want = fold(logits, targets, [700])
    assert torch.equal(fold(logits[3:5], targets[3:5], [700]), want[3:5])

    def check() -> None:
        assert torch.equal(fold(logits, targets, [700]), want)

    orders(check)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 8191, 8192, 8999])
def test_what_is_no_number_surfaces(place: int, bad: float) -> None:
    logits = normal(1, 3, 9000)
    logits[1, place] = bad
    got = fold(logits, torch.tensor([5, 5, 5]), [9000])
    assert got.isnan().tolist() == [False, True, False]
    assert fold(logits, torch.tensor([5, -1, 5]), [9000])[1] == 0.0


def test_minus_infinity_is_a_logit() -> None:
    logits = normal(1, 1, 9000)
    logits[:, :8192] = -torch.inf
    assert torch.allclose(fold(logits, torch.tensor([8500]), [9000]).double(), wanted(logits, torch.tensor([8500])))
    assert fold(logits, torch.tensor([3]), [9000]).item() == -torch.inf


def test_targets_outside_the_vocabulary_give_nan() -> None:
    assert fold(normal(1, 3, 40), torch.tensor([40, -2, 39]), [40]).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("ids", [50, 264])
def test_head_logprobs(ids: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SLICE", 64)
    monkeypatch.setattr(head, "ROWS", 20)
    dtype = product.KINDS[kind]
    weight, x = normal(2, ids, 40).to(dtype), normal(3, 37, 40).to(dtype)  # 20 rows, then 17; or 20 alone
    packed = product.pack(weight, kind)
    targets = torch.randint(-1, ids, [37], generator=torch.Generator().manual_seed(4))
    for rows in (37, 3):
        out = torch.full([rows], torch.nan)
        head.head_logprobs_into(out, x[:rows], packed.data, kind, ids, targets[:rows])
        want = reference.head_logprobs(x[:rows], weight, targets[:rows])
        assert (out.double() - want).abs().max() <= 2e-5
    logits = torch.full([3, ids], torch.nan)
    head.logits_into(logits, x[:3], packed.data, kind)
    assert (logits.double() - x[:3].double() @ weight.double().T).abs().max() <= 1e-4


def test_no_rows() -> None:
    packed = product.pack(normal(2, 50, 40), "float32")
    head.head_logprobs_into(torch.empty(0), torch.empty(0, 40), packed.data, "float32", 50, torch.empty(0).long())
