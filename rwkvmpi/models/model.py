"""A model, or the part of one that a stage holds: from token ids through the layers to logits."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import linear

from rwkvmpi import ops
from rwkvmpi.errors import UserError
from rwkvmpi.models.checkpoint import check_finite, open_checkpoint
from rwkvmpi.models.state import LayerState, ModelState

if TYPE_CHECKING:
    from rwkvmpi.models.checkpoint import Checkpoint
    from rwkvmpi.models.layer_base import LayerBase
    from rwkvmpi.models.schema import ModelShape

CHUNK = 1024
# Matrix products of fewer rows may take another path through the library and give a row other bits.
FEWEST_ROWS = 256
HEAD_BLOCK = 4096  # ids of the vocabulary per product
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODULES = {"4": "rwkv4", "5.0": "rwkv5", "5.2": "rwkv5", "6": "rwkv6", "7": "rwkv7"}


class Stage:
    """Layers lo..hi-1 of a model, with the embedding if lo is 0 and the head if hi is the number of layers.

    Only the tensors of these layers are read; NaN or Inf among them is a UserError that names the tensor. The number
    of torch's threads and the rows given decide the bits of a result: 256 rows or more, a multiple of 32, for the
    promise that a row's bits depend on its document alone.

    layers: the stage's own layers, .layers[i].forward(x, v_first, state, rows); weight_bytes: held or memory-mapped;
    first, last: whether it embeds, whether it has the head; passes_v_first: whether v_first travels beside x.
    """

    def __init__(
        self, checkpoint: Checkpoint, lo: int, hi: int, dtype: torch.dtype | str = "float32", device: str = "cpu"
    ) -> None:
        if not 0 <= lo < hi <= checkpoint.shape.n_layer:
            raise ValueError(f"no stage of layers {lo}..{hi} exists in a model of {checkpoint.shape.n_layer} layers")
        if device != "cpu":
            raise UserError(f"device {device!r} cannot be used: this version computes on the CPU only (--device cpu)")
        self.shape: ModelShape = checkpoint.shape
        self.lo, self.hi = lo, hi
        self.first, self.last = lo == 0, hi == self.shape.n_layer
        self.passes_v_first = self.shape.version == "7"
        self.dtype = parse_dtype(dtype)
        self._time_states: list[torch.Tensor | None] = []
        self.layers: list[LayerBase] = []
        layer_class = import_module(f"rwkvmpi.models.{MODULES[self.shape.version]}").Layer
        with torch.inference_mode():
            for i in range(lo, hi):
                tensors = checkpoint.layer(i)
                check_finite(checkpoint, [f"blocks.{i}.{name}" for name in tensors])
                self.layers.append(layer_class(tensors, i, self.shape, self.dtype))
                stored = tensors.get("att.time_state")
                self._time_states.append(None if stored is None else stored.float())
            self.weight_bytes = sum(layer.weight_bytes for layer in self.layers)
            if self.first:
                self._load_embedding(checkpoint)
            if self.last:
                self._load_head(checkpoint)

    def _load_embedding(self, checkpoint: Checkpoint) -> None:
        check_finite(checkpoint, ["emb.weight"])
        # The table stays as the file has it: a chunk touches a thousand of its rows.
        self.embedding = checkpoint.tensor("emb.weight")
        self.ln0 = None if checkpoint.ln0_fused else _norm(checkpoint, "blocks.0.ln0")
        self.weight_bytes += self.embedding.numel() * self.embedding.element_size()

    def _load_head(self, checkpoint: Checkpoint) -> None:
        check_finite(checkpoint, ["head.weight"])
        self.head = checkpoint.tensor("head.weight").to(self.dtype).contiguous()
        self.ln_out = _norm(checkpoint, "ln_out")
        self.weight_bytes += self.head.numel() * self.head.element_size()

    @torch.inference_mode()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """First stage: tokens [G] (int32 or int64, each in 0..V-1) to the residual stream [G, C] float32."""
        x = self.embedding.index_select(0, tokens).float()
        return x if self.ln0 is None else ops.layer_norm(x, *self.ln0)

    def initial_state(self, i: int, segments: int) -> LayerState:
        """The state of `segments` documents before their first token in .layers[i] (i counts this stage's layers)."""
        return LayerState.initial(self.shape, segments, self._time_states[i])

    @torch.inference_mode()
    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """Last stage: the normalised output h [G, C] float32 of the residual stream x [G, C]."""
        return ops.layer_norm(x, *self.ln_out)

    @torch.inference_mode()
    def logprobs(self, h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Natural-log probabilities [G] float32 of targets [G] (int32 or int64; -1 gives 0), h [G, C] from `finish`."""
        return ops.head_logprobs(h.to(self.dtype), self.head, targets)

    @torch.inference_mode()
    def logits(self, h: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [G, V] float32, h [G, C] from `finish`; or those of its first rows in `out` [R, V], R <= G."""
        if out is None:
            out = torch.empty(h.shape[0], self.shape.vocab_size)
        h = h.to(self.dtype)
        for first in range(0, self.shape.vocab_size, HEAD_BLOCK):  # so that no second copy of them all exists
            block = self.head[first : first + HEAD_BLOCK]
            out[:, first : first + HEAD_BLOCK] = linear(h, block)[: out.shape[0]]
        return out

    @staticmethod
    def is_finite(*tensors: torch.Tensor) -> bool:
        """False if any of the float32 tensors (a state's wkv and shift, a hidden) holds NaN or Inf; one cheap pass."""
        return all(ops.all_finite(tensor) for tensor in tensors)


class Model:
    """A whole model in this process. `shape`: its ModelShape; `stage`: all its layers as one Stage."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | str = "float32", device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.shape: ModelShape = checkpoint.shape
        self.stage = Stage(checkpoint, 0, checkpoint.shape.n_layer, dtype, device)

    def state(self) -> ModelState:
        """The state before the first token."""
        return ModelState([self.stage.initial_state(i, 1) for i in range(self.shape.n_layer)])

    def forward(
        self, tokens: torch.Tensor | np.ndarray | Sequence[int], state: ModelState | None = None
    ) -> tuple[torch.Tensor, ModelState]:
        """Logits [T, V] float32 after each of the tokens [T], and the state after the last one.

        The tokens are what the model is fed: a document as jobs read it begins with token 0. Goes on from `state`
        (which is not changed) or from `state()`. Calls of 32 tokens and more run in chunks of 1,024 rows, the last one
        padded, and give the same bits as a job and as any other cut at multiples of 32; shorter ones run as they are.
        UserError for tokens that are not whole numbers in 0..V-1 in one dimension, or a state of another model.
        """
        ids = self._checked(tokens)
        if state is None:
            state = self.state()
        else:
            state.check(self.shape)
            state = state.clone()
        logits = torch.empty(len(ids), self.shape.vocab_size)
        for start in range(0, len(ids), CHUNK):
            part = slice(start, start + CHUNK)
            self._chunk(ids[part], padded_rows(len(ids[part]), len(ids)), state, logits[part])
        return logits, state

    @torch.inference_mode()
    def _chunk(self, ids: torch.Tensor, height: int, state: ModelState, logits: torch.Tensor) -> None:
        """Read `ids` as one chunk of `height` rows; fills logits [number of ids, V] and advances the state."""
        padded = torch.zeros(height, dtype=torch.int64)
        padded[: len(ids)] = ids
        rows = torch.tensor([[0, len(ids)]], dtype=torch.int32)
        x, v_first = self.stage.embed(padded), None
        for layer, own in zip(self.stage.layers, state.layers, strict=True):
            x, v_first = layer.forward(x, v_first, own, rows)
        self.stage.logits(self.stage.finish(x), logits)

    def _checked(self, tokens: torch.Tensor | np.ndarray | Sequence[int]) -> torch.Tensor:
        try:
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"tokens must be whole numbers in one dimension: {error}") from None
        if ids.numel() == 0 and ids.ndim == 1:
            return ids.to(torch.int64)
        if ids.ndim != 1 or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise UserError(f"tokens must be whole numbers in one dimension, not {ids.dtype} {list(ids.shape)}")
        ids = ids.to(torch.int64)
        wrong = (ids < 0) | (ids >= self.shape.vocab_size)
        if wrong.any():
            place = int(wrong.nonzero()[0])
            raise UserError(
                f"token {int(ids[place])} at position {place} is not in the vocabulary of {self.checkpoint.path}, "
                f"0..{self.shape.vocab_size - 1}"
            )
        return ids


def _norm(checkpoint: Checkpoint, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a normalisation, float32; UserError unless they are finite."""
    names = (f"{name}.weight", f"{name}.bias")
    check_finite(checkpoint, names)
    weight, bias = (checkpoint.tensor(part).float().contiguous() for part in names)
    return weight, bias


def padded_rows(count: int, call: int) -> int:
    """Rows to compute for the `count` tokens of one chunk in a call of `call` tokens (see `Model.forward`)."""
    return count if call < 32 else max(FEWEST_ROWS, -(-count // 32) * 32)


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The torch dtype of the weights for "float32" or "bfloat16" (or the dtype itself); UserError for any other."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise UserError(f"weights cannot be used as {dtype}: on a CPU choose --dtype float32 or bfloat16")
    return found


def load_model(path: str | Path, device: str = "cpu", dtype: torch.dtype | str = "float32") -> Model:
    """Open a model file (.pth, .safetensors, an index, a folder, or "bundled") and load all of it.

    UserError when the file is not a sound RWKV-4, 5, 6 or 7 model, or the device or dtype cannot be used.
    """
    return Model(open_checkpoint(path), dtype, device)
