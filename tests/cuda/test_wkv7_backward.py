"""Training WKV-7 on CUDA: values and gradients against float64 autograd of the definition, emulated on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops.cuda import library, training
from rwkvmpi.ops.cuda.training import AUTO, TILES, TOKENS

NAMES = ("y", "last", "dr", "dw", "dk", "dv", "da", "db", "dstate")
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {FLOAT32: 0.0, BFLOAT16: 2.0**-8, FLOAT16: 2.0**-11}  # of an output, relative
TOLERANCE = {TOKENS: 1e-5, TILES: 2e-4}  # relative to the root mean square, beyond the output's rounding
LENGTHS = (1, 15, 16, 17, 33, 64)

pytestmark = pytest.mark.usefixtures("kernels")


def plain(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, [B, T, H, N], in autograd's reach."""
    outputs = []
    for t in range(r.shape[1]):
        sa = s @ a[:, t, :, :, None]
        s = s * w[:, t, :, None, :] + sa @ b[:, t, :, None, :] + v[:, t, :, :, None] @ k[:, t, :, None, :]
        outputs.append((s @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(outputs, 1), s


class Case:
    """Inputs as a model makes them, what is asked of the outputs, and the answers of both sides in NAMES' order."""

    def __init__(
        self, length: int, dtype: torch.dtype, size: int = 64, heads: int = 2, batch: int = 1, seed: int = 0
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        shape = batch, length, heads, size
        r, w, k, v, a, b, dy = (torch.randn(shape, generator=g) for _ in range(7))
        key = torch.nn.functional.normalize(a, dim=-1)
        w = torch.exp(-0.6065306597 * torch.sigmoid(3 * w))
        self.inputs = [x.to(dtype) for x in (r, w, k, v, -key, key * torch.sigmoid(b))]
        self.dy = dy.to(dtype)
        self.state, self.dlast = (torch.randn(batch, heads, size, size, generator=g) for _ in range(2))

    def begin_documents(self, *tokens: int) -> None:
        """Documents begin at these tokens: the state before is forgotten."""
        for t in tokens:
            self.inputs[1][:, t] = 0
            self.inputs[4][:, t] = 0

    def tokens(self, begin: int, end: int) -> Case:
        """A part of the sequences."""
        part = Case(0, self.dy.dtype)
        part.inputs, part.dy = [x[:, begin:end].contiguous() for x in self.inputs], self.dy[:, begin:end].contiguous()
        part.state, part.dlast = self.state, self.dlast
        return part

    def forward(self, body: int, every: int = 16) -> tuple[Tensor, Tensor, Tensor]:
        """y, last and the stored states; outputs that are not written stay NaN."""
        batch, length, heads, size = self.dy.shape
        stored = torch.full((batch, heads, (length + every - 1) // every, size, size), float("nan"))
        outputs = torch.full_like(self.dy, float("nan")), torch.full_like(self.state, float("nan")), stored
        training.wkv7_forward(*self.inputs, self.state, outputs, every, body)
        return outputs

    def backward(self, stored: Tensor, body: int, every: int = 16) -> list[Tensor]:
        gradients, dstate = torch.full((6, *self.dy.shape), float("nan")), torch.full_like(self.dlast, float("nan"))
        gradients = gradients.to(self.dy.dtype)
        training.wkv7_backward(*self.inputs, stored, self.dy, self.dlast, gradients, dstate, every, body)
        return [*gradients, dstate]

    def run(self, body: int, every: int = 16) -> list[Tensor]:
        y, last, stored = self.forward(body, every)
        return [y, last, *self.backward(stored, body, every)]

    def expected(self) -> list[Tensor]:
        leaves = [x.double().requires_grad_() for x in (*self.inputs, self.state)]
        y, last = plain(*leaves)
        loss = (y * self.dy.double()).sum() + (last * self.dlast.double()).sum()
        return [y.detach(), last.detach(), *torch.autograd.grad(loss, leaves)]

    def check(self, body: int, every: int = 16) -> None:
        compare(self.run(body, every), self.expected(), TOLERANCE[body])


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, x, y in zip(NAMES, found, expected, strict=True):
        allowed = ROUNDING[x.dtype] * y.abs() * 1.001 + tolerance * y.square().mean().sqrt() + 1e-30
        excess = float(((x.double() - y).abs() / allowed).max())
        assert excess <= 1, f"{name}: {excess:.3g} times the error allowed"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("body", "dtype"), [(TOKENS, FLOAT32), (TOKENS, BFLOAT16), (TILES, BFLOAT16), (TILES, FLOAT16)]
)
def test_gradients_agree_with_float64(body: int, dtype: torch.dtype, length: int) -> None:
    Case(length, dtype).check(body)


@pytest.mark.parametrize(
    ("size", "length"), [(1, 3), (8, 17), (32, 16), (40, 20), (100, 11), (128, 5), (200, 5), (256, 3)]
)
def test_token_by_token_takes_every_head_size(size: int, length: int) -> None:
    Case(length, FLOAT32, size, heads=1, batch=2).check(TOKENS)


@pytest.mark.parametrize("every", [1, 5, 24, 40])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_token_by_token_takes_every_spacing_of_stored_states(every: int, size: int) -> None:
    Case(27, FLOAT32, size, heads=1).check(TOKENS, every)


def test_tiles_store_at_their_own_spacing() -> None:
    case = Case(70, BFLOAT16)
    dense, sparse = case.forward(TILES, 16), case.forward(TILES, 32)
    assert torch.equal(dense[2][:, :, ::2], sparse[2])
    compare([*sparse[:2], *case.backward(sparse[2], AUTO, 32)], case.expected(), TOLERANCE[TILES])


@pytest.mark.parametrize("body", [TOKENS, TILES])
@pytest.mark.parametrize("beginnings", [(0,), (5,), (15, 16), (3, 9, 40), (47,), (16, 32)])
def test_a_token_without_decay_and_removal_begins_anew(body: int, beginnings: tuple[int, ...]) -> None:
    """Tiles with such a token go token by token; those around them do not."""
    case = Case(48, BFLOAT16)
    case.begin_documents(*beginnings)
    case.check(body)
    alone, whole = case.tokens(beginnings[-1], 48), case.run(body)
    alone.state = torch.zeros_like(case.state)
    for name, x, y in zip(NAMES[:2], alone.run(body), whole, strict=False):
        y = y[:, beginnings[-1] :] if name == "y" else y
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2 if x.dtype == BFLOAT16 else 1e-3)


@pytest.mark.parametrize("decay", [0.0625, 0.126, 0.25, 0.545, 1.0])
def test_tiles_at_the_ends_of_the_decay(decay: float) -> None:
    """The smallest decay is the furthest that the scaling by cumulative decays goes: 8^16 in a tile."""
    case = Case(33, BFLOAT16)
    case.inputs[1].fill_(decay)
    compare(case.run(TILES), case.expected(), 1e-3)


def test_gradients_of_any_magnitude() -> None:
    """A power of two in the loss changes the exponents alone, in bfloat16 and in the tiles' intermediate values."""
    case = Case(40, BFLOAT16)
    case.begin_documents(20)
    before = case.run(TILES)[2:]
    case.dy, case.dlast = case.dy * 2.0**-60, case.dlast * 2.0**-60
    assert all(torch.equal(x, y * 2.0**60) for x, y in zip(before, case.run(TILES)[2:], strict=True))


@pytest.mark.parametrize(("body", "dtype"), [(TOKENS, FLOAT32), (TILES, BFLOAT16)])
def test_bits_depend_neither_on_the_order_of_threads_nor_on_the_other_sequences(
    body: int, dtype: torch.dtype, orders: Callable[[Callable[[], None]], None]
) -> None:
    case = Case(35, dtype, heads=1, batch=2)
    case.begin_documents(18)

    @functools.cache
    def first() -> list[Tensor]:
        return case.run(body)

    orders(lambda: assert_same(case.run(body), first()))
    alone = Case(0, dtype)
    alone.inputs, alone.dy = [x[1:].contiguous() for x in case.inputs], case.dy[1:].contiguous()
    alone.state, alone.dlast = case.state[1:].contiguous(), case.dlast[1:].contiguous()
    assert_same(alone.run(body), [x[1:] for x in first()])


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, x, y in zip(NAMES, found, expected, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(("body", "dtype", "cut"), [(TOKENS, FLOAT32, 16), (TILES, BFLOAT16, 32)])
def test_a_sequence_in_two_parts_has_the_same_bits(body: int, dtype: torch.dtype, cut: int) -> None:
    case = Case(50, dtype)
    case.begin_documents(7)
    whole = case.run(body)
    head, tail = case.tokens(0, cut), case.tokens(cut, 50)
    y_head, tail.state, stored = head.forward(body)
    y_tail, last, _ = tail.forward(body)
    *tail_gradients, head.dlast = tail.run(body)[2:]
    *head_gradients, dstate = head.backward(stored, body)
    joined = [torch.cat(pair, 1) for pair in zip(head_gradients, tail_gradients, strict=True)]
    assert_same([torch.cat([y_head, y_tail], 1), last, *joined, dstate], whole)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_no_tokens_pass_the_state_through(dtype: torch.dtype) -> None:
    case = Case(0, dtype)
    y, last, stored = case.forward(AUTO)
    assert y.numel() == stored.numel() == 0
    assert torch.equal(last, case.state)
    assert torch.equal(case.backward(stored, AUTO)[-1], case.dlast)


@pytest.mark.parametrize(
    ("dtype", "size", "every", "body", "code"),
    [
        (FLOAT32, 64, 16, TILES, -6),
        (BFLOAT16, 32, 16, TILES, -6),
        (BFLOAT16, 64, 20, TILES, -6),
        (BFLOAT16, 64, 16, 3, -6),
        (BFLOAT16, 257, 16, AUTO, -2),
        (BFLOAT16, 64, 0, AUTO, -2),
    ],
)
def test_refusals(dtype: torch.dtype, size: int, every: int, body: int, code: int) -> None:
    case = Case(4, dtype, size, heads=1)
    outputs = torch.empty_like(case.dy), torch.empty_like(case.state), torch.empty(1, 1, 4, size, size)
    with pytest.raises(library.CudaError) as forward:
        training.wkv7_forward(*case.inputs, case.state, outputs, every, body)
    with pytest.raises(library.CudaError) as backward:
        case.backward(torch.empty(1, 1, 4, size, size), body, every)
    assert forward.value.code == backward.value.code == code


def test_missing_and_misaligned_tensors_are_refused() -> None:
    call = library.bind("wkv7_train_forward", "p" * 10 + "l" * 5 + "ii")
    case = Case(4, BFLOAT16)
    outputs = [torch.empty_like(case.dy), torch.empty_like(case.state), torch.empty(1, 2, 1, 64, 64)]
    good = [*case.inputs, case.state, *outputs]
    shifted = torch.empty(case.dy.numel() + 1, dtype=BFLOAT16)[1:].view(case.dy.shape)
    for at in range(10):
        with pytest.raises(library.CudaError, match="pointer"):
            call(*good[:at], None, *good[at + 1 :], *case.dy.shape, 16, AUTO, 1)
    with pytest.raises(library.CudaError, match="boundary"):
        call(shifted, *good[1:], *case.dy.shape, 16, AUTO, 1)
    call(shifted, *good[1:], *case.dy.shape, 16, TOKENS, 1)
