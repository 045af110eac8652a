"""Layer norm; token shift: the normalised rows of a chunk mixed with the row before each; the embedding.

Each `..._into(outputs, *arguments)` fills given outputs without checks, for the layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvmpi.ops import check, library
from rwkvmpi.ops.registry import operator
from rwkvmpi.ops.wkv import segment_count

LAYER_NORM_EPS = 1e-5

_layer_norm = library.bind("layer_norm", "ppppillfi")
_shift_mix = library.bind("shift_mix", "pppplppp" + "ipp" + "llllfi")
_embed = library.bind("embed", "pipippplllfi")

_TABLES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of the C function's numbers


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _norm_arguments(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> list[int]:
    shape = check.dimensions(op, "x", x, 2)
    check.tensor(op, "x", x, shape)
    check.tensor(op, "weight", weight, shape[1:])
    check.tensor(op, "bias", bias, shape[1:])
    return shape


def _layer_norm_outputs(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    _norm_arguments("layer_norm", x, weight, bias)
    check.out_dtype("layer_norm", out_dtype, x)
    return torch.empty_like(x, dtype=out_dtype)


@operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType out_dtype) -> Tensor",
    _layer_norm_outputs,
    cuda="norms:layer_norm_into",
)
def _run_layer_norm(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float = LAYER_NORM_EPS, _: torch.dtype | None = None
) -> None:
    _layer_norm(x, weight, bias, out, _is_bf16(out), *x.shape, eps, torch.get_num_threads())


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = LAYER_NORM_EPS, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Each row of x, float32 [T, C], to mean 0 and variance 1, times weight [C] plus bias [C]; [T, C] in out_dtype."""
    return _run_layer_norm(x, weight, bias, eps, out_dtype)


layer_norm_into = _run_layer_norm.into


def _check_shift(
    op: str, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, mixes: Tensor, rows: Tensor, out_dtype: torch.dtype
) -> list[int]:
    """[M, T, C]"""
    shape = _norm_arguments(op, x, weight, bias)
    count = check.dimensions(op, "mixes", mixes, 2)[0]
    check.tensor(op, "mixes", mixes, [count, shape[1]])
    if shift.dim() == 2 and shift.stride(1) == 1 and shift.stride(0) >= shift.shape[1]:
        shift = shift.as_strided(shift.shape, (shift.shape[1], 1))  # its rows may lie apart, in a larger state
    check.tensor(op, "shift", shift, [segment_count(op, rows, shape[0]), shape[1]])
    check.out_dtype(op, out_dtype, x)
    return [count, *shape]


def _shift_mix_outputs(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, mixes: Tensor, rows: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return x.new_empty(_check_shift("shift_mix", x, weight, bias, shift, mixes, rows, out_dtype), dtype=out_dtype)


@operator(
    "shift_mix(Tensor x, Tensor weight, Tensor bias, Tensor(a!) shift, Tensor mixes, Tensor rows, ScalarType out_dtype)"
    " -> Tensor",
    _shift_mix_outputs,
    cuda="norms:shift_mix_into",
)
def _run_shift_mix(
    mixed: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    mixes: Tensor,
    rows: Tensor,
    _: torch.dtype | None = None,
) -> None:
    _run_shift_pair.into((None, None, mixed), x, weight, bias, shift, mixes, rows)


def shift_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    mixes: Tensor,
    rows: Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """mixed[m] = u + d * mixes[m], [M, T, C] in out_dtype; u = layer_norm(x), d = (u of the row before) - u.

    x: float32 [T, C]; weight, bias: float32 [C]; mixes: float32 [M, C]; rows: int32 [D, 2], first row and number of
    rows of each segment; shift: float32 [D, C], the row before each segment's first, which becomes its last u, in
    place: its rows may lie any distance apart. Outside all segments d is 0. Raises TypeError or ValueError for wrong
    arguments.
    """
    return _run_shift_mix(x, weight, bias, shift, mixes, rows, out_dtype)


shift_mix_into = _run_shift_mix.into


def _shift_pair_outputs(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, mixes: Tensor, rows: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _check_shift("shift_pair", x, weight, bias, shift, mixes, rows, out_dtype)
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(shape, dtype=out_dtype)


@operator(
    "shift_pair(Tensor x, Tensor weight, Tensor bias, Tensor(a!) shift, Tensor mixes, Tensor rows,"
    " ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    _shift_pair_outputs,
    cuda="norms:shift_pair_into",
)
def _run_shift_pair(
    out: tuple[Tensor | None, Tensor | None, Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    mixes: Tensor,
    rows: Tensor,
    _: torch.dtype | None = None,
) -> None:
    u, d, mixed = out
    _shift_mix(
        *(x, weight, bias, shift, shift.stride(0), mixes, rows, mixed, _is_bf16(mixed), u, d),
        *(mixes.shape[0], *x.shape, rows.shape[0], LAYER_NORM_EPS, torch.get_num_threads()),
    )


def shift_pair(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    mixes: Tensor,
    rows: Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """`shift_mix` that gives u and d too: (u, d, mixed), the first two float32 [T, C]."""
    return _run_shift_pair(x, weight, bias, shift, mixes, rows, out_dtype)


shift_pair_into = _run_shift_pair.into


def _embed_outputs(tokens: Tensor, table: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    op = "embed"
    check.tensor(op, "tokens", tokens, check.dimensions(op, "tokens", tokens, 1), (torch.int32, torch.int64))
    vocabulary, channels = check.dimensions(op, "table", table, 2)
    check.tensor(op, "table", table, [vocabulary, channels], _TABLES)
    if (weight is None) != (bias is None):
        raise ValueError(f"{op}: weight and bias belong together")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            check.tensor(op, name, x, [channels])
    if tokens.device.type != "meta" and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"{op}: tokens must be 0 to {vocabulary - 1}, but they are {low} to {high}")
    return table.new_empty([tokens.shape[0], channels], dtype=torch.float32)


@operator(
    "embed(Tensor tokens, Tensor table, Tensor? weight, Tensor? bias) -> Tensor",
    _embed_outputs,
    cuda="norms:embed_into",
)
def _run_embed(x: Tensor, tokens: Tensor, table: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    _embed(
        *(tokens, tokens.dtype == torch.int64, table, _TABLES.index(table.dtype), weight, bias, x),
        *(tokens.shape[0], *table.shape, LAYER_NORM_EPS, torch.get_num_threads()),
    )


def embed(tokens: Tensor, table: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """layer_norm(table[tokens]), or without the norm where weight and bias are None; float32 [T, C].

    tokens: int32 or int64 [T], each 0 to V-1; table: float32, bfloat16 or float16 [V, C]; weight, bias: float32 [C].
    Raises TypeError or ValueError for wrong arguments.
    """
    return _run_embed(tokens, table, weight, bias)


# Unchecked; a token outside the vocabulary gives zeros.
embed_into = _run_embed.into
