"""Reads long documents with RWKV language models on a cluster, one pipeline stage or ring slot per MPI rank.

model = rwkvmpi.load_model("model.pth", device="cpu", dtype="float32")
logits, state = model.forward(tokens)          # tokens [T] int64 -> logits [T, V] float32
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "open_results", "ops"]

if TYPE_CHECKING:
    from rwkvmpi import ops
    from rwkvmpi.models.model import load_model
    from rwkvmpi.store.results import open_results

_LAZY = {
    "load_model": ("rwkvmpi.models.model", "load_model"),
    "open_results": ("rwkvmpi.store.results", "open_results"),
}


def __getattr__(name: str) -> Any:
    """Load torch and friends only when they are used: `rwkvmpi --help` must not wait for them."""
    if name == "ops":
        return import_module("rwkvmpi.ops")
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'rwkvmpi' has no attribute {name!r}")
