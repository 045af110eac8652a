"""Registers operators with torch.library under `torch.ops.rwkvmpi`, so that tracing, export and profilers know them.

An operator is two functions: `outputs` checks the arguments and allocates (also the fake kernel), `fill` computes.
An operator that also runs on GPUs has a second `fill` below rwkvmpi.ops.cuda, imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from rwkvmpi.ops.cuda.library import takes

_LIBRARY = torch.library.Library("rwkvmpi", "FRAGMENT")

SAME = "."
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


def operator(
    schema: str, outputs: Callable[..., Outputs | None], cuda: str | None = None
) -> Callable[[Callable[..., None]], Operator]:
    """Decorates `fill(outputs, *arguments)`; returns the operator `torch.ops.rwkvmpi.<name>` as an `Operator`.

    cuda: 'module:function' below rwkvmpi.ops.cuda, the `fill` for tensors on a GPU; the operator's first argument, a
    tensor, decides. SAME: the decorated one knows both.
    """

    def register(fill: Callable[..., None]) -> Operator:
        name = schema[: schema.index("(")]
        into = fill if cuda in (None, SAME) else _by_device(fill, str(cuda))

        def call(*arguments: Any) -> Outputs | None:
            out = outputs(*arguments)
            into(out, *arguments)
            return out

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, call, "CPU")
        if cuda is not None:
            _LIBRARY.impl(name, call, "CUDA")
        _LIBRARY.impl(name, outputs, "Meta")
        return Operator(getattr(torch.ops.rwkvmpi, name).default, into)

    return register


def _by_device(on_cpu: Callable[..., None], cuda: str) -> Callable[..., None]:
    on_gpu: Callable[..., None] | None = None

    def into(outputs: Any, *arguments: Any) -> None:
        nonlocal on_gpu
        if not takes(arguments[0]):
            on_cpu(outputs, *arguments)
            return
        if on_gpu is None:
            module, _, function = cuda.partition(":")
            on_gpu = getattr(import_module(f"rwkvmpi.ops.cuda.{module}"), function)
        on_gpu(outputs, *arguments)

    return into
