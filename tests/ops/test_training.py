"""The gradients of WKV-7 against automatic differentiation in float64, and the promises of its training form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops import library, wkv7
from rwkvmpi.ops.training import wkv7_training

NAMES = ("r", "w", "k", "v", "a", "b", "state")


def token_by_token(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, [B, T, H, N], in whatever precision the arguments have."""
    outputs = []
    for t in range(r.shape[1]):
        sa = s @ a[:, t, :, :, None]
        s = s * w[:, t, :, None, :] + sa @ b[:, t, :, None, :] + v[:, t, :, :, None] @ k[:, t, :, None, :]
        outputs.append((s @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(outputs, 1), s


def arguments(batch: int, tokens: int, heads: int, size: int, seed: int = 0) -> list[Tensor]:
    """float64 arguments as a model makes them: decays in (0.545, 1), a unit removal key."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch, tokens, heads, size
    r, w, k, v, a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "rwkvab")
    key = torch.nn.functional.normalize(a, dim=-1)
    state = torch.randn(batch, heads, size, size, generator=generator, dtype=torch.float64)
    return [r, torch.exp(-0.6065306597 * torch.sigmoid(3 * w)), k, v, -key, key * torch.sigmoid(b), state]


def gradients(operator, inputs: list[Tensor], weights: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Value and gradients of a weighted sum of both outputs, so that the outgoing state's gradient counts too."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y, last = operator(*leaves)
    total = (y * weights[0].to(y.dtype)).sum() + (last * weights[1].to(y.dtype)).sum()
    return (y.detach(), last.detach(), *torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("variant", library.VARIANTS)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "size"),
    [(2, 37, 2, 8), (1, 33, 3, 32), (2, 16, 1, 64), (1, 1, 2, 64), (1, 50, 1, 40), (1, 5, 1, 100)],
)
def test_gradients_agree_with_float64(variant: str, batch: int, tokens: int, heads: int, size: int) -> None:
    if variant not in library.runnable():
        pytest.skip(f"this processor does not run {variant}")
    inputs = arguments(batch, tokens, heads, size)
    weights = torch.randn_like(inputs[0]), torch.randn_like(inputs[6])
    expected = gradients(token_by_token, inputs, weights)
    with library.use(variant):
        found = gradients(wkv7_training, [x.float() for x in inputs], weights)
    for name, x, y in zip(("y", "last", *NAMES), expected, found, strict=True):
        assert float((x - y).abs().max()) <= 2e-6 * float(x.abs().max()), name


def test_same_values_as_the_operator_that_scores() -> None:
    inputs = [x.float().squeeze(0) for x in arguments(1, 70, 3, 64)]
    for x, y in zip(wkv7(*inputs), wkv7_training(*inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_passing_the_state_on_is_one_pass() -> None:
    """Cut where no state is stored: values and gradients are those of the whole."""
    inputs = [x.float() for x in arguments(2, 45, 2, 32)]
    weights = torch.randn_like(inputs[0]), torch.randn_like(inputs[6])

    def in_two(*x: Tensor) -> tuple[Tensor, Tensor]:
        y1, middle = wkv7_training(*(z[:, :19] for z in x[:6]), x[6])
        y2, last = wkv7_training(*(z[:, 19:] for z in x[:6]), middle)
        return torch.cat([y1, y2], 1), last

    for x, y in zip(gradients(wkv7_training, inputs, weights), gradients(in_two, inputs, weights), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_a_token_without_decay_and_removal_begins_anew() -> None:
    inputs = [x.float() for x in arguments(1, 30, 2, 32)]
    inputs[1][:, 12] = 0
    inputs[4][:, 12] = 0
    y, last = wkv7_training(*inputs)
    alone, alone_last = wkv7_training(*(x[:, 12:] for x in inputs[:6]))
    torch.testing.assert_close(y[:, 12:], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(last, alone_last, rtol=0, atol=1e-6)


def test_threads_do_not_change_bits() -> None:
    inputs = [x.float() for x in arguments(3, 40, 2, 64)]
    weights = torch.randn_like(inputs[0]), torch.randn_like(inputs[6])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(gradients(wkv7_training, inputs, weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_torch_library_contract() -> None:
    """Fake kernels, autograd registration and aliasing, as torch.compile relies on them."""
    inputs = [x.float().requires_grad_() for x in arguments(1, 20, 1, 8)]
    torch.library.opcheck(torch.ops.rwkvmpi.wkv7_training.default, tuple(inputs))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_refused(name: str) -> None:
    good = dict(zip(NAMES, (x.float() for x in arguments(1, 4, 2, 8)), strict=True))
    with pytest.raises(TypeError, match=f"{name} must be float32"):
        wkv7_training(**good | {name: good[name].double()})
    with pytest.raises(ValueError, match="shape"):
        wkv7_training(**good | {name: good[name][..., :3]})
