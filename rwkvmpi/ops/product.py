"""Matrix products with packed weights, and in the same pass the function that follows them."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvmpi.ops import check, library
from rwkvmpi.ops.cuda.library import takes
from rwkvmpi.ops.registry import SAME, operator

_product = library.bind("product", "ipllpllipippppi")
_pack = library.bind("pack", "ipillllpi")

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}  # as cuda/host/product.h numbers them
OPS = {"none": 0, "tanh": 1, "sigmoid": 2, "relu_squared": 3, "add": 4, "gated_add": 5, "mix": 6}
PANEL = 32  # outputs of a panel
_ALIGNMENT = 64
_SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GROUPS = {"float32": 1, "bfloat16": 2, "int8": 4}  # inputs in 4 bytes
MOST_INT8_INPUTS = 131072  # 127 * 127 times as many fit an int32


class Packed(NamedTuple):
    """A weight [N outputs, K inputs] in the order in which the products read it (`pack`).

    On a CPU: kind: "float32", "bfloat16" or "int8"; data: uint8 [packed_bytes(kind, N, K)], aligned to 64 bytes: panels
    [ceil(N/32)][ceil(K/g)][32][g] (g = 1, 2, 4), padded with zeros; for int8 then a float32 scale and an int32 sum of
    the quantised weights per output, ceil(N/32)*32 of each. On a GPU: "float32", "bfloat16" or "float16"; the matrix.
    """

    kind: str
    outputs: int
    inputs: int
    data: Tensor

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype of x in `product`: that of the kind, bfloat16 for "int8"."""
        return torch.bfloat16 if self.kind == "int8" else getattr(torch, self.kind)


def packed_bytes(kind: str, outputs: int, inputs: int, on_gpu: bool = False) -> int:
    """Bytes of a packed weight [outputs, inputs]. ValueError for an unknown kind."""
    if on_gpu:
        return _on_gpu().packed_bytes(kind, outputs, inputs)
    check_kind("packed_bytes", kind)
    panels = -(-outputs // PANEL)
    return panels * PANEL * (4 * -(-inputs // _GROUPS[kind]) + (8 if kind == "int8" else 0))


def check_kind(op: str, kind: str) -> None:
    """ValueError unless `kind` is one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be {', '.join(KINDS)}, but it is {kind!r}")


def _on_gpu() -> ModuleType:
    from rwkvmpi.ops.cuda import product  # which needs this module

    return product


def pack(weight: Tensor, kind: str, out: Tensor | None = None, on_gpu: bool = False) -> Packed:
    """weight [N, K], float32, bfloat16 or float16, of any strides (w.t() is fine), all finite, as `kind`.

    int8 is symmetric per output: scale max|w|/127, rounded to nearest even. out: uint8 [packed_bytes(kind, N, K)] that
    shall hold the data, aligned to 64 bytes. on_gpu: for products on a GPU, where `out`, or else weight, lies.
    TypeError and ValueError as for the operators.
    """
    if on_gpu:
        packed: Packed = _on_gpu().pack(weight, kind, out)
        return packed
    check_kind("pack", kind)
    outputs, inputs = check.dimensions("pack", "weight", weight, 2)
    if weight.dtype not in _SOURCES:
        raise TypeError(
            f"pack: weight must be float32, bfloat16 or float16, but it is {str(weight.dtype).removeprefix('torch.')}"
        )
    if kind == "int8" and inputs > MOST_INT8_INPUTS:
        raise ValueError(f"pack: int8 takes at most {MOST_INT8_INPUTS} inputs, but weight has {inputs}")
    size = packed_bytes(kind, outputs, inputs)
    if out is None:
        out = torch.empty(size, dtype=torch.uint8)
    check.tensor("pack", "out", out, [size], (torch.uint8,))
    if out.data_ptr() % _ALIGNMENT:
        raise ValueError(f"pack: out must begin at a multiple of {_ALIGNMENT} bytes")
    source = _SOURCES[weight.dtype]
    _pack(KINDS[kind], weight, source, *weight.stride(), outputs, inputs, out, torch.get_num_threads())
    return Packed(kind, outputs, inputs, out)


def product_into(
    out: Tensor,
    x: Tensor,
    w: Packed,
    op: str = "none",
    gate: Tensor | None = None,
    u: Tensor | None = None,
    d: Tensor | None = None,
    mix: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """`product` into `out` [M, N], float32 or bfloat16, contiguous; for the layers: nothing is checked.

    scale multiplies the sums before `op`, on a GPU: `relu_squared_scale`."""
    if takes(out):
        _on_gpu().product_into(out, x, w, op, gate, u, d, mix, scale)
        return
    _product(
        *(KINDS[w.kind], x, x.stride(0), x.shape[0], w.data, w.outputs, w.inputs, OPS[op]),
        *(out, out.dtype == torch.bfloat16, gate, u, d, mix, torch.get_num_threads()),
    )


def relu_squared_scale(dtype: torch.dtype) -> float:
    """What `product_into` needs as `scale` so that relu_squared stays in the range of `dtype`: a power of 2.

    The product that uses its results takes 1 / its square."""
    return 1 / 16 if dtype == torch.float16 else 1.0


def _shape(x: Tensor, data: Tensor, kind: str, outputs: int) -> list[int]:
    """Checks x and the weight; the output's shape."""
    on_gpu = takes(x)
    if not on_gpu:
        check_kind("product", kind)
    rows, inputs = check.dimensions("product", "x", x, 2)
    wanted = torch.bfloat16 if kind == "int8" else getattr(torch, kind)
    check.tensor("product", "x", x[:0], [0, inputs], (wanted,))
    if x.stride(1) != 1 and inputs > 1:
        raise ValueError(f"product: x's rows must be contiguous, but its strides are {list(x.stride())}")
    check.tensor("product", "w", data, [packed_bytes(kind, outputs, inputs, on_gpu)], (torch.uint8,))
    return [rows, outputs]


def _product_outputs(
    x: Tensor,
    data: Tensor,
    kind: str,
    outputs: int,
    op: str,
    out_dtype: torch.dtype,
    u: Tensor | None,
    d: Tensor | None,
    mix: Tensor | None,
) -> Tensor:
    shape = _shape(x, data, kind, outputs)
    check.out_dtype("product", out_dtype, x)
    for name, given, wanted in (("u", u, shape), ("d", d, shape), ("mix", mix, shape[1:])):
        if (given is not None) != (op == "mix"):
            raise ValueError(f"product: {name} belongs to op mix, and op is {op!r}")
        if given is not None:
            check.tensor("product", name, given, wanted)
    return torch.empty(shape, dtype=out_dtype, device=x.device)


@operator(
    "product(Tensor x, Tensor data, str kind, int outputs, str op, ScalarType out_dtype, Tensor? u, Tensor? d, "
    "Tensor? mix) -> Tensor",
    _product_outputs,
    cuda=SAME,
)
def _run_product(
    out: Tensor,
    x: Tensor,
    data: Tensor,
    kind: str,
    outputs: int,
    op: str,
    out_dtype: torch.dtype,
    u: Tensor | None,
    d: Tensor | None,
    mix: Tensor | None,
) -> None:
    product_into(out, x, Packed(kind, outputs, x.shape[1], data), op, None, u, d, mix)


def _product_add_outputs(out: Tensor, x: Tensor, data: Tensor, kind: str, outputs: int, gate: Tensor | None) -> None:
    shape = _shape(x, data, kind, outputs)
    check.tensor("product", "out", out, shape)
    if gate is not None:
        check.tensor("product", "gate", gate, shape, check.computed(x))


@operator(
    "product_add(Tensor(a!) out, Tensor x, Tensor data, str kind, int outputs, Tensor? gate) -> ()",
    _product_add_outputs,
    cuda=SAME,
)
def _run_product_add(
    _: None, out: Tensor, x: Tensor, data: Tensor, kind: str, outputs: int, gate: Tensor | None
) -> None:
    product_into(out, x, Packed(kind, outputs, x.shape[1], data), "add" if gate is None else "gated_add", gate)


def product(
    x: Tensor,
    w: Packed,
    op: str = "none",
    out_dtype: torch.dtype = torch.float32,
    gate: Tensor | None = None,
    u: Tensor | None = None,
    d: Tensor | None = None,
    mix: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """s = x w^T, and in the same pass what follows it: [M, N] in out_dtype (float32 or bfloat16).

    x: [M, K], w.activation_dtype; its rows are contiguous, but may lie apart. The sum over K is float32 (int8: exact),
    one chain in order per element, so a row's bits depend on that row and the weight alone. op, of the sum before it is
    rounded:
      none, tanh, sigmoid, relu_squared (max(s, 0)^2);
      mix: u + d * (mix + s), u and d float32 [M, N], mix float32 [N];
      add: out + s, and gated_add: out + sigmoid(gate) * s, both in place, out and gate float32 [M, N].
    int8: each row of x is quantised with the scale max|x|/127, rounded to nearest even; a row with a NaN or an Inf
    gives NaN. TypeError and ValueError for arguments that do not fit.
    """
    if op not in OPS:
        raise ValueError(f"product: op must be {', '.join(OPS)}, but it is {op!r}")
    if x.dim() == 2 and x.shape[1] != w.inputs:
        raise ValueError(f"product: x must have {w.inputs} columns, as w has inputs, but it has {x.shape[1]}")
    if (op == "gated_add") != (gate is not None):
        raise ValueError(f"product: gate belongs to op gated_add, and op is {op!r}")
    if (op in ("add", "gated_add")) != (out is not None):
        raise ValueError(f"product: out belongs to the ops add and gated_add, and op is {op!r}")
    if out is None:
        return _run_product(x, w.data, w.kind, w.outputs, op, out_dtype, u, d, mix)
    if out_dtype != torch.float32 or any(given is not None for given in (u, d, mix)):
        raise ValueError(f"product: op {op} takes neither u, d, mix nor an out_dtype")
    _run_product_add(out, x, w.data, w.kind, w.outputs, gate)
    return out
