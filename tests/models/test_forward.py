"""Logits and states against the float64 oracle, for every version and odd shapes; what the Python API refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import CASES, SMALL, TOLERANCE, VERSIONS, Case, difference, model, model_file, tokens, weights
from oracle import Oracle

from rwkvmpi.errors import UserError
from rwkvmpi.models import cost
from rwkvmpi.models.checkpoint import open_checkpoint
from rwkvmpi.models.cost import KINDS
from rwkvmpi.models.model import Stage, load_model
from rwkvmpi.models.random_weights import random_weights, write_model, write_pth
from rwkvmpi.models.state import LayerState, ModelState

RANKS = {"7": ("w", "a", "v", "g"), "6": ("maa", "decay")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_float32_matches_the_truth(case: Case) -> None:
    ids = tokens(case, 150)
    oracle = Oracle(weights(case))
    truth, state = oracle.read(ids)
    logits, found = model(case).forward(torch.from_numpy(ids))
    assert logits.dtype == torch.float32
    assert logits.shape == (150, case.vocab_size)
    assert difference(logits, truth) <= TOLERANCE
    wkv, shift = oracle.exported_state(state)
    assert difference(torch.cat([layer.shift for layer in found.layers]), shift) <= TOLERANCE
    if case.version == "4":  # pp is a maximum, aa and bb are relative to it
        assert difference(torch.cat([layer.wkv[:, 2] for layer in found.layers]), wkv[:, 2]) <= TOLERANCE
        ratio = torch.cat([layer.wkv[:, 0] / layer.wkv[:, 1] for layer in found.layers])
        assert difference(ratio, wkv[:, 0] / wkv[:, 1]) <= TOLERANCE
    else:
        assert difference(torch.cat([layer.wkv for layer in found.layers]), wkv) <= TOLERANCE


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("count", [1, 2, 31])
def test_short_calls_and_single_steps(version: str, count: int) -> None:
    case = SMALL[version]
    ids = tokens(case, count + 2)
    truth, _ = Oracle(weights(case)).read(ids)
    start, state = model(case).forward(ids[:count])
    kept = [layer.wkv.clone() for layer in state.layers]
    step, after = model(case).forward(ids[count : count + 1].tolist(), state)
    last, _ = model(case).forward(ids[count + 1 :], after)
    assert difference(torch.cat([start, step, last]), truth) <= TOLERANCE
    assert all(torch.equal(a, b.wkv) for a, b in zip(kept, state.layers, strict=True)), "the argument was changed"


@pytest.mark.parametrize("version", VERSIONS)
def test_one_layer_and_one_head(version: str) -> None:
    """Edges of the shapes: RWKV-7's only layer has no value mix, RWKV-5.0 has one number for the whole layer."""
    case = Case(version, "one", 1, 16, 300, 16, 24)
    ids = tokens(case, 40)
    truth, _ = Oracle(weights(case)).read(ids)
    assert difference(model(case).forward(ids)[0], truth) <= TOLERANCE


@pytest.mark.parametrize("naming", ["hf-a", "hf-b"])
def test_hugging_face_files_give_the_same_logits(naming: str, tmp_path: Path) -> None:
    case = SMALL["7"]
    path = write_model(tmp_path / "model.safetensors", weights(case), naming=naming)
    ids = tokens(case, 64)
    logits = load_model(path).forward(ids)[0]
    if naming == "hf-b":  # its embedding went through ln0 already, in another order of operations
        assert difference(logits, Oracle(weights(case)).read(ids)[0]) <= TOLERANCE
    else:
        assert torch.equal(logits, model(case).forward(ids)[0])


def test_the_embedding_stays_in_the_file_and_kinds_differ_in_bytes(tmp_path: Path) -> None:
    large = random_weights("4", n_layer=1, n_embd=128, vocab_size=8192, seed=1, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(write_pth(tmp_path / "large.pth", large))
    mapped = checkpoint.tensor("emb.weight").data_ptr()
    stages = {kind: Stage(checkpoint, 0, 1, kind) for kind in KINDS["cpu"]}
    for stage in stages.values():
        assert stage.embedding.data_ptr() == mapped
        assert stage.embedding.dtype == torch.bfloat16
    sizes = {kind: stage.head.data.numel() / (8192 * 128) for kind, stage in stages.items()}
    assert sizes == {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 8 / 128}
    assert stages["float32"].weight_bytes > stages["bfloat16"].weight_bytes > stages["int8"].weight_bytes


@pytest.mark.parametrize("version", VERSIONS)
def test_logprobs_match_the_truth(version: str) -> None:
    case = SMALL[version]
    ids = tokens(case, 64)
    truth, _ = Oracle(weights(case)).read(ids)
    truth = truth - truth.max(axis=1, keepdims=True)
    truth = truth - np.log(np.exp(truth).sum(axis=1, keepdims=True))
    stage = model(case).stage
    padded = torch.zeros(256, dtype=torch.int32)
    padded[:64] = torch.from_numpy(ids)
    targets = torch.full((256,), -1, dtype=torch.int32)
    targets[:63] = padded[1:64]
    x, v_first = stage.embed(padded), None
    for i, layer in enumerate(stage.layers):
        x, v_first = layer.forward(x, v_first, stage.initial_state(i, 1), torch.tensor([[0, 64]], dtype=torch.int32))
    found = stage.logprobs(stage.finish(x), targets)
    assert torch.count_nonzero(found[63:]) == 0
    assert np.abs(found[:63].numpy() - truth[np.arange(63), ids[1:]]).max() <= TOLERANCE * np.abs(truth).max()


@pytest.mark.parametrize("version", VERSIONS)
def test_costs_count_what_the_layers_hold(version: str) -> None:
    case = Case(version, "whole-panels", 2, 128, 96, 16, 256, dict.fromkeys(RANKS.get(version, ""), 32))
    checkpoint = open_checkpoint(model_file(case))
    stage = Stage(checkpoint, 0, case.n_layer)
    assert stage.layers[-1].weight_bytes == pytest.approx(cost.layer_weight_bytes(checkpoint.shape, 4), rel=0.01)
    state = stage.initial_state(0, 3)
    assert state.nbytes_per_segment == cost.state_bytes(checkpoint.shape)
    products = 2 * cost.layer_weights(checkpoint.shape, 1)[0]
    assert products < cost.layer_cost(checkpoint.shape) < 2 * products
    assert cost.head_cost(checkpoint.shape) == 2 * case.n_embd * case.vocab_size


@pytest.mark.parametrize("version", VERSIONS)
def test_initial_states(version: str) -> None:
    state = model(SMALL[version]).state()
    assert len(state.layers) == 4
    for layer, own in enumerate(state.layers):
        expected = torch.zeros(1, 3, 40) if version == "4" else torch.zeros(1, 5, 8, 8)
        if version == "4":
            expected[:, 2] = -1e30
        if version == "6":
            expected[0] = weights(SMALL["6"])[f"blocks.{layer}.att.time_state"]
        assert torch.equal(own.wkv, expected)
        assert torch.equal(own.shift, torch.zeros(1, 2, 40))


def test_states_pack_to_the_same_bits() -> None:
    case = SMALL["6"]
    stage = model(case).stage
    state = stage.initial_state(1, 2)
    state.shift.copy_(torch.randn(2, 2, case.n_embd))
    state.wkv[1, 0, 0, 0] = float("nan")
    message = np.empty(state.nbytes_per_segment, dtype=np.uint8)
    state.pack_into(message, 1)
    assert message.tobytes() == state.wkv[1].numpy().tobytes() + state.shift[1].numpy().tobytes()
    other = LayerState.zeros(stage.shape, 3)
    other.unpack_from(torch.from_numpy(message), -1)
    assert other.wkv[2].numpy().tobytes() == state.wkv[1].numpy().tobytes()
    assert torch.equal(other.shift[2], state.shift[1])
    assert torch.count_nonzero(other.wkv[:2]) == 0
    assert not stage.is_finite(other.shift, other.wkv)
    assert stage.is_finite(other.shift)
    with pytest.raises(ValueError, match=f"buffer of {state.nbytes_per_segment} bytes"):
        state.pack_into(message[:-1])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([0, 61], "token 61 at position 1 is not in the vocabulary of .*, 0..60"),
        ([3, 4, -1], "token -1 at position 2"),
        ([0.5], "whole numbers in one dimension"),
        ([[1, 2]], "whole numbers in one dimension"),
        ([True], "whole numbers in one dimension"),
        (["a"], "whole numbers in one dimension"),
        ([2**70], "whole numbers in one dimension"),
        (5, "whole numbers in one dimension"),
    ],
)
def test_bad_tokens_are_refused(given: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        model(SMALL["4"]).forward(given)  # type: ignore[arg-type]


def test_no_tokens_change_nothing() -> None:
    logits, state = model(SMALL["7"]).forward([])
    assert logits.shape == (0, 61)
    assert all(torch.count_nonzero(layer.wkv) == 0 for layer in state.layers)


def test_results_can_be_changed_by_the_caller() -> None:
    """Nothing of what forward gives is bound to torch's inference mode."""
    logits, state = model(SMALL["7"]).forward(tokens(SMALL["7"], 40))
    logits[:, 0] = -1
    state.layers[0].wkv.mul_(0.5)
    state.layers[0].shift[0, 0] += 1


def test_foreign_states_devices_and_dtypes_are_refused() -> None:
    seven, four = model(SMALL["7"]), model(SMALL["4"])
    with pytest.raises(UserError, match=r"given has 4 layers of wkv \[1, 3, 40\].*needs 4 layers of wkv \[1, 5"):
        seven.forward([0], four.state())
    with pytest.raises(UserError, match="the state given has 3 layers"):
        seven.forward([0], ModelState(seven.state().layers[:3]))
    with pytest.raises(UserError, match="cannot be used as float16"):
        load_model(model_file(SMALL["7"]), dtype="float16")
    with pytest.raises(UserError, match="no NVIDIA driver"):
        load_model(model_file(SMALL["7"]), device="cuda")


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    broken = dict(weights(SMALL["5.2"]))
    broken["blocks.2.ffn.key.weight"] = broken["blocks.2.ffn.key.weight"].clone()
    broken["blocks.2.ffn.key.weight"][3, 4] = float("inf")
    write_pth(tmp_path / "broken.pth", broken)
    checkpoint = open_checkpoint(tmp_path / "broken.pth")
    Stage(checkpoint, 0, 2)  # not this stage's tensor
    with pytest.raises(UserError, match=r"broken\.pth.*blocks\.2\.ffn\.key\.weight"):
        Stage(checkpoint, 2, 3)
