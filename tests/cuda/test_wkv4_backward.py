"""Training WKV-4 on CUDA: gradients against float64 autograd of the plain formula, emulated on the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops.cuda import library

EVERY = 16
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of an output, relative

_forward = library.bind("wkv4_train_forward", "p" * 8 + "lllli")
_backward = library.bind("wkv4_train_backward", "p" * 12 + "lllli")


pytestmark = pytest.mark.usefixtures("kernels")


def plain(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """WKV-4 over [B, T, C] in autograd's reach, pp a running maximum."""
    (aa, bb, pp), outputs = state.unbind(1), []
    for t in range(k.shape[1]):
        top = torch.maximum(pp, u + k[:, t]).detach()  # cancels out of y
        past, now = torch.exp(pp - top), torch.exp(u + k[:, t] - top)
        outputs.append((past * aa + now * v[:, t]) / (past * bb + now))
        top = torch.maximum(pp + w, k[:, t])
        past, now = torch.exp(pp + w - top), torch.exp(k[:, t] - top)
        aa, bb, pp = past * aa + now * v[:, t], past * bb + now, top
    return torch.stack(outputs, 1), torch.stack([aa, bb, pp], 1)


class Case:
    """Random inputs and what is asked of them, and both sides' answers."""

    def __init__(self, length: int, channels: int = 40, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> None:
        g = torch.Generator().manual_seed(length)
        batch = 2
        self.shape = (batch, length, channels)
        self.k = (torch.randn(self.shape, generator=g) * scale).to(dtype)
        self.v, self.dy = (torch.randn(self.shape, generator=g).to(dtype) for _ in range(2))
        self.w, self.u = -torch.exp(torch.randn(channels, generator=g) * 2 - 2), torch.randn(channels, generator=g) * 2
        self.state = torch.randn(batch, 3, channels, generator=g)
        self.state[:, 1] = torch.rand(batch, channels, generator=g) + 0.5
        self.state[1, :2] = 0.0
        self.state[1, 2] = -1e30
        self.dlast = torch.randn(batch, 3, channels, generator=g)
        self.dtype = dtype

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, channels = self.shape
        y, last = torch.full_like(self.k, float("nan")), torch.full_like(self.state, float("nan"))
        stored = torch.full((batch, (length + EVERY - 1) // EVERY, 3, channels), float("nan"))
        inputs = (self.k, self.v, self.w, self.u, self.state)
        _forward(*inputs, y, last, stored, *self.shape, EVERY, library.DTYPES[self.dtype])
        return y, last, stored

    def backward(self, stored: Tensor) -> list[Tensor]:
        batch, _, channels = self.shape
        dk, dv = (torch.full_like(self.k, float("nan")) for _ in range(2))
        dw, du = (torch.full((batch, channels), float("nan")) for _ in range(2))
        dstate = torch.full_like(self.state, float("nan"))
        inputs = (self.k, self.v, self.w, self.u, stored, self.dy, self.dlast)
        _backward(*inputs, dk, dv, dw, du, dstate, *self.shape, EVERY, library.DTYPES[self.dtype])
        return [dk, dv, dw.sum(0), du.sum(0), dstate]

    def wanted(self) -> tuple[list[Tensor], list[Tensor]]:
        """(y, last) and the gradients of k, v, w, u and state."""
        leaves = [x.double().requires_grad_() for x in (self.k, self.v, self.w, self.u, self.state)]
        y, last = plain(*leaves)
        loss = (y * self.dy.double()).sum() + (last * self.dlast.double()).sum()
        return [y.detach(), last.detach()], list(torch.autograd.grad(loss, leaves))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    """Within the rounding of the output, and the tolerance of its own size and of that of all of them."""
    error, sizes = (got.double() - want).abs(), want.abs()
    rounding = 1.01 * ROUNDING[got.dtype] * sizes
    return bool((error <= rounding + tolerance * (sizes + want.square().mean().sqrt())).all())


def agree(case: Case, tolerance: float = 1e-5) -> None:
    (want_y, want_last), want = case.wanted()
    y, last, stored = case.forward()
    assert close(y, want_y, tolerance)
    assert close(last[0], want_last[0], tolerance)
    got = case.backward(stored)
    for name, mine, theirs in zip(("k", "v", "w", "u"), got, want, strict=False):
        assert close(mine, theirs, tolerance), name
    assert close(got[4][0], want[4][0], tolerance)
    assert not got[4][1].any(), "nothing comes of a state that is none"


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 50])
def test_gradients(length: int) -> None:
    agree(Case(length))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [7, 136])
def test_gradients_of_half_precision(channels: int, dtype: torch.dtype) -> None:
    agree(Case(35, channels, dtype))


def test_extreme_keys() -> None:
    case = Case(40)
    case.k[:, ::2, ::2] = 60.0
    case.k[:, 1::2, ::2] = -60.0
    case.k[:, :, 1::4] = -60.0
    case.w[::3] = -1e-6
    case.w[1::3] = -80.0
    # Equal keys tie for the last pp, so nothing may be asked of it but what aa and bb ask of their scale.
    last = case.wanted()[0][1]
    case.dlast[:, 2] = (last[:, :2] * case.dlast[:, :2]).sum(1)
    agree(case, 5e-5)  # u + 60 is rounded to 2e-6


def test_chained_parts_give_the_gradients_of_the_whole() -> None:
    """The gradient of a part's state, handed to the part before it as its last state's, is all that passes between."""
    whole = Case(48)
    whole_gradients = whole.backward(whole.forward()[2])
    parts = []
    for begin, end in ((0, 16), (16, 48)):
        part = Case(end - begin)
        part.k, part.v, part.dy = (x[:, begin:end].contiguous() for x in (whole.k, whole.v, whole.dy))
        part.w, part.u = whole.w, whole.u
        parts.append(part)
    first, second = parts
    first.state, second.dlast = whole.state, whole.dlast
    _, second.state, first_stored = first.forward()
    of_second = second.backward(second.forward()[2])
    first.dlast = of_second[4]
    of_first = first.backward(first_stored)
    for i in range(2):
        assert close(torch.cat([of_first[i], of_second[i]], 1), whole_gradients[i].double(), 1e-6)
    for i in (2, 3):
        assert close(of_first[i] + of_second[i], whole_gradients[i].double(), 1e-6)
    assert close(of_first[4], whole_gradients[4].double(), 1e-6)


def test_bits_are_always_the_same(orders: Callable[[Callable[[], None]], None]) -> None:
    """For every order of threads, and for a sequence among others."""
    case, results = Case(37, 136), []

    def run() -> None:
        y, last, stored = case.forward()
        results.append([y, last, stored, *case.backward(stored)])

    orders(run)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    alone = Case(37, 136)
    for name in ("k", "v", "dy", "state", "dlast"):
        setattr(alone, name, getattr(case, name)[1:].contiguous())
    alone.shape = (1, 37, 136)
    y, _, stored = alone.forward()
    assert torch.equal(y, results[0][0][1:])
    assert torch.equal(alone.backward(stored)[0], results[0][3][1:])


def test_no_tokens() -> None:
    case = Case(1)
    case.shape = (2, 0, 40)
    last, dstate = torch.full_like(case.state, float("nan")), torch.full_like(case.state, float("nan"))
    _forward(None, None, case.w, case.u, case.state, None, last, None, *case.shape, EVERY, 0)
    assert torch.equal(last, case.state)
    dw, du = torch.ones(2, 40), torch.ones(2, 40)
    nothing = (None, None, case.w, case.u, None, None, case.dlast, None, None, dw, du, dstate)
    _backward(*nothing, *case.shape, EVERY, 0)
    assert torch.equal(dstate, case.dlast)
    assert not dw.any()
    assert not du.any()


def test_refusals() -> None:
    case = Case(4)
    _, _, stored = case.forward()
    inputs = (case.k, case.v, case.w, case.u, stored, case.dy, case.dlast)
    outputs = (case.k.clone(), case.v.clone(), torch.zeros(2, 40), torch.zeros(2, 40), case.state.clone())
    for arguments, code in (
        ((*inputs, *outputs, -1, 4, 40, EVERY, 0), -2),
        ((*inputs, *outputs, 2, 4, 40, 8, 0), -6),
        ((*inputs, *outputs, 2, 4, 40, EVERY, 3), -3),
        ((*inputs[:4], None, *inputs[5:], *outputs, 2, 4, 40, EVERY, 0), -1),
    ):
        with pytest.raises(library.CudaError) as error:
            _backward(*arguments)
        assert error.value.code == code
