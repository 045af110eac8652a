"""Registers operators with torch.library under `torch.ops.rwkvmpi`, so that tracing, export and profilers know them.

An operator is two functions: `outputs` checks the arguments and allocates (also the fake kernel), `fill` computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("rwkvmpi", "FRAGMENT")

Outputs = torch.Tensor | tuple[torch.Tensor | None, ...]


class Operator:
    """A registered operator: call it for new outputs, or fill given ones with `into`.

    `into(outputs, *arguments)` is the computation alone, for the layers: no dispatcher, no allocation, no checks.
    """

    def __init__(self, registered: Callable[..., Any], into: Callable[..., None]) -> None:
        self._registered = registered
        self.into = into

    def __call__(self, *arguments: Any) -> Any:
        return self._registered(*arguments)


def operator(schema: str, outputs: Callable[..., Outputs | None]) -> Callable[[Callable[..., None]], Operator]:
    """Decorates `fill(outputs, *arguments)`; returns the operator `torch.ops.rwkvmpi.<name>` as an `Operator`."""

    def register(fill: Callable[..., None]) -> Operator:
        name = schema[: schema.index("(")]

        def on_cpu(*arguments: Any) -> Outputs | None:
            out = outputs(*arguments)
            fill(out, *arguments)
            return out

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, on_cpu, "CPU")
        _LIBRARY.impl(name, outputs, "Meta")
        return Operator(getattr(torch.ops.rwkvmpi, name).default, fill)

    return register
