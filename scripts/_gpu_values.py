"""Every operator on a GPU against its float64 reference on the CPU, on fresh random input.

    python scripts/_gpu_values.py [--seed N] [--small]

Prints a line per operator, dtype and body: the largest error over the reference's scale, and its limit. Exits with
1 when one is beyond it. --small: so little that compute-sanitizer can watch it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch import Tensor

from rwkvmpi import ops
from rwkvmpi.ops import reference
from rwkvmpi.ops.cuda import library
from rwkvmpi.ops.cuda import time_mix as cuda_time_mix
from rwkvmpi.ops.training import wkv7_training

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest error over the value itself and the root mean square of all: float32 sums in another order; 16-bit
# results are rounded once or twice, and the tiles round the operands of their products too.
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
EPS = 64e-5
GAPS = [[3, 1], [4, 31], [40, 33], [80, 64]]  # segments of the smallest chunk: single rows, odd lengths, gaps


@dataclass
class Result:
    """One comparison."""

    name: str
    dtype: str
    error: float
    limit: float

    @property
    def good(self) -> bool:
        return self.error <= self.limit  # False for NaN


class Cases:
    """Random inputs, on the device and rounded, with their float64 twins on the CPU."""

    def __init__(self, seed: int, heads: int, size: int, device: str) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self.heads, self.size, self.width, self.device = heads, size, heads * size, device
        self.rows = torch.tensor(GAPS, dtype=torch.int32)
        self.total = int(self.rows[-1].sum()) + 5

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self._random) * scale

    def results(self) -> Iterator[Result]:
        for dtype in DTYPES:
            yield from self._norms(dtype)
            yield from self._products(dtype)
            yield from self._version7(dtype)
            yield from self._version6(dtype)
            yield from self._version4(dtype)
            yield from self._training(dtype)

    def _compare(
        self,
        name: str,
        dtype: torch.dtype,
        function: Callable[..., object],
        truth: Callable[..., object],
        inputs: Sequence[Any],
        changed: Sequence[int] = (),
    ) -> Result:
        """`function` on the device, `truth` in float64; `changed`: the inputs that the first changes in place, which
        are the last outputs of the second."""
        there: list[Any] = [x if x is None else x.to(self.device, copy=True) for x in inputs]
        expected = _tensors(truth(*[x if x is None or not x.is_floating_point() else x.double() for x in inputs]))
        found = [*_tensors(function(*there)), *(there[i] for i in changed)]
        worst = 0.0
        for one, other in zip(found, expected, strict=True):
            scale = other.square().mean().sqrt().clamp_min(1e-6) + other.abs()
            worst = max(worst, float(((one.cpu().double() - other).abs() / scale).max()), key=_nan_last)
        return Result(name, str(dtype).removeprefix("torch."), worst, LIMITS[dtype])

    def _norms(self, dtype: torch.dtype) -> Iterator[Result]:
        x, weight, bias = self.normal(self.total, self.width), self.normal(self.width), self.normal(self.width)
        yield self._compare(
            "layer_norm",
            dtype,
            lambda x, w, b: ops.layer_norm(x, w, b, out_dtype=dtype),
            reference.layer_norm,
            [x, weight, bias],
        )
        shift, mixes = self.normal(len(GAPS), self.width), self.normal(6, self.width)
        yield self._compare(
            "shift_mix",
            dtype,
            lambda *given: _any(ops.shift_mix)(*given, dtype),
            reference.shift_mix,
            [x, weight, bias, shift, mixes, self.rows],
            changed=[3],
        )

    def _products(self, dtype: torch.dtype) -> Iterator[Result]:
        kind = str(dtype).removeprefix("torch.")
        weight = self.normal(3 * self.width, self.width, scale=self.width**-0.5).to(dtype)
        for rows in (1, 5, self.total):
            x = self.normal(rows, self.width).to(dtype)
            for op in ("none", "relu_squared", "tanh", "sigmoid"):
                yield self._compare(
                    f"product {op}, {rows} rows",
                    dtype,
                    lambda x, w, op=op: ops.product(x, ops.pack(w, kind, on_gpu=True), op, dtype),
                    lambda x, w, op=op: AFTER[op](x @ w.t()),
                    [x, weight],
                )
        x, targets = self.normal(self.total, self.width).to(dtype), torch.randint(-1, len(weight), (self.total,))
        yield self._compare(
            "head_logprobs",
            dtype,
            lambda x, w, t: ops.head_logprobs(x, ops.pack(w, kind, on_gpu=True), t),
            lambda x, w, t: reference.head_logprobs(x, w, t),
            [x, weight, targets],
        )

    def _version7(self, dtype: torch.dtype) -> Iterator[Result]:
        heads, size = self.heads, self.size
        r, k, v, a_lin, v_lin, g, v_first = (self.normal(self.total, self.width).to(dtype) for _ in range(7))
        w_lin = self.normal(self.total, self.width, scale=4.0).to(dtype)
        w0, a0, v0, k_k, k_a, ln_weight, ln_bias = (self.normal(self.width) for _ in range(7))
        r_k, state = self.normal(heads, size), self.normal(len(GAPS), heads, size, size)
        for first in (False, True):
            inputs = [r, k, v, w_lin, a_lin, None if first else v_lin, g, None if first else v_first, w0, a0]
            inputs += [None if first else v0, k_k, k_a, r_k, ln_weight, ln_bias, state, self.rows]
            bodies = [cuda_time_mix.SEQUENTIAL]
            if size == 64 and dtype != torch.float32:
                bodies += [cuda_time_mix.TILES, cuda_time_mix.TILES_IN_TWO]
            for body in bodies:

                def on_device(*given: Any, body: int = body, first: bool = first) -> Any:
                    h, v_out = torch.full_like(given[0], torch.nan), torch.full_like(given[0], torch.nan)
                    _any(cuda_time_mix.v7_time_mix)((h, v_out if first else None), *given, body=body)
                    return (h, v_out) if first else (h,)

                def truth(*given: Any, first: bool = first) -> Any:
                    h, v_out, after = reference.v7_time_mix(*given)
                    return (h, v_out, after) if first else (h, after)

                yield self._compare(f"v7_time_mix body {body}", dtype, on_device, truth, inputs, changed=[16])

    def _version6(self, dtype: torch.dtype) -> Iterator[Result]:
        heads, size = self.heads, self.size
        r, k, v, w_lin, g = (self.normal(self.total, self.width).to(dtype) for _ in range(5))
        decay, ln_weight, ln_bias = (self.normal(self.width) for _ in range(3))
        u, state = self.normal(heads, size), self.normal(len(GAPS), heads, size, size)
        yield self._compare(
            "v6_time_mix",
            dtype,
            lambda *given: _any(ops.v6_time_mix)(*given, EPS, dtype),
            reference.v6_time_mix,
            [r, k, v, w_lin, decay, u, g, ln_weight, ln_bias, state, self.rows],
            changed=[9],
        )
        yield self._compare(
            "v5_time_mix",
            dtype,
            lambda *given: _any(ops.v5_time_mix)(*given, EPS, dtype),
            reference.v5_time_mix,
            [r, k, v, torch.sigmoid(decay).view(heads, size), u, g, ln_weight, ln_bias, state, self.rows],
            changed=[8],
        )

    def _version4(self, dtype: torch.dtype) -> Iterator[Result]:
        r, k, v = (self.normal(self.total, self.width).to(dtype) for _ in range(3))
        w, u = -self.normal(self.width).exp(), self.normal(self.width)
        state = self.normal(len(GAPS), 3, self.width).abs()
        yield self._compare(
            "v4_time_mix",
            dtype,
            lambda *given: _any(ops.v4_time_mix)(*given, dtype),
            reference.v4_time_mix,
            [r, k, v, w, u, state, self.rows],
            changed=[5],
        )

    def _training(self, dtype: torch.dtype) -> Iterator[Result]:
        """The gradients of r, w, k, v, a, b and of the first state."""
        tokens = 37
        r, k, v = (self.normal(1, tokens, self.heads, self.size, scale=0.5).to(dtype) for _ in range(3))
        kk = torch.nn.functional.normalize(self.normal(1, tokens, self.heads, self.size), dim=-1)
        w = torch.exp(-0.6065306597 * torch.sigmoid(self.normal(1, tokens, self.heads, self.size, scale=4.0))).to(dtype)
        a, b = (-kk).to(dtype), (kk * torch.rand(kk.shape, generator=self._random)).to(dtype)
        state = self.normal(1, self.heads, self.size, self.size)
        weights = self.normal(*r.shape), self.normal(*state.shape)

        def gradients(run: Callable[..., tuple[Tensor, Tensor]], given: Sequence[Tensor]) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in given]
            y, last = run(*leaves)
            loss = (y.double() * weights[0].to(y.device).double()).sum()
            loss = loss + (last.double() * weights[1].to(y.device).double()).sum()
            return torch.autograd.grad(loss, leaves)

        yield self._compare(
            "wkv7 backward",
            dtype,
            lambda *given: gradients(wkv7_training, given),
            lambda *given: gradients(_plain_wkv7, given),
            [r, w, k, v, a, b, state],
        )


AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda s: s,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu_squared": lambda s: s.clamp_min(0).square(),
}


def _plain_wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """[B, T, H, N], in operations that autograd knows."""
    y = []
    for t in range(r.shape[1]):
        removed = torch.einsum("bhvk,bhk->bhv", state, a[:, t])
        state = state * w[:, t].unsqueeze(2) + torch.einsum("bhv,bhk->bhvk", removed, b[:, t])
        state = state + torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
        y.append(torch.einsum("bhvk,bhk->bhv", state, r[:, t]))
    return torch.stack(y, 1), state


def _any(function: Callable[..., Any]) -> Callable[..., Any]:
    """For arguments in a list, which a type checker cannot follow."""
    return function


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]


def _nan_last(x: float) -> float:
    return float("inf") if x != x else x


@click.command(help=__doc__)
@click.option("--seed", type=int, default=None, help="[default: another one every time]")
@click.option("--small", is_flag=True)
@click.option("--json", "as_json", is_flag=True, help="Prints JSON.")
def main(seed: int | None, small: bool, as_json: bool) -> None:
    seed = torch.seed() % 2**31 if seed is None else seed
    if not library.emulating() and (why := library.reason()):
        raise click.ClickException(why)
    device = "cpu" if library.emulating() else "cuda"
    shapes = [(1, 64), (2, 40)] if small else [(4, 64), (3, 40), (12, 64), (2, 128)]
    results = [result for heads, size in shapes for result in Cases(seed, heads, size, device).results()]
    if as_json:
        print(json.dumps({"seed": seed, "results": [vars(result) for result in results]}))
    else:
        for result in results:
            mark = "" if result.good else "   WRONG"
            print(f"{result.name:32} {result.dtype:9} {result.error:9.2e} of {result.limit:.0e}{mark}")
        wrong = sum(not result.good for result in results)
        print(f"seed {seed}: {len(results)} comparisons, {wrong} wrong")
    sys.exit(0 if all(result.good for result in results) else 1)


if __name__ == "__main__":
    main()
