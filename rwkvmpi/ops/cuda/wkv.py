"""The plain recurrences on a GPU: arguments as in `rwkvmpi.ops.wkv`, the [T, ...] tensors all of one dtype."""

from __future__ import annotations

from torch import Tensor

from rwkvmpi.ops.cuda.library import DTYPES, bind
from rwkvmpi.ops.cuda.time_mix import SEQUENTIAL

_wkv7 = bind("wkv7", "p" * 10 + "llll" + "ii")
_wkv6 = bind("wkv6", "p" * 9 + "llll" + "ii")
_wkv4 = bind("wkv4", "p" * 8 + "llli")


def wkv7(
    out: tuple[Tensor, Tensor],
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    rows: Tensor | None,
    body: int = SEQUENTIAL,
) -> None:
    """See `rwkvmpi.ops.wkv7`; `body` as in `rwkvmpi.ops.cuda.time_mix`. TILES are for the decays of RWKV-7, which are
    above 0.54: they divide by products of 16 of them."""
    y, after = out
    segments = 1 if rows is None else rows.shape[0]
    y.zero_()  # rows outside every segment
    _wkv7(r, w, k, v, a, b, state, after, rows, y, *r.shape, segments, body, DTYPES[r.dtype])


def wkv6(
    out: tuple[Tensor, Tensor],
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    rows: Tensor | None,
    decay_per_head: bool = False,
) -> None:
    """See `rwkvmpi.ops.wkv6`."""
    y, after = out
    segments = 1 if rows is None else rows.shape[0]
    y.zero_()
    _wkv6(r, w, k, v, u, state, after, rows, y, *r.shape, segments, decay_per_head, DTYPES[r.dtype])


def wkv5(
    out: tuple[Tensor, Tensor],
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    rows: Tensor | None,
) -> None:
    """See `rwkvmpi.ops.wkv5`."""
    wkv6(out, r, w, k, v, u, state, rows, decay_per_head=True)


def wkv4(
    out: tuple[Tensor, Tensor], k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, rows: Tensor | None
) -> None:
    """See `rwkvmpi.ops.wkv4`."""
    y, after = out
    segments = 1 if rows is None else rows.shape[0]
    y.zero_()
    _wkv4(k, v, w, u, state, after, rows, y, *k.shape, segments, DTYPES[k.dtype])
