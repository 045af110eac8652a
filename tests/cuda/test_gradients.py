"""The training operators as torch sees them, their CUDA bodies emulated: autograd, dtypes, torch.library's contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops.cuda import library
from rwkvmpi.ops.training import wkv4_training, wkv7_training

Operator = Callable[..., tuple[Tensor, Tensor]]

UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # an output's rounding


@pytest.fixture(params=["cpu", "cuda"])
def body(request: pytest.FixtureRequest) -> str:
    """Which body works on the CPU tensors of the test: the CPU's own or the emulated CUDA one."""
    if request.param == "cuda":
        request.getfixturevalue("kernels")
    return request.param


def inputs7(batch: int, tokens: int, heads: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)
    r, w, k, v, a, b = (torch.randn(batch, tokens, heads, size, generator=g) for _ in "rwkvab")
    key = torch.nn.functional.normalize(a, dim=-1)
    inputs = [r, torch.exp(-0.6065306597 * torch.sigmoid(3 * w)), k, v, -key, key * torch.sigmoid(b)]
    return [*(x.to(dtype) for x in inputs), torch.randn(batch, heads, size, size, generator=g)]


def inputs4(batch: int, tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)
    k, v = (torch.randn(batch, tokens, channels, generator=g).to(dtype) for _ in "kv")
    w, u = -torch.exp(torch.randn(channels, generator=g) - 1), torch.randn(channels, generator=g)
    state = torch.randn(batch, 3, channels, generator=g)
    state[:, 1] = 0.5 + state[:, 1].abs()
    return [k, v, w, u, state]


def plain7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of WKV-7 in autograd's reach (`reference` writes in place)."""
    outputs = []
    for t in range(r.shape[1]):
        sa = s @ a[:, t, :, :, None]
        s = s * w[:, t, :, None, :] + sa @ b[:, t, :, None, :] + v[:, t, :, :, None] @ k[:, t, :, None, :]
        outputs.append((s @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(outputs, 1), s


def plain4(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of WKV-4."""
    (aa, bb, pp), outputs = state.unbind(1), []
    for t in range(k.shape[1]):
        top = torch.maximum(pp, u + k[:, t])
        past, now = torch.exp(pp - top), torch.exp(u + k[:, t] - top)
        outputs.append((past * aa + now * v[:, t]) / (past * bb + now))
        top = torch.maximum(pp + w, k[:, t])
        past, now = torch.exp(pp + w - top), torch.exp(k[:, t] - top)
        aa, bb, pp = past * aa + now * v[:, t], past * bb + now, top
    return torch.stack(outputs, 1), torch.stack([aa, bb, pp], 1)


def gradients(operator: Operator, inputs: list[Tensor], weights: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Values and gradients of a weighted sum of both outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y, last = operator(*leaves)
    loss = (y.double() * weights[0]).sum() + (last.double() * weights[1]).sum()
    return [y.detach(), last.detach(), *torch.autograd.grad(loss, leaves)]


def agree(operator: Operator, plain: Operator, inputs: list[Tensor], tolerance: float) -> None:
    g = torch.Generator().manual_seed(1)
    shapes = inputs[0].shape, inputs[-1].shape
    weights = tuple(torch.randn(shape, generator=g).to(inputs[0].dtype).double() for shape in shapes)
    found = gradients(operator, inputs, weights)
    expected = gradients(plain, [x.double() for x in inputs], weights)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        allowed = UNIT[x.dtype] * y.abs() * 1.001 + tolerance * y.square().mean().sqrt()
        assert bool(((x.double() - y).abs() <= allowed).all()), f"number {i}"


@pytest.mark.parametrize("shape", [(2, 19, 2, 8), (1, 33, 1, 64)])
def test_wkv7_in_float32(body: str, shape: tuple[int, int, int, int]) -> None:
    agree(wkv7_training, plain7, inputs7(*shape), 1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [32, 64])
def test_wkv7_in_16_bits(dtype: torch.dtype, size: int) -> None:
    agree(wkv7_training, plain7, inputs7(1, 21, 2, size, dtype), 2e-4)


@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_wkv4_in_float32(body: str, tokens: int) -> None:
    agree(wkv4_training, plain4, inputs4(2, tokens, 5), 1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wkv4_in_16_bits(dtype: torch.dtype) -> None:
    agree(wkv4_training, plain4, inputs4(2, 21, 8, dtype), 1e-5)


def test_finite_differences(body: str) -> None:
    """WKV-7 is affine in every single number that goes in, so a difference over a whole step is its derivative."""
    inputs = inputs7(1, 4, 1, 3)
    g = torch.Generator().manual_seed(2)
    weights = tuple(torch.randn(x.shape, generator=g).double() for x in (inputs[0], inputs[6]))

    def loss(*arguments: Tensor) -> float:
        y, last = wkv7_training(*arguments)
        return float((y.double() * weights[0]).sum() + (last.double() * weights[1]).sum())

    found = gradients(wkv7_training, inputs, weights)[2:]
    for number, gradient in enumerate(found):
        for at in range(gradient.numel()):
            shifted = []
            for step in (0.25, -0.25):
                moved = [x.clone() for x in inputs]
                moved[number].view(-1)[at] += step
                shifted.append(loss(*moved))
            assert shifted[0] - shifted[1] == pytest.approx(0.5 * float(gradient.view(-1)[at]), abs=1e-4)


@pytest.mark.parametrize("name", ["wkv7_training", "wkv4_training"])
def test_torch_library_contract(body: str, name: str) -> None:
    """Fake kernels, autograd registration and aliasing, as torch.compile relies on them."""
    inputs = inputs7(1, 18, 1, 4) if name == "wkv7_training" else inputs4(2, 18, 4)
    operator = getattr(torch.ops.rwkvmpi, name).default
    torch.library.opcheck(operator, tuple(x.requires_grad_() for x in inputs))


def test_views_and_single_sequences(body: str) -> None:
    """Strided arguments and those without a batch give the bits of plain ones."""
    for operator, inputs, sequences in ((wkv7_training, inputs7(2, 9, 2, 8), 7), (wkv4_training, inputs4(2, 9, 8), 2)):
        y, last = operator(*inputs)
        strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
        assert all(torch.equal(x, z) for x, z in zip(operator(*strided), (y, last), strict=True))
        single = [x[0] if i < sequences or i == len(inputs) - 1 else x for i, x in enumerate(inputs)]
        assert all(torch.equal(x, z[0]) for x, z in zip(operator(*single), (y, last), strict=True))


def test_without_a_state_it_is_empty(body: str) -> None:
    for operator, inputs in ((wkv7_training, inputs7(1, 5, 1, 8)), (wkv4_training, inputs4(1, 5, 8))):
        inputs[-1].zero_()
        if operator is wkv4_training:
            inputs[-1][:, 2] = -1e30
        assert all(torch.equal(x, y) for x, y in zip(operator(*inputs), operator(*inputs[:-1]), strict=True))


@pytest.mark.usefixtures("kernels")
def test_wrong_dtypes_are_refused() -> None:
    seven, four = inputs7(1, 3, 1, 4, torch.bfloat16), inputs4(1, 3, 4, torch.bfloat16)
    with pytest.raises(TypeError, match="k must be bfloat16"):
        wkv7_training(*seven[:2], seven[2].float(), *seven[3:])
    with pytest.raises(TypeError, match="state must be float32"):
        wkv7_training(*seven[:6], seven[6].bfloat16())
    with pytest.raises(TypeError, match="r must be float32"):
        wkv7_training(*(x.double() for x in seven))
    with pytest.raises(TypeError, match="v must be bfloat16"):
        wkv4_training(four[0], four[1].float(), *four[2:])
    with pytest.raises(TypeError, match="w must be float32"):
        wkv4_training(*four[:2], four[2].bfloat16(), *four[3:])


def test_the_cpu_computes_in_float32_alone() -> None:
    assert not library.emulating()
    with pytest.raises(TypeError, match="r must be float32"):
        wkv7_training(*inputs7(1, 3, 1, 4, torch.bfloat16))
    with pytest.raises(TypeError, match="k must be float32"):
        wkv4_training(*inputs4(1, 3, 4, torch.float16))


@pytest.mark.parametrize("name", ["v", "w", "u", "state"])
def test_wrong_shapes_are_refused(name: str) -> None:
    good = dict(zip(("k", "v", "w", "u", "state"), inputs4(2, 3, 4), strict=True))
    with pytest.raises(ValueError, match=f"{name} has shape"):
        wkv4_training(**good | {name: good[name][..., :2]})
