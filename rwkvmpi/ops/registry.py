"""Registers operators with torch.library under `torch.ops.rwkvmpi`, so that tracing, export and profilers know them.

An operator is two functions: `outputs` checks the arguments and allocates (also the fake kernel), `fill` computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("rwkvmpi", "FRAGMENT")

Outputs = torch.Tensor | tuple[torch.Tensor, ...]


def operator(
    schema: str, outputs: Callable[..., Outputs | None]
) -> Callable[[Callable[..., None]], Callable[..., Any]]:
    """Decorates `fill(outputs, *arguments)`; returns the registered operator `torch.ops.rwkvmpi.<name>`."""

    def register(fill: Callable[..., None]) -> Callable[..., Any]:
        name = schema[: schema.index("(")]

        def on_cpu(*arguments: Any) -> Outputs | None:
            out = outputs(*arguments)
            fill(out, *arguments)
            return out

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, on_cpu, "CPU")
        _LIBRARY.impl(name, outputs, "Meta")
        return getattr(torch.ops.rwkvmpi, name).default

    return register
