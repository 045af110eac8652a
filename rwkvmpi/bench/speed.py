"""tokens/s of a whole model: by tokens per chunk, and of single steps by the number of documents that take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rwkvmpi.bench.timing import Effort, median, medians
from rwkvmpi.models.model import Model, Stage

BATCHES = (1, 4, 16, 64)


def chunk_speeds(
    stage: Stage, chunks: Sequence[int], layers: int, all_layers: int, head_s: Mapping[int, float], effort: Effort
) -> list[dict[str, Any]]:
    """tokens/s by tokens per chunk: of the layers, and with the head as a score needs it.

    `layers` of the stage's are measured and count for `all_layers`, the embedding once. head_s: the head's seconds by
    tokens per chunk.
    """
    layer_s = medians({chunk: _chunk_body(stage, chunk, layers) for chunk in chunks}, effort)
    embed_s = medians({chunk: _chunk_body(stage, chunk, 0) for chunk in chunks}, effort)
    result = []
    for chunk in chunks:
        forward = embed_s[chunk] + max(layer_s[chunk] - embed_s[chunk], 1e-9) * all_layers / layers
        entry = {"chunk": chunk, "forward_tokens_per_second": chunk / forward}
        result.append({**entry, "score_tokens_per_second": chunk / (forward + head_s[chunk])})
    return result


def step_speeds(model: Model, all_layers: int, effort: Effort) -> list[dict[str, Any]]:
    """tokens/s of `Model.step` by the number of states; with fewer layers than `all_layers` those are reckoned in."""
    layers, stage = model.shape.n_layer, model.stage
    result = []
    for batch in BATCHES:
        tokens, states = torch.arange(batch) % model.shape.vocab_size, model.states(batch)
        seconds = median(lambda tokens=tokens, states=states: model.step(tokens, states), effort)  # type: ignore[misc]
        if layers < all_layers:
            h = torch.randn(batch, model.shape.n_embd)
            head_s = median(lambda h=h: stage.logits(h), effort)  # type: ignore[misc]
            seconds = head_s + max(seconds - head_s, 1e-9) * all_layers / layers
        result.append({"batch": batch, "seconds": seconds, "tokens_per_second": batch / seconds})
    return result


def _chunk_body(stage: Stage, chunk: int, layers: int) -> Any:
    """One chunk through the embedding and the first `layers` layers, as a rank reads it."""
    tokens = torch.arange(chunk) % stage.shape.vocab_size
    rows = torch.tensor([[0, chunk]], dtype=torch.int32)
    states = [stage.initial_state(i, 1) for i in range(layers)]

    @torch.inference_mode()
    def body() -> None:
        x, v_first = stage.embed(tokens), None
        for layer, state in zip(stage.layers, states, strict=False):
            x, v_first = layer.forward(x, v_first, state, rows)

    return body
