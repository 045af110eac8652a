"""A model, or the part of one that a stage holds: from token ids through the layers to logits."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rwkvmpi import ops
from rwkvmpi.errors import UserError
from rwkvmpi.models.checkpoint import check_finite, open_checkpoint
from rwkvmpi.models.device import Device, open_device
from rwkvmpi.models.layer_base import Resources
from rwkvmpi.models.state import LayerState, ModelState
from rwkvmpi.ops import library

if TYPE_CHECKING:
    from rwkvmpi.models.checkpoint import Checkpoint
    from rwkvmpi.models.layer_base import LayerBase
    from rwkvmpi.models.schema import ModelShape
    from rwkvmpi.models.weight_store import WeightStore

CHUNK = 1024
STEP_PROGRAMS = 4  # numbers of states for which a step stays recorded
MODULES = {"4": "rwkv4", "5.0": "rwkv5", "5.2": "rwkv5", "6": "rwkv6", "7": "rwkv7"}


class Stage:
    """Layers lo..hi-1 of a model, with the embedding if lo is 0 and the head if hi is the number of layers.

    Only the tensors of these layers are read; NaN or Inf among them is a UserError that names the tensor. A row's bits
    depend on its document alone: not on the rows beside it, their number, the cut into chunks or the threads.

    dtype: how the large matrices are held, "float32", "bfloat16" or "int8"; store: where they lie (default: memory of
    this process). layers: the stage's own layers, .layers[i].forward(x, v_first, state, rows); weight_bytes: held or
    memory-mapped; first, last: whether it embeds, whether it has the head; passes_v_first: whether v_first travels
    beside x.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        lo: int,
        hi: int,
        dtype: str = "float32",
        device: str | Device = "cpu",
        store: WeightStore | None = None,
    ) -> None:
        if not 0 <= lo < hi <= checkpoint.shape.n_layer:
            raise ValueError(f"no stage of layers {lo}..{hi} exists in a model of {checkpoint.shape.n_layer} layers")
        self.device = open_device(device) if isinstance(device, str) else device
        self.shape: ModelShape = checkpoint.shape
        self.lo, self.hi = lo, hi
        self.first, self.last = lo == 0, hi == self.shape.n_layer
        self.passes_v_first = self.shape.version == "7"
        kind = self.device.check_kind(dtype)
        self.resources = Resources(kind, self.device, store or self.device.memory(), self.device.workspace())
        self.dtype = self.resources.dtype
        layer_class = import_module(f"rwkvmpi.models.{MODULES[self.shape.version]}").Layer
        with torch.inference_mode():
            self.layers: list[LayerBase] = [layer_class(checkpoint, i, self.resources) for i in range(lo, hi)]
            self.weight_bytes = sum(layer.weight_bytes for layer in self.layers)
            if self.first:
                self._load_embedding(checkpoint)
            if self.last:
                self._load_head(checkpoint)

    def _load_embedding(self, checkpoint: Checkpoint) -> None:
        if self.resources.store.fills:
            check_finite(checkpoint, ["emb.weight"])
            checkpoint.let_go(["emb.weight"])
        # The table stays as the file has it: a chunk touches a thousand of its rows.
        self.embedding = self.device.upload(checkpoint.tensor("emb.weight"))
        self.ln0 = (None, None) if checkpoint.ln0_fused else self._norm(checkpoint, "blocks.0.ln0")
        self.weight_bytes += self.embedding.numel() * self.embedding.element_size()

    def _load_head(self, checkpoint: Checkpoint) -> None:
        def read() -> torch.Tensor:
            check_finite(checkpoint, ["head.weight"])
            return checkpoint.tensor("head.weight")

        self.head = self.resources.pack(read, checkpoint.tensor_shape("head.weight"), self.resources.kind)
        checkpoint.let_go(["head.weight"])
        self.ln_out = self._norm(checkpoint, "ln_out")
        self.weight_bytes += self.head.data.numel()

    def _norm(self, checkpoint: Checkpoint, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a normalisation, float32; UserError unless they are finite."""
        names = (f"{name}.weight", f"{name}.bias")
        check_finite(checkpoint, names)
        weight, bias = (self.device.upload(checkpoint.tensor(part).float().contiguous()) for part in names)
        return weight, bias

    @torch.inference_mode()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """First stage: tokens [G] (int32 or int64, each in 0..V-1) to the residual stream [G, C] float32."""
        x = self.empty(tokens.shape[0], self.shape.n_embd)
        self.embed_into(x, self.device.upload(tokens))
        return x

    @torch.inference_mode()
    def embed_into(self, x: torch.Tensor, tokens: torch.Tensor) -> None:
        """`embed` into x [G, C], both on the stage's device."""
        ops.embed_into(x, tokens, self.embedding, *self.ln0)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """New memory on the stage's device."""
        return torch.empty(shape, dtype=dtype, device=self.device.target)

    def initial_state(self, i: int, segments: int) -> LayerState:
        """The state of `segments` documents before their first token in .layers[i] (i counts this stage's layers)."""
        return LayerState.initial(self.shape, segments, self.layers[i].time_state, self.device.target)

    @torch.inference_mode()
    def finish(self, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Last stage: the normalised output h [G, C], in `dtype`, of the residual stream x [G, C]."""
        h = self.empty(*x.shape, dtype=dtype)
        ops.layer_norm_into(h, x, *self.ln_out)
        return h

    @torch.inference_mode()
    def logprobs(self, h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Natural-log probabilities [G] float32 of targets [G] (int32 or int64; -1 gives 0), h [G, C] from `finish`.

        They are on the stage's device; targets are on the host."""
        return ops.head_logprobs(h.to(self.dtype), self.head, self.device.upload(targets))

    @torch.inference_mode()
    def logits(self, h: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [G, V] float32, h [G, C] from `finish`; written to `out` [G, V] where it is given."""
        if out is None:
            out = self.empty(h.shape[0], self.shape.vocab_size)
        ops.product_into(out, h.to(self.dtype), self.head)
        return out

    @staticmethod
    def is_finite(*tensors: torch.Tensor) -> bool:
        """False if any of the float32 tensors (a state's wkv and shift, a hidden) holds NaN or Inf; one cheap pass."""
        return all(ops.all_finite(tensor) for tensor in tensors)


class Model:
    """A whole model in this process. `shape`: its ModelShape; `stage`: all its layers as one Stage."""

    def __init__(self, checkpoint: Checkpoint, dtype: str = "float32", device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.shape: ModelShape = checkpoint.shape
        self.stage = Stage(checkpoint, 0, checkpoint.shape.n_layer, dtype, device)
        self._steps: dict[tuple[object, ...], _Step] = {}
        self._graphs: dict[tuple[object, ...], _GraphStep] = {}

    def state(self) -> ModelState:
        """The state before the first token."""
        return self.states(1)

    def states(self, count: int, dtype: torch.dtype = torch.float32) -> ModelState:
        """`count` independent states before their first token, for `step`.

        dtype: how `step` shall keep the WKV part between tokens. float16 is lossy, for RWKV-5 to 7 on a GPU, and half
        the memory and traffic of a large batch; every other use of a state needs float32.
        """
        states = ModelState([self.stage.initial_state(i, count) for i in range(self.shape.n_layer)])
        if dtype != torch.float32:
            if dtype != torch.float16 or self.stage.device.kind == "cpu" or self.shape.version == "4":
                raise UserError("states are float32, or for RWKV-5 to 7 on a GPU float16")
            for layer in states.layers:
                layer.wkv = layer.wkv.to(dtype)
        return states

    def forward(
        self, tokens: torch.Tensor | np.ndarray | Sequence[int], state: ModelState | None = None
    ) -> tuple[torch.Tensor, ModelState]:
        """Logits [T, V] float32 after each of the tokens [T], and the state after the last one.

        The tokens are what the model is fed: a document as jobs read it begins with token 0. Goes on from `state`
        (which is not changed) or from `state()`. However the tokens are cut into calls, the bits are the same, and
        they are those of a job and of `step`.
        UserError for tokens that are not whole numbers in 0..V-1 in one dimension, or a state of another model.
        """
        ids = self._checked(tokens)
        state = self._checked_copy(state)
        if len(ids) == 1:
            return self._step(ids, state), state
        logits = self.stage.empty(len(ids), self.shape.vocab_size)
        for start in range(0, len(ids), CHUNK):
            part = slice(start, start + CHUNK)
            self.stage.logits(self.stage.finish(self._read(ids[part], state)), logits[part])
        return logits, state

    def prefill(
        self, tokens: torch.Tensor | np.ndarray | Sequence[int], state: ModelState | None = None
    ) -> tuple[torch.Tensor, ModelState]:
        """As `forward`, but only the logits [V] after the last of the tokens [T], T >= 1."""
        ids = self._checked(tokens)
        if not len(ids):
            raise UserError("prefill needs at least one token")
        state = self._checked_copy(state)
        for start in range(0, len(ids), CHUNK):
            x = self._read(ids[start : start + CHUNK], state)
        logits = self.stage.empty(1, self.shape.vocab_size)
        self.stage.logits(self.stage.finish(x[-1:]), logits)
        return logits[0], state

    def step(
        self, tokens: torch.Tensor | np.ndarray | Sequence[int], states: ModelState
    ) -> tuple[torch.Tensor, ModelState]:
        """Advance B independent states by one token each: logits [B, V] float32, and the states.

        tokens [B]: one for each of `states` (from `states(B)`, or several joined by `ModelState.join`), which are
        changed in place and given back. UserError as in `forward`.
        """
        ids = self._checked(tokens)
        states.check(self.shape, lossy=self.stage.device.kind != "cpu")
        if len(ids) != states.segments:
            raise UserError(f"{len(ids)} tokens for {states.segments} states; a step takes one token for each state")
        return self._step(ids, states), states

    def _step(self, ids: torch.Tensor, states: ModelState) -> torch.Tensor:
        if self.stage.device.kind == "cpu":
            return self._recorded_step(ids, states)
        tensors = states.tensors()
        key = (len(ids), tensors[0].dtype, *(tensor.data_ptr() for tensor in tensors))
        step = self._graphs.pop(key, None)
        if step is None:
            step = _GraphStep(self.stage, ids, states)
        else:
            step.run(ids)
        self._graphs[key] = step  # the latest last
        if len(self._graphs) > STEP_PROGRAMS:
            del self._graphs[next(iter(self._graphs))]
        return step.logits.clone()

    def _recorded_step(self, ids: torch.Tensor, states: ModelState) -> torch.Tensor:
        key = (len(ids), library.current(), torch.get_num_threads())
        step = self._steps.pop(key, None)
        logits = torch.empty(len(ids), self.shape.vocab_size)
        if step is None:
            step = _Step(self, ids, states.clone(), logits)
        self._steps[key] = step  # the latest last
        if len(self._steps) > STEP_PROGRAMS:
            del self._steps[next(iter(self._steps))]
        step.run(ids, states, logits)
        return logits

    @torch.inference_mode()
    def _read(self, ids: torch.Tensor, state: ModelState) -> torch.Tensor:
        """The residual stream [T, C] of the tokens `ids` [T]; advances `state`, of one segment."""
        rows = self.stage.device.upload(torch.tensor([[0, len(ids)]], dtype=torch.int32))
        x, v_first = self.stage.embed(ids), None
        for layer, own in zip(self.stage.layers, state.layers, strict=True):
            x, v_first = layer.forward(x, v_first, own, rows)
        return x

    def _checked_copy(self, state: ModelState | None) -> ModelState:
        if state is None:
            return self.state()
        state.check(self.shape, segments=1)
        return state.clone()

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


class _Step:
    """One single-token step of a given number of states, recorded for replay."""

    @torch.inference_mode()
    def __init__(self, model: Model, ids: torch.Tensor, states: ModelState, logits: torch.Tensor) -> None:
        """Records by taking one step, which advances `states`: give a copy."""
        self._tokens = ids.clone()  # what the recorded calls read
        stage, count = model.stage, len(ids)
        self._workspace = ops.Workspace()  # of its own: the recorded calls keep its addresses
        rows = torch.tensor([[i, 1] for i in range(count)], dtype=torch.int32)
        shared = stage.resources.exchange_workspace(self._workspace)

        def body() -> None:
            x, v_first = stage.embed(self._tokens), None
            for layer, own in zip(stage.layers, states.layers, strict=True):
                x, v_first = layer.forward(x, v_first, own, rows)
            stage.logits(stage.finish(x, stage.dtype), logits)

        try:
            self._program = ops.Program(body, [*states.tensors(), logits])
        finally:
            stage.resources.exchange_workspace(shared)

    @torch.inference_mode()
    def run(self, ids: torch.Tensor, states: ModelState, logits: torch.Tensor) -> None:
        """Advance `states` by `ids`; fills `logits`."""
        self._tokens.copy_(ids)
        self._program.rebind([*states.tensors(), logits])
        self._program.run()


class _GraphStep:
    """One single-token step of given states on a GPU: `logits` [B, V] float32, overwritten by the next `run`."""

    @torch.inference_mode()
    def __init__(self, stage: Stage, ids: torch.Tensor, states: ModelState) -> None:
        """Takes the first step."""
        self.logits = stage.empty(len(ids), stage.shape.vocab_size)
        self._tokens = stage.device.upload(ids)
        self._states = states  # whose memory the graph knows
        self._workspace = stage.device.workspace()
        self._workspace.hold()
        rows = stage.device.upload(torch.tensor([[i, 1] for i in range(len(ids))], dtype=torch.int32))
        shared = stage.resources.exchange_workspace(self._workspace)

        def body() -> None:
            x, v_first = stage.embed(self._tokens), None
            for layer, own in zip(stage.layers, states.layers, strict=True):
                x, v_first = layer.forward(x, v_first, own, rows)
            stage.logits(stage.finish(x, stage.dtype), self.logits)

        try:
            self._replay = stage.device.graph(body)
        finally:
            stage.resources.exchange_workspace(shared)

    @torch.inference_mode()
    def run(self, ids: torch.Tensor) -> None:
        """Advance the states by `ids`."""
        self._tokens.copy_(ids)
        self._replay()


def load_model(path: str | Path, device: str = "cpu", dtype: str = "float32") -> Model:
    """Open a model file (.pth, .safetensors, an index, a folder, or "bundled") and load all of it.

    UserError when the file is not a sound RWKV-4, 5, 6 or 7 model, or the device or dtype cannot be used.
    """
    return Model(open_checkpoint(path), dtype, device)
