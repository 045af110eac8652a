"""The layout of packed weights, and the arguments that packing and the products refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkvmpi.ops.product import Packed, pack, packed_bytes, product

GROUPS = {"float32": 1, "bfloat16": 2, "int8": 4}
KINDS = tuple(GROUPS)


def panels(weight: Tensor, kind: str) -> Tensor:
    """The layout of the data, from its definition: [ceil(N/32)][ceil(K/g)][32][g]."""
    group = GROUPS[kind]
    outputs, inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -inputs % group, 0, -outputs % 32))
    return padded.view(-1, 32, padded.shape[1] // group, group).transpose(1, 2).contiguous().view(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (31, 70), (70, 129), (64, 64)])
def test_layout(kind: str, dtype: torch.dtype, outputs: int, inputs: int, isa: str) -> None:
    weight = torch.randn(outputs, inputs + 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    views = [weight[:, 3:], weight[:, 3:].t().contiguous().t(), torch.stack([weight, weight], 2)[:, 3:, 1]]
    for view in views:
        out = torch.full([packed_bytes(kind, outputs, inputs)], 85, dtype=torch.uint8)
        w = pack(view, kind, out)
        assert w.data is out
        assert (w.kind, w.outputs, w.inputs) == (kind, outputs, inputs)
        if kind != "int8":
            stored = panels(weight[:, 3:].to(getattr(torch, kind)), kind)
            assert torch.equal(w.data.view(stored.dtype), stored)
            continue
        most = weight[:, 3:].float().abs().amax(1, keepdim=True)
        scale = most / torch.tensor(127.0)
        whole = torch.round(weight[:, 3:].float() * (torch.tensor(127.0) / most))
        stored = panels(whole.to(torch.int8), kind)
        assert torch.equal(w.data[: stored.numel()].view(torch.int8), stored)
        rest = torch.nn.functional.pad(torch.cat([scale, whole.sum(1, keepdim=True)], 1), (0, 0, 0, -outputs % 32))
        scales, sums = w.data[stored.numel() :].chunk(2)
        assert torch.equal(scales.view(torch.float32), rest[:, 0].float())
        assert torch.equal(sums.view(torch.int32), rest[:, 1].int())


def test_every_float16_number(isa: str) -> None:
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    numbers = numbers[numbers.isfinite()].view(-1, 64)
    assert torch.equal(pack(numbers, "float32").data.view(torch.float32), panels(numbers.float(), "float32"))


# ---- what is refused ----

X, W = torch.zeros(4, 8), pack(torch.zeros(5, 8), "float32")
HALF = pack(torch.zeros(5, 8), "bfloat16")
OUT = torch.zeros(4, 5)
WRONG: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (ValueError, "pack: kind must be float32, bfloat16, int8", lambda: pack(X, "int4")),
    (TypeError, "pack: weight must be float32, bfloat16 or float16", lambda: pack(X.double(), "int8")),
    (ValueError, "pack: weight must have 2 dimensions", lambda: pack(X[0], "int8")),
    (ValueError, "pack: out must have shape", lambda: pack(X, "int8", torch.zeros(3, dtype=torch.uint8))),
    (TypeError, "pack: out must be uint8", lambda: pack(X, "float32", torch.zeros(packed_bytes("float32", 4, 8)))),
    (
        ValueError,
        "pack: out must begin at a multiple of 64 bytes",
        lambda: pack(X, "float32", torch.zeros(packed_bytes("float32", 4, 8) + 1, dtype=torch.uint8)[1:]),
    ),
    (ValueError, "pack: int8 takes at most 131072 inputs", lambda: pack(torch.zeros(1, 131073), "int8")),
    (ValueError, "product: op must be none, tanh", lambda: product(X, W, "gelu")),
    (ValueError, "product: x must have 8 columns", lambda: product(X[:, :7], W)),
    (ValueError, "product: x must have 2 dimensions", lambda: product(X[0], W)),
    (TypeError, "product: x must be bfloat16, but it is float32", lambda: product(X, HALF)),
    (ValueError, "product: x's rows must be contiguous", lambda: product(torch.zeros(8, 4).t(), W)),
    (ValueError, "product: w must have shape", lambda: product(X, Packed("float32", 5, 8, W.data[:-1]))),
    (TypeError, "product: out_dtype must be", lambda: product(X, W, "none", torch.float16)),
    (ValueError, "product: out belongs to the ops add and gated_add", lambda: product(X, W, "add")),
    (ValueError, "product: out belongs to the ops add and gated_add", lambda: product(X, W, "none", out=OUT)),
    (ValueError, "product: out must have shape", lambda: product(X, W, "add", out=OUT[:3])),
    (TypeError, "product: out must be float32", lambda: product(X, W, "add", out=OUT.bfloat16())),
    (ValueError, "takes neither u, d, mix", lambda: product(X, W, "add", torch.bfloat16, out=OUT)),
    (ValueError, "product: gate belongs to op gated_add", lambda: product(X, W, "gated_add", out=OUT)),
    (ValueError, "product: gate must have shape", lambda: product(X, W, "gated_add", gate=X, out=OUT)),
    (ValueError, "product: u belongs to op mix", lambda: product(X, W, "tanh", u=OUT)),
    (ValueError, "product: mix belongs to op mix", lambda: product(X, W, "mix", u=OUT, d=OUT)),
    (ValueError, r"product: mix must have shape \[5\]", lambda: product(X, W, "mix", u=OUT, d=OUT, mix=X[0])),
]


@pytest.mark.parametrize(("error", "words", "call"), WRONG, ids=[words for _, words, _ in WRONG])
def test_wrong_arguments(error: type[Exception], words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=words):
        call()
