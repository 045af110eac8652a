"""The WKV recurrences of RWKV-4 to 7 over the segments of a chunk. What they compute: `rwkvmpi.ops.reference`.

On a GPU what is float32 [T, ...] here may be bfloat16 or float16 too, all of one dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvmpi.ops import check, library
from rwkvmpi.ops.registry import operator

MAX_HEAD_SIZE = 512

_wkv7 = library.bind("wkv7", "p" * 10 + "lllli")
_wkv6 = library.bind("wkv6", "p" * 9 + "llllii")
_wkv4 = library.bind("wkv4", "p" * 8 + "llli")


def _check_state(op: str, state: Tensor, rows: Tensor | None, tail: list[int]) -> None:
    lead = [] if rows is None else [check.rows_tensor(op, rows)]
    check.tensor(op, "state", state, lead + tail)


def _segments(op: str, rows: Tensor | None, total: int) -> Tensor:
    if rows is None:
        return torch.tensor([[0, total]], dtype=torch.int32)
    check.rows_values(op, rows, total)
    return rows


def segment_count(op: str, rows: Tensor, total: int) -> int:
    """The number of segments of `rows`, checked; their values only where there are any (not while tracing)."""
    count = check.rows_tensor(op, rows)
    if rows.device.type != "meta":
        check.rows_values(op, rows, total)
    return count


def _head_shape(op: str, r: Tensor) -> list[int]:
    shape = check.dimensions(op, "r", r, 3)
    if not 1 <= shape[2] <= MAX_HEAD_SIZE:
        raise ValueError(f"{op}: the head size must be 1 to {MAX_HEAD_SIZE}, but it is {shape[2]}")
    return shape


def _wkv7_outputs(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = _head_shape("wkv7", r)
    for name, x in zip("rwkvab", (r, w, k, v, a, b), strict=True):
        check.tensor("wkv7", name, x, shape, check.computed(r))
    _check_state("wkv7", state, rows, [shape[1], shape[2], shape[2]])
    return torch.empty_like(r), torch.empty_like(state)


@operator(
    "wkv7(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor state, Tensor? rows) -> (Tensor, Tensor)",
    _wkv7_outputs,
    cuda="wkv:wkv7",
)
def _run_wkv7(
    out: tuple[Tensor, Tensor],
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    rows: Tensor | None,
) -> None:
    segments = _segments("wkv7", rows, r.shape[0])
    _wkv7(r, w, k, v, a, b, state, segments, *out, *r.shape, segments.shape[0], torch.get_num_threads())


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """WKV-7: S <- S*diag(w) + (S a) b^T + v k^T; y = S r, S being [value, key].

    r, w, k, v, a, b: float32 [T, H, N], w the decay in (0, 1), N up to 512. state: float32 [H, N, N]; with rows (int32
    [D, 2], first row and number of rows of each segment) [D, H, N, N]. Returns y [T, H, N], 0 in rows outside every
    segment, and the new state; the arguments are not changed. Raises TypeError or ValueError for wrong arguments.
    """
    return _run_wkv7(r, w, k, v, a, b, state, rows)


def _wkv6_outputs(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, rows: Tensor | None, op: str = "wkv6"
) -> tuple[Tensor, Tensor]:
    shape = _head_shape(op, r)
    for name, x in zip("rkv", (r, k, v), strict=True):
        check.tensor(op, name, x, shape, check.computed(r))
    check.tensor(op, "w", w, shape[1:] if op == "wkv5" else shape, check.FLOAT32 if op == "wkv5" else check.computed(r))
    check.tensor(op, "u", u, shape[1:])
    _check_state(op, state, rows, [shape[1], shape[2], shape[2]])
    return torch.empty_like(r), torch.empty_like(state)


def _wkv5_outputs(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _wkv6_outputs(r, w, k, v, u, state, rows, "wkv5")


@operator(
    "wkv6(Tensor r, Tensor w, Tensor k, Tensor v, Tensor u, Tensor state, Tensor? rows) -> (Tensor, Tensor)",
    _wkv6_outputs,
    cuda="wkv:wkv6",
)
def _run_wkv6(
    out: tuple[Tensor, Tensor],
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    rows: Tensor | None,
) -> None:
    segments = _segments("wkv6", rows, r.shape[0])
    _wkv6(r, w, k, v, u, state, segments, *out, *r.shape, segments.shape[0], 0, torch.get_num_threads())


@operator(
    "wkv5(Tensor r, Tensor w, Tensor k, Tensor v, Tensor u, Tensor state, Tensor? rows) -> (Tensor, Tensor)",
    _wkv5_outputs,
    cuda="wkv:wkv5",
)
def _run_wkv5(
    out: tuple[Tensor, Tensor],
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    rows: Tensor | None,
) -> None:
    segments = _segments("wkv5", rows, r.shape[0])
    _wkv6(r, w, k, v, u, state, segments, *out, *r.shape, segments.shape[0], 1, torch.get_num_threads())


def wkv6(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """WKV-6: y = (S + v (u*k)^T) r; S <- S*diag(w) + v k^T, S being [value, key].

    r, w, k, v: float32 [T, H, N], w the decay in (0, 1); u [H, N] the bonus of the current token; state, rows and
    results as in `wkv7`.
    """
    return _run_wkv6(r, w, k, v, u, state, rows)


def wkv5(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """WKV-5: as `wkv6`, with one decay w [H, N] for all tokens."""
    return _run_wkv5(r, w, k, v, u, state, rows)


def _wkv4_outputs(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = check.dimensions("wkv4", "k", k, 2)
    check.tensor("wkv4", "k", k, shape, check.computed(k))
    check.tensor("wkv4", "v", v, shape, check.computed(k))
    check.tensor("wkv4", "w", w, shape[1:])
    check.tensor("wkv4", "u", u, shape[1:])
    _check_state("wkv4", state, rows, [3, shape[1]])
    return torch.empty_like(k), torch.empty_like(state)


@operator(
    "wkv4(Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, Tensor? rows) -> (Tensor, Tensor)",
    _wkv4_outputs,
    cuda="wkv:wkv4",
)
def _run_wkv4(
    out: tuple[Tensor, Tensor], k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, rows: Tensor | None
) -> None:
    segments = _segments("wkv4", rows, k.shape[0])
    _wkv4(k, v, w, u, state, segments, *out, *k.shape, segments.shape[0], torch.get_num_threads())


def wkv4(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """WKV-4: y = (e^pp aa + e^(u+k) v) / (e^pp bb + e^(u+k)); then aa <- e^w aa + e^k v, bb likewise with 1.

    k, v: float32 [T, C]; w = -exp(time_decay) [C]; u = time_first [C]; state: float32 [3, C] or, with rows, [D, 3, C],
    its three parts aa, bb (both divided by e^pp) and pp, which starts at -1e30. Results as in `wkv7`, y [T, C].
    """
    return _run_wkv4(k, v, w, u, state, rows)
