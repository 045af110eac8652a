"""Where a layer's time goes: its operators one by one as it calls them, the layer as a whole, and the head."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rwkvmpi import ops
from rwkvmpi.bench.timing import Effort, medians
from rwkvmpi.models.layer_base import LayerBase
from rwkvmpi.models.model import Stage
from rwkvmpi.ops import library

MOST_LAYERS = 4  # enough for each to find its weights where it would in a model: not in the nearest cache


@dataclass(frozen=True)
class _Recorded:
    """A call of one layer and what it is called in the table; operations: of a product, with weights of `kind`."""

    call: library.Call
    label: str
    operations: int = 0
    kind: str = ""

    def run(self) -> float:
        """Seconds of carrying it out again."""
        function = library.bind(self.call.name, self.call.signature)
        start = time.perf_counter()
        function(*self.call.arguments)
        return time.perf_counter() - start


@torch.inference_mode()
def layer_profile(stage: Stage, chunk: int, peaks: Mapping[str, float], effort: Effort) -> dict[str, Any]:
    """Seconds of each operator of a layer (not the first) for one chunk, and of the whole layer.

    The layers' calls are recorded, then carried out one by one in their order, layer after layer, so that each finds
    in the caches what it finds in a run. Python's part is what the whole layer takes beyond the operators.
    peaks: operations per second by kind of weights.
    """
    chosen = stage.layers[1 : 1 + MOST_LAYERS] or stage.layers
    bodies = [_layer_body(stage, layer, chunk) for layer in chosen]
    recorded = [_record(layer, body) for layer, body in zip(chosen, bodies, strict=True)]
    passes: list[dict[str, float]] = []

    def one_pass() -> None:
        seconds: dict[str, float] = {}
        for calls in recorded:
            for call in calls:
                seconds[call.label] = seconds.get(call.label, 0.0) + call.run()
        passes.append(seconds)

    def whole() -> None:
        for body in bodies:
            body()

    layer_s = medians({"operators": one_pass, "layer": whole}, effort)["layer"] / len(chosen)
    operators: list[dict[str, Any]] = []
    for label in passes[0]:
        same = [call for call in recorded[-1] if call.label == label]
        seconds = statistics.median(taken[label] for taken in passes[1:]) / len(chosen)
        rate = sum(call.operations for call in same) / seconds
        operators.append(
            {
                **{"operator": label, "calls": len(same), "seconds": seconds, "share": seconds / layer_s},
                "flops_per_second": rate or None,
                "share_of_peak": rate / peaks[same[0].kind] if rate else None,
            }
        )
    operators.sort(key=lambda entry: -entry["seconds"])
    return {"chunk": chunk, "seconds": layer_s, "operators": operators}


@torch.inference_mode()
def head_seconds(stage: Stage, chunks: Iterable[int], effort: Effort) -> dict[int, float]:
    """Seconds of the log-probabilities of a chunk's tokens, from the last layer's output on, by tokens per chunk."""

    def body_of(chunk: int) -> Callable[[], object]:
        x = torch.randn(chunk, stage.shape.n_embd)
        targets = torch.arange(chunk, dtype=torch.int64) % stage.shape.vocab_size
        return lambda: stage.logprobs(stage.finish(x), targets)

    return medians({chunk: body_of(chunk) for chunk in chunks}, effort)


def _layer_body(stage: Stage, layer: LayerBase, chunk: int) -> Any:
    shape = stage.shape
    x = torch.randn(chunk, shape.n_embd)
    needs_first = stage.passes_v_first and layer.index > 0
    v_first = torch.randn(chunk, shape.n_embd) if needs_first else None
    state = stage.initial_state(layer.index - stage.lo, 1)
    rows = torch.tensor([[0, chunk]], dtype=torch.int32)
    return lambda: layer.forward(x, v_first, state, rows)


def _record(layer: LayerBase, body: Any) -> list[_Recorded]:
    with library.recording() as calls:
        body()
    weights = {packed.data.data_ptr(): packed for packed in _packed(vars(layer))}
    return [_name(call, weights, layer.resources.kind) for call in calls]


def _name(call: library.Call, weights: dict[int, ops.Packed], kind: str) -> _Recorded:
    tensors = [argument for argument in call.arguments if isinstance(argument, torch.Tensor)]
    packed = next((weights[tensor.data_ptr()] for tensor in tensors if tensor.data_ptr() in weights), None)
    if packed is None:
        return _Recorded(call, call.name)
    rows = tensors[0].shape[0]  # of x
    label = f"{call.name} {packed.inputs} x {packed.outputs}" + (f", {packed.kind}" if packed.kind != kind else "")
    return _Recorded(call, label, 2 * rows * packed.inputs * packed.outputs, packed.kind)


def _packed(value: Any) -> Iterator[ops.Packed]:
    """The packed matrices among a layer's attributes, however they are kept."""
    if isinstance(value, ops.Packed):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _packed(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _packed(entry)
