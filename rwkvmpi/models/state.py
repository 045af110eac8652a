"""The recurrent state of a model: what a document's tokens so far leave behind for the next one.

One layout for every version, in memory, in messages and in files: value index first, key index last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from rwkvmpi.errors import UserError

if TYPE_CHECKING:
    from rwkvmpi.models.schema import ModelShape

# RWKV-4's running maximum before the first token: so low that exp(pp - q) is 0 for any key.
RWKV4_START = -1e30


def wkv_shape(shape: ModelShape) -> tuple[int, ...]:
    """Shape of one segment's WKV state in one layer: (3, C) for RWKV-4 (aa, bb, pp), else (H, N value, N key)."""
    if shape.version == "4":
        return (3, shape.n_embd)
    return (shape.n_head, shape.head_size, shape.head_size)


@dataclass(slots=True)
class LayerState:
    """The state of D segments in one layer, all float32.

    wkv: [D, H, N, N] (value, key), RWKV-4 [D, 3, C]; shift: [D, 2, C], row 0 the last normalised row of the time mix,
    row 1 that of the channel mix. Layers change both tensors in place.
    """

    wkv: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def zeros(cls, shape: ModelShape, segments: int, device: torch.device | str = "cpu") -> Self:
        """The state of `segments` documents before their first token, for a model without a stored start state."""
        return cls.initial(shape, segments, None, device)

    @classmethod
    def initial(
        cls,
        shape: ModelShape,
        segments: int,
        time_state: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Like `zeros`, but the WKV state starts at `time_state` [H, N value, N key] where the model file has one."""
        wkv = torch.empty(segments, *wkv_shape(shape), device=device)
        state = cls(wkv, torch.empty(segments, 2, shape.n_embd, device=device))
        state.begin(time_state)
        return state

    def begin(self, time_state: torch.Tensor | None = None) -> None:
        """Set every segment to a document before its first token."""
        self.shift.zero_()
        if time_state is not None:
            self.wkv.copy_(time_state)
            return
        self.wkv.zero_()
        if self.wkv.dim() == 3:  # RWKV-4
            self.wkv[:, 2] = RWKV4_START

    def arrays(self, segment: int) -> tuple[np.ndarray, np.ndarray]:
        """One segment's wkv and shift in the host's memory (on a CPU: the same memory)."""
        return self.wkv[segment].cpu().numpy(), self.shift[segment].cpu().numpy()

    @property
    def segments(self) -> int:
        """D, the number of segments."""
        return self.wkv.shape[0]

    @property
    def nbytes_per_segment(self) -> int:
        """Bytes that `pack_into` writes for one segment."""
        return self._wkv_bytes + 4 * prod(self.shift.shape[1:])

    @property
    def _wkv_bytes(self) -> int:
        return 4 * prod(self.wkv.shape[1:])

    def clone(self) -> Self:
        """A copy that shares no memory with this one."""
        return type(self)(self.wkv.clone(), self.shift.clone())

    @torch.inference_mode()
    def pack_into(self, buffer: torch.Tensor | np.ndarray, segment: int = 0) -> None:
        """Write one segment's raw bytes, wkv then shift, into `buffer` (uint8, 1-D, nbytes_per_segment long).

        `segment` counts from the end when negative. ValueError when the buffer does not fit.
        """
        for target, source in self.parts(buffer, segment):
            target.copy_(source)

    @torch.inference_mode()
    def unpack_from(self, buffer: torch.Tensor | np.ndarray, segment: int = 0) -> None:
        """Set one segment from the bytes that `pack_into` wrote; bit for bit. ValueError when they do not fit."""
        for source, target in self.parts(buffer, segment):
            target.copy_(source, non_blocking=True)

    def parts(
        self, buffer: torch.Tensor | np.ndarray, segment: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """The bytes of wkv and of shift: (where they are in `buffer`, where they are in this state), uint8 each."""
        data, cut = self._as_bytes(buffer)
        wkv, shift = (tensor[segment].view(-1).view(torch.uint8) for tensor in (self.wkv, self.shift))
        return (data[:cut], wkv), (data[cut:], shift)

    def _as_bytes(self, buffer: torch.Tensor | np.ndarray) -> tuple[torch.Tensor, int]:
        data = torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer
        if data.dtype != torch.uint8 or data.ndim != 1 or data.numel() != self.nbytes_per_segment:
            raise ValueError(
                f"a state of one segment needs a uint8 buffer of {self.nbytes_per_segment} bytes, "
                f"not {data.dtype} of shape {tuple(data.shape)}"
            )
        return data, self._wkv_bytes


@dataclass(slots=True)
class ModelState:
    """The state of a whole model for one document or several: a `LayerState` of as many segments per layer."""

    layers: list[LayerState]

    @classmethod
    def join(cls, states: Sequence[ModelState]) -> Self:
        """The segments of several states, one after the other, copied."""
        parts = zip(*(state.layers for state in states), strict=True)
        return cls([LayerState(torch.cat([a.wkv for a in part]), torch.cat([a.shift for a in part])) for part in parts])

    @property
    def segments(self) -> int:
        """The number of documents."""
        return self.layers[0].segments

    def segment(self, index: int) -> ModelState:
        """A copy of one document's state."""
        part = slice(index, index + 1) if index != -1 else slice(-1, None)
        return ModelState([LayerState(layer.wkv[part].clone(), layer.shift[part].clone()) for layer in self.layers])

    def clone(self) -> ModelState:
        """A copy that shares no memory with this one."""
        return ModelState([layer.clone() for layer in self.layers])

    def tensors(self) -> list[torch.Tensor]:
        """Every layer's wkv and shift."""
        return [tensor for layer in self.layers for tensor in (layer.wkv, layer.shift)]

    def check(self, shape: ModelShape, segments: int | None = None, lossy: bool = False) -> None:
        """UserError unless this state has the shapes that a model of `shape` needs, contiguous float32, for `segments`
        documents (None: any number of them). lossy: float16 will do for the WKV part."""
        count = self.segments if segments is None and self.layers else segments or 1
        expected = (shape.n_layer, (count, *wkv_shape(shape)), (count, 2, shape.n_embd))
        shapes = {(tuple(layer.wkv.shape), tuple(layer.shift.shape)) for layer in self.layers}
        if (len(self.layers), {expected[1:]}) != (expected[0], shapes):
            raise UserError(
                f"the state given has {len(self.layers)} layers of {_words(sorted(shapes))}, but this model needs "
                f"{shape.n_layer} layers of {_words([expected[1:]])}"
            )
        if not all(tensor.is_contiguous() for tensor in self.tensors()):
            raise UserError("the state given is not contiguous throughout")
        allowed = {torch.float32, torch.float16} if lossy else {torch.float32}
        kinds = {layer.wkv.dtype for layer in self.layers}
        if len(kinds) > 1 or not kinds <= allowed or {layer.shift.dtype for layer in self.layers} != {torch.float32}:
            raise UserError("the state given is not float32 throughout")


def _words(shapes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    return ", ".join(f"wkv {list(wkv)} and shift {list(shift)}" for wkv, shift in shapes)
