"""RWKV models: checkpoint files to weights, and one file per version for what its layers compute.

Importing this package costs nothing; its modules load torch when they are imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["LayerState", "Model", "ModelState", "Stage", "load_model", "open_checkpoint"]

if TYPE_CHECKING:
    from rwkvmpi.models.checkpoint import open_checkpoint
    from rwkvmpi.models.model import Model, Stage, load_model
    from rwkvmpi.models.state import LayerState, ModelState

_HOME = {
    "LayerState": "state",
    "Model": "model",
    "ModelState": "state",
    "Stage": "model",
    "load_model": "model",
    "open_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import the module that holds `name` when it is first asked for."""
    if name in _HOME:
        return getattr(import_module(f"rwkvmpi.models.{_HOME[name]}"), name)
    raise AttributeError(f"module 'rwkvmpi.models' has no attribute {name!r}")
