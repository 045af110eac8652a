"""Whether the build for AMX computes what another build does, on the processor at hand.

Asked once, before that build is used: its products have an arithmetic of their own, and few machines to test it on.
"""

from __future__ import annotations

import torch

from rwkvmpi.ops import library
from rwkvmpi.ops.product import Packed, pack, product

ROWS, INPUTS, OUTPUTS = (1, 5, 16, 33), (64, 70), (32, 40)
_TOLERANCE = 1e-5  # of the sum of magnitudes: 70 terms, each rounded to 24 bits


def disagreement(variant: str, reference: str) -> str | None:
    """What is wrong with small random products of the build `variant`, measured against those of `reference`.

    None if nothing is: bfloat16 within the rounding of float32 sums, int8 in every bit, and the bits of a row the same
    among 1, 5, 16 and 33 rows.
    """
    generator = torch.Generator().manual_seed(0)
    for inputs in INPUTS:
        for outputs in OUTPUTS:
            x = torch.randn(max(ROWS), inputs, generator=generator).bfloat16()
            weight = torch.randn(outputs, inputs, generator=generator)
            bound = _TOLERANCE * (x.float().abs() @ weight.bfloat16().float().abs().T)
            for kind in ("bfloat16", "int8"):
                with library.switched(reference):
                    packed = pack(weight, kind)
                wrong = _wrong(x, packed, bound, variant, reference)
                if wrong is not None:
                    return f"with {outputs} x {inputs} weights of {kind}, {wrong}"
    return None


def _wrong(x: torch.Tensor, w: Packed, bound: torch.Tensor, variant: str, reference: str) -> str | None:
    with library.switched(reference):
        expected = product(x, w)
    with library.switched(variant):
        found = {rows: product(x[-rows:], w) for rows in ROWS}
    every = found[max(ROWS)]
    off = (every - expected).abs()
    if not bool((off <= (bound if w.kind == "bfloat16" else 0.0)).all()):
        return f"its products are off by up to {float(off.max()):.1e}"
    for rows, some in found.items():
        if not torch.equal(some, every[-rows:]):
            return f"the bits of a row depend on whether there are {rows} or {max(ROWS)}"
    return None
