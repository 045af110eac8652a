"""Matrix products: cuBLAS through torch and a kernel for what follows, or one kernel of our own for up to 16 rows.

A packed weight on a GPU is the matrix [outputs, inputs] row by row, as bytes, of kind float32, bfloat16 or float16.

The square of a relu grows past float16's 65504 from 256 on. `scale`, which multiplies the sums before anything else,
keeps it in range: relu_squared with scale 1/16 gives 1/256 of the value, and the product after it undoes that with
scale 256. Powers of 2 change no digit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rwkvmpi.ops.cuda import library
from rwkvmpi.ops.product import Packed

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_THIN_ROWS = 16
_ALIGNMENT = 16
_ACTIVATIONS = {"none": 0, "tanh": 1, "sigmoid": 2, "relu_squared": 3}
_STORE, _ADD, _GATED_ADD, _STORE_FLOAT, _MIX = range(5)  # as cuda/thin.cuh numbers them

_thin_product = library.bind("thin_product", "ppppppp" + "llll" + "iifi")
_activate = library.bind("activate", "plifi")
_gated_add = library.bind("gated_add", "pppllfi")
_mix = library.bind("mix", "pppppll" + "i")


def dtype_of(op: str, kind: str) -> torch.dtype:
    """The dtype of a weight of this kind. ValueError for a kind that GPUs do not have."""
    if kind not in KINDS:
        raise ValueError(f"{op}: on a GPU kind must be {', '.join(KINDS)}, but it is {kind!r}")
    return KINDS[kind]


def packed_bytes(kind: str, outputs: int, inputs: int) -> int:
    """Bytes of a packed weight [outputs, inputs]."""
    return outputs * inputs * dtype_of("packed_bytes", kind).itemsize


def pack(weight: Tensor, kind: str, out: Tensor | None = None) -> Packed:
    """weight [N, K], of any floating dtype and strides, wherever it lies, as `kind` into `out`, or beside itself.

    out: uint8 [packed_bytes(kind, N, K)] on the GPU. ValueError where a weight does not fit float16.
    """
    outputs, inputs = weight.shape
    dtype = dtype_of("pack", kind)
    if out is None:
        out = torch.empty(packed_bytes(kind, outputs, inputs), dtype=torch.uint8, device=weight.device)
    if out.dtype != torch.uint8 or tuple(out.shape) != (packed_bytes(kind, outputs, inputs),):
        wanted = f"uint8 [{packed_bytes(kind, outputs, inputs)}]"
        raise ValueError(f"pack: out must be {wanted}, but it is {out.dtype} {list(out.shape)}")
    if out.data_ptr() % _ALIGNMENT:
        raise ValueError(f"pack: out must begin at a multiple of {_ALIGNMENT} bytes")
    packed = Packed(kind, outputs, inputs, out)
    matrix(packed).copy_(weight)
    if dtype == torch.float16 and weight.dtype != dtype and not bool(torch.isfinite(matrix(packed)).all()):
        raise ValueError("pack: a weight is larger than float16's 65504; use bfloat16 or float32")
    if out.is_cuda:
        _adds_in_float32(out.device, dtype)  # tried out now: not while a CUDA graph is captured
    return packed


def matrix(w: Packed) -> Tensor:
    """The weight as the tensor [outputs, inputs] that it is."""
    return w.data.view(KINDS[w.kind]).view(w.outputs, w.inputs)


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
    """`rwkvmpi.ops.product` of scale * x w^T into `out` [M, N]; nothing is checked.

    x [M, K] in the weight's dtype, its rows contiguous; out in the weight's dtype or float32, for add and gated_add
    float32, for mix the weight's; gate in the weight's dtype. Up to 16 rows only the result is rounded. Beyond that the
    sums are rounded to out's dtype before the activations, and to the weight's before gated_add and mix.
    """
    if x.shape[0] <= MOST_THIN_ROWS:
        _thin_into(out, x, w, op, gate, u, d, mix, scale)
    elif op == "add":
        _add_product(out, x, matrix(w), scale)
    elif op == "gated_add":
        product = multiply(x, matrix(w), x.dtype)
        _gated_add(out, product, gate, *product.shape, scale, library.DTYPES[product.dtype])
    elif op == "mix":
        product = multiply(x, matrix(w), x.dtype)
        _mix(out, product, u, d, mix, *product.shape, library.DTYPES[product.dtype])
    else:
        multiply_into(out, x, matrix(w))
        if op != "none" or scale != 1.0:
            _activate(out, out.numel(), _ACTIVATIONS[op], scale, library.DTYPES[out.dtype])


def _thin_into(
    out: Tensor,
    x: Tensor,
    w: Packed,
    op: str,
    gate: Tensor | None,
    u: Tensor | None,
    d: Tensor | None,
    mix: Tensor | None,
    scale: float,
) -> None:
    if op in _ACTIVATIONS:
        accumulate = _STORE if out.dtype == x.dtype else _STORE_FLOAT
    else:
        accumulate = {"add": _ADD, "gated_add": _GATED_ADD, "mix": _MIX}[op]
    step = 16 // x.element_size()
    if w.inputs % step == 0 and (x.stride(0) % step or x.data_ptr() % 16):
        x = x.clone(memory_format=torch.contiguous_format)
    _thin_product(
        *(x, w.data, out, gate, u, d, mix, x.shape[0], w.outputs, w.inputs, x.stride(0)),
        *(_ACTIVATIONS.get(op, 0), accumulate, scale, library.DTYPES[x.dtype]),
    )


def multiply(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x weight^T in `dtype`, anew."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    multiply_into(out, x, weight)
    return out


def multiply_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """out = x weight^T, summed up in float32; out in x's dtype, or in float32, where torch before 2.8 rounds first."""
    if not x.is_cuda:
        out.copy_(_plainly(x, weight))
    elif out.dtype == x.dtype:
        _set_precision()
        torch.mm(x, weight.t(), out=out)
    elif _writes_float32():
        _set_precision()
        _call(torch.mm)(x, weight.t(), out_dtype=out.dtype, out=out)
    else:
        _set_precision()
        out.copy_(torch.mm(x, weight.t()))


def _add_product(out: Tensor, x: Tensor, weight: Tensor, scale: float) -> None:
    """out, float32, += scale * x weight^T."""
    if not x.is_cuda:
        out.add_(_plainly(x, weight), alpha=scale)
    elif x.dtype == out.dtype:
        _set_precision()
        torch.addmm(out, x, weight.t(), alpha=scale, out=out)
    elif _adds_in_float32(x.device, x.dtype):
        _set_precision()
        _addmm_float32(out, x, weight.t(), scale)
    else:
        out.add_(multiply(x, weight, out.dtype), alpha=scale)


def _plainly(x: Tensor, weight: Tensor) -> Tensor:
    """What the products are by definition, for the emulation."""
    return x.float() @ weight.float().t()


def _addmm_float32(out: Tensor, x: Tensor, weight: Tensor, scale: float) -> None:
    _call(torch.addmm)(out, x, weight, out_dtype=out.dtype, alpha=scale, out=out)


def _call(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch's stubs do not know all overloads."""
    return cast(Callable[..., Any], function)


@functools.cache
def _writes_float32() -> bool:
    """Whether torch.mm takes 16-bit matrices to a float32 product: since torch 2.8."""
    return "dtype_out" in torch.ops.aten.mm.overloads()


@functools.cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.addmm adds a product of `dtype` to a float32 matrix in place: some versions refuse. Tried once."""
    if "dtype_out" not in torch.ops.aten.addmm.overloads():
        return False
    out, ones = torch.ones(32, 16, device=device), torch.ones(32, 16, dtype=dtype, device=device)
    try:
        _addmm_float32(out, ones, ones[:16].t(), 256.0)
    except RuntimeError:
        return False
    return bool((out == 4097.0).all())


@functools.cache
def _set_precision() -> None:
    """float32 products in float32, not TF32; sums of 16-bit products in float32 to the end. For this process."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
