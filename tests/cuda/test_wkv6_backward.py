"""Training WKV-6 on CUDA: gradients against float64 autograd of the plain formula, emulated on the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops.cuda import library

pytestmark = pytest.mark.usefixtures("kernels")

EVERY = 16
HEADS = 2
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of an output, relative

_forward = library.bind("wkv6_train_forward", "p" * 9 + "llllli")
_backward = library.bind("wkv6_train_backward", "p" * 14 + "llllli")


def plain(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """WKV-6 over [B, T, H, N], the states [B, H, value, key]."""
    outputs = []
    for t in range(r.shape[1]):
        now = v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        outputs.append(((s + now * u.unsqueeze(-2)) * r[:, t].unsqueeze(-2)).sum(-1))
        s = s * w[:, t].unsqueeze(-2) + now
    return torch.stack(outputs, 1), s


class Case:
    def __init__(self, tokens: int, size: int = 64, dtype: torch.dtype = torch.float32, batch: int = 2) -> None:
        g = torch.Generator().manual_seed(tokens)
        shape = (batch, tokens, HEADS, size)
        self.r, self.k, self.v, self.dy = (torch.randn(shape, generator=g).to(dtype) for _ in range(4))
        self.w = torch.sigmoid(torch.randn(shape, generator=g) * 3).to(dtype)
        self.w[:, ::7, :, ::3] = 0.0
        self.w[:, :, :, 1::5] = 1.0
        self.u = torch.randn(HEADS, size, generator=g)
        self.state, self.dlast = (torch.randn(batch, HEADS, size, size, generator=g) for _ in range(2))
        self.shape, self.dtype = shape, dtype

    def numbers(self) -> tuple[int, ...]:
        return (*self.shape, EVERY, library.DTYPES[self.dtype])

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, heads, size = self.shape
        y, last = torch.full_like(self.r, float("nan")), torch.full_like(self.state, float("nan"))
        stored = torch.full((batch, heads, (tokens + EVERY - 1) // EVERY, size, size), float("nan"))
        _forward(self.r, self.w, self.k, self.v, self.u, self.state, y, last, stored, *self.numbers())
        return y, last, stored

    def backward(self, stored: Tensor) -> list[Tensor]:
        """The gradients of r, w, k, v, of u by sequences, and of the state."""
        gradients = [torch.full_like(self.r, float("nan")) for _ in range(4)]
        du, dstate = torch.full((self.shape[0], *self.u.shape), float("nan")), torch.full_like(self.state, float("nan"))
        inputs = (self.r, self.w, self.k, self.v, self.u, stored, self.dy, self.dlast)
        _backward(*inputs, *gradients, du, dstate, *self.numbers())
        return [*gradients, du, dstate]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    """Within the rounding of the output, and the tolerance of its own size and of that of all of them."""
    error, sizes = (got.double() - want).abs(), want.abs()
    rounding = 1.01 * ROUNDING[got.dtype] * sizes
    return bool((error <= rounding + tolerance * (sizes + want.square().mean().sqrt())).all())


def agree(case: Case) -> None:
    leaves = [x.double().requires_grad_() for x in (case.r, case.w, case.k, case.v, case.u, case.state)]
    want_y, want_last = plain(*leaves)
    loss = (want_y * case.dy.double()).sum() + (want_last * case.dlast.double()).sum()
    want = torch.autograd.grad(loss, leaves)
    y, last, stored = case.forward()
    assert close(y, want_y.detach())
    assert close(last, want_last.detach())
    got = case.backward(stored)
    got[4] = got[4].sum(0)
    for name, mine, theirs in zip(("r", "w", "k", "v", "u", "state"), got, want, strict=True):
        assert close(mine, theirs), name


@pytest.mark.parametrize("size", [8, 40, 64])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
def test_gradients(tokens: int, size: int) -> None:
    agree(Case(tokens, size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision(dtype: torch.dtype) -> None:
    agree(Case(35, 64, dtype))


def test_gradients_of_large_heads() -> None:
    agree(Case(18, 100, batch=1))


def test_bits_are_always_the_same(orders: Callable[[Callable[[], None]], None]) -> None:
    """For every order of threads, and for a sequence among others."""
    case, results = Case(20), []

    def run() -> None:
        y, last, stored = case.forward()
        results.append([y, last, stored, *case.backward(stored)])

    orders(run)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    alone = Case(20, batch=1)
    alone.u = case.u
    for name in ("r", "w", "k", "v", "dy", "state", "dlast"):
        setattr(alone, name, getattr(case, name)[1:].contiguous())
    y, last, stored = alone.forward()
    for mine, among in zip([y, last, stored, *alone.backward(stored)], results[0], strict=True):
        assert torch.equal(mine, among[1:])


def test_no_tokens() -> None:
    case = Case(0)
    _, last, stored = case.forward()
    assert torch.equal(last, case.state)
    *_, du, dstate = case.backward(stored)
    assert not du.any()
    assert torch.equal(dstate, case.dlast)


def test_refusals() -> None:
    case = Case(2)
    _, _, stored = case.forward()
    inputs = (case.r, case.w, case.k, case.v, case.u, stored, case.dy, case.dlast)
    outputs = (*(torch.empty_like(case.r) for _ in range(4)), torch.zeros(2, HEADS, 64), case.state.clone())
    for arguments, code in (
        ((*inputs, *outputs, -1, 2, HEADS, 64, EVERY, 0), -2),
        ((*inputs, *outputs, 2, 2, HEADS, 257, EVERY, 0), -2),
        ((*inputs, *outputs, 2, 2, HEADS, 64, 8, 0), -6),
        ((*inputs, *outputs, 2, 2, HEADS, 64, EVERY, 9), -3),
        ((None, *inputs[1:], *outputs, 2, 2, HEADS, 64, EVERY, 0), -1),
    ):
        with pytest.raises(library.CudaError) as error:
            _backward(*arguments)
        assert error.value.code == code
