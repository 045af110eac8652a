"""Opening sound model files: every version, naming and format gives back the weights that were written."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_cases import NAMINGS, RANKS, VERSIONS, expected_tensor, small_weights, write

from rwkvmpi.errors import UserError
from rwkvmpi.models import schema
from rwkvmpi.models.checkpoint import check_finite, open_checkpoint
from rwkvmpi.models.model import load_model
from rwkvmpi.models.random_weights import LazyTensor, official_shape, write_pth, write_safetensors

CASES = [(v, naming, form) for v in VERSIONS for naming in NAMINGS[v] for form in ("pth", "safetensors", "sharded")]


@pytest.mark.parametrize(("version", "naming", "form"), CASES)
def test_round_trip(tmp_path: Path, version: str, naming: str, form: str) -> None:
    dtype = torch.bfloat16 if form == "sharded" else torch.float32
    weights = small_weights(version, dtype=dtype)
    path = write(tmp_path, weights, form, naming, fused=False)
    with open_checkpoint(tmp_path) as checkpoint:
        assert (checkpoint.path, checkpoint.naming, checkpoint.version) == (path, naming, version)
        assert checkpoint.dtype == dtype
        assert checkpoint.ln0_fused is False
        assert len(checkpoint.names()) == len(weights)
        for name in checkpoint.names():
            found = checkpoint.tensor(name)
            assert found.is_contiguous()
            torch.testing.assert_close(found, expected_tensor(weights, checkpoint, name), rtol=0, atol=0)
        assert checkpoint.parameters() == sum(tensor.numel() for tensor in weights.values())
        shape = checkpoint.shape
        assert (shape.n_layer, shape.n_embd, shape.vocab_size, shape.ffn_width) == (2, 16, 11, 56)
        assert (shape.n_head, shape.head_size) == ((0, 0) if version == "4" else (2, 8))
        assert shape.ranks == RANKS.get(version, {})
        check_finite(checkpoint)
        held = b"".join(path.read_bytes() for path in sorted(checkpoint.files))
        assert checkpoint.sha256() == hashlib.sha256(held).hexdigest()
        assert (form == "sharded") == (len(checkpoint.files) > 2)


def test_layer_and_canonical_shapes(tmp_path: Path) -> None:
    weights = small_weights("7")
    checkpoint = open_checkpoint(write(tmp_path, weights))
    layer = checkpoint.layer(1)
    assert set(layer) == {n.removeprefix("blocks.1.") for n in checkpoint.names() if n.startswith("blocks.1.")}
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.items()}
    assert (shapes["att.x_r"], shapes["att.w1"], shapes["att.w2"]) == ((16,), (16, 3), (3, 16))
    assert (shapes["att.r_k"], shapes["att.v0"]) == ((2, 8), (16,))
    assert "ln0.weight" in checkpoint.layer(0)
    assert "att.v0" not in checkpoint.layer(0)
    with pytest.raises(KeyError):
        checkpoint.tensor("blocks.0.att.v0")


def test_heads_of_version_5_0_are_spread(tmp_path: Path) -> None:
    weights = small_weights("5.0")
    for suffix in ("time_decay", "time_first"):  # the public files have [H], some [H, 1, 1]
        weights[f"blocks.1.att.{suffix}"] = weights[f"blocks.1.att.{suffix}"].reshape(2, 1, 1)
    layer = open_checkpoint(write(tmp_path, weights)).layer(1)
    assert torch.equal(layer["att.time_decay"][:, 3], weights["blocks.1.att.time_decay"].flatten())
    assert torch.equal(layer["att.time_faaaa"][:, 7], weights["blocks.1.att.time_first"].flatten())


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_time_state_of_version_6(tmp_path: Path, form: str) -> None:
    weights = small_weights("6", time_state=True)
    checkpoint = open_checkpoint(write(tmp_path, weights, form))
    assert checkpoint.shape.has_time_state
    assert torch.equal(checkpoint.tensor("blocks.1.att.time_state"), weights["blocks.1.att.time_state"])
    del weights["blocks.1.att.time_state"]
    with pytest.raises(UserError, match=r"'blocks\.1\.att\.time_state' of an RWKV-6 model is missing"):
        open_checkpoint(write(tmp_path, weights, form))


@pytest.mark.parametrize("version", VERSIONS)
def test_models_of_one_layer_and_one_head(tmp_path: Path, version: str) -> None:
    weights = small_weights(version, n_layer=1, n_embd=8, ranks=None)
    checkpoint = open_checkpoint(write(tmp_path, weights))
    assert checkpoint.version == version
    assert (checkpoint.shape.n_layer, checkpoint.shape.n_head) == (1, 0 if version == "4" else 1)


def test_the_public_extras_of_layer_0_are_ignored(tmp_path: Path) -> None:
    weights = small_weights("7")
    count = sum(tensor.numel() for tensor in weights.values())
    weights |= {f"blocks.0.att.v{i}": torch.full((1, 1, 16), float("nan")) for i in range(3)}
    checkpoint = open_checkpoint(write(tmp_path, weights))
    assert checkpoint.parameters() == count
    check_finite(checkpoint)


def test_packed_mixes_of_early_hf_files(tmp_path: Path) -> None:
    weights = small_weights("7")
    path = write(tmp_path, weights, "safetensors", "hf-a")
    tensors = safetensors.torch.load_file(path)
    for layer in range(2):
        rows = [tensors.pop(f"model.layers.{layer}.attn.x_{letter}").reshape(16) for letter in "rwkvag"]
        tensors[f"model.layers.{layer}.attn.x_x"] = torch.stack(rows)
    safetensors.torch.save_file(tensors, path)
    checkpoint = open_checkpoint(path)
    for letter in "rwkvag":
        assert torch.equal(checkpoint.tensor(f"blocks.1.att.x_{letter}"), weights[f"blocks.1.att.x_{letter}"].flatten())
    assert checkpoint.parameters() == sum(tensor.numel() for tensor in weights.values())


def test_ln0_that_is_already_applied(tmp_path: Path) -> None:
    weights = small_weights("7")
    path = write(tmp_path, weights, "safetensors", "hf-b", fused=True)
    checkpoint = open_checkpoint(path)
    assert checkpoint.ln0_fused
    assert "blocks.0.ln0.weight" not in checkpoint.names()
    assert path.parent / "config.json" in checkpoint.files
    emb, scale, shift = (weights[n] for n in ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias"))
    normed = torch.nn.functional.layer_norm(emb, (16,), scale, shift)
    torch.testing.assert_close(checkpoint.tensor("emb.weight"), normed, rtol=0, atol=0)

    (tmp_path / "config.json").unlink()  # silent, and no ln0 in the file: applied
    assert open_checkpoint(path).ln0_fused

    path = write(tmp_path, weights, "safetensors", "hf-b", fused=False)
    assert "blocks.0.ln0.weight" in open_checkpoint(path).names()
    (tmp_path / "config.json").write_text('{"embedding_layer_norm_fused": true}')  # a neutral ln0 left behind
    assert open_checkpoint(path).ln0_fused
    assert "blocks.0.ln0.weight" not in open_checkpoint(path).names()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: does not say whether ln0 is already applied"):
        open_checkpoint(path)


def test_other_writers_files(tmp_path: Path) -> None:
    """Files of torch.save and the safetensors library, in the variants that occur."""
    weights = small_weights("7")
    states = OrderedDict(weights)
    states._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as Module.state_dict() has
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    views, position = {}, 0
    for name, tensor in weights.items():  # slices of one buffer, as sharded training leaves them
        views[name] = flat[position : position + tensor.numel()].reshape(tensor.shape)
        position += tensor.numel()
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}
    for number, value in enumerate((states, views, parameters)):
        path = tmp_path / f"{number}.pth"
        torch.save(value, path)
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names():
            assert torch.equal(checkpoint.tensor(name), weights[name].reshape(checkpoint.tensor_shape(name)))
    safetensors.torch.save_file(weights, tmp_path / "library.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "library.safetensors")
    assert torch.equal(checkpoint.tensor("head.weight"), weights["head.weight"])


def test_other_readers_read_our_files(tmp_path: Path) -> None:
    weights = small_weights("6", dtype=torch.bfloat16)
    read = safetensors.torch.load_file(write(tmp_path, weights, "safetensors"))
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
    read = torch.load(write_pth(tmp_path / "m.pth", weights), weights_only=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
    index = write(tmp_path / "sharded", weights, "sharded")
    for name, shard in json.loads(index.read_text())["weight_map"].items():
        with safetensors.safe_open(index.parent / shard, "pt") as file:
            assert torch.equal(file.get_tensor(name), weights[name])


def test_unaligned_tensors(tmp_path: Path) -> None:
    """Older safetensors files do not pad their header, so tensors may lie at odd positions."""
    weights = small_weights("4", n_embd=640)  # matrices above the size that is mapped
    path = write(tmp_path, weights, "safetensors")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert (8 + len(header)) % 2 == 1
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        assert torch.equal(tensor, weights[name].reshape(checkpoint.tensor_shape(name)))
        assert tensor.data_ptr() % tensor.itemsize == 0


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_only_what_is_asked_for_is_read(tmp_path: Path, name: str) -> None:
    """Of a file of 200 MB one layer of 20 MB is read: the process grows by about that layer, and opening by nothing."""
    weights = small_weights("4", n_layer=1, n_embd=8, vocab_size=4)
    weights |= {"emb.weight": torch.zeros(4, 1024), "head.weight": torch.zeros(4, 1024)}
    for key in list(weights):
        tensor = weights[key]
        if key.startswith("blocks.0.") or key.startswith("ln_out"):
            size = [{8: 1024, 56: 1536}.get(item, item) for item in tensor.shape]
            weights[key] = torch.zeros(size)
    for key in [key for key in weights if key.startswith("blocks.0.")]:
        for layer in range(1, 8):
            if ".ln0." not in key:
                weights[key.replace("blocks.0.", f"blocks.{layer}.")] = weights[key].clone()
    path = (write_pth if name.endswith("pth") else write_safetensors)(tmp_path / name, weights)
    assert path.stat().st_size > 200_000_000
    code = """
import sys, torch
from rwkvmpi.models.checkpoint import check_finite, open_checkpoint
def rss():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
torch.zeros(1).isfinite().all()
start = rss()
checkpoint = open_checkpoint(sys.argv[1])
opened = rss()
names = [n for n in checkpoint.names() if n.startswith("blocks.3.")]
check_finite(checkpoint, names)
layer = checkpoint.layer(3)
total = sum(float(t.sum()) for t in layer.values())
print(opened - start, rss() - opened, sum(t.numel() * 4 for t in layer.values()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    opening, reading, layer = map(int, done.stdout.split())
    assert opening < 8_000_000
    assert layer <= reading + 2_000_000
    assert reading < layer + 16_000_000, "more than the layer was read"


def test_tensors_outlive_the_checkpoint_and_never_change_the_file(tmp_path: Path) -> None:
    weights = small_weights("4", n_embd=640)
    path = write(tmp_path, weights, "safetensors")
    before = path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        matrix = checkpoint.tensor("blocks.0.att.key.weight")
    assert torch.equal(matrix, weights["blocks.0.att.key.weight"])
    matrix.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize(("form", "bad"), [("pth", float("nan")), ("safetensors", float("-inf"))])
def test_values_that_are_not_finite(tmp_path: Path, form: str, bad: float) -> None:
    weights = small_weights("7", dtype=torch.bfloat16)
    weights["blocks.1.ffn.key.weight"][3, 5] = bad
    checkpoint = open_checkpoint(write(tmp_path, weights, form))
    check_finite(checkpoint, [name for name in checkpoint.names() if not name.startswith("blocks.1.")])
    with pytest.raises(UserError, match=r"'blocks\.1\.ffn\.key\.weight' has the value (nan|-inf) at position 53 of"):
        check_finite(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_position_is_checked(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also in the tails of vectors and of the blocks that are checked at a time."""
    weights = small_weights("4", dtype=dtype, vocab_size=16_387)
    good = weights["head.weight"].clone()
    for position in (0, 1, 13, 31, 63, 100, 262_143, 262_144, good.numel() - 17, good.numel() - 1):
        for bad in (float("nan"), float("inf"), float("-inf")):
            weights["head.weight"] = good.clone()
            weights["head.weight"].view(-1)[position] = bad
            checkpoint = open_checkpoint(write(tmp_path, weights, "safetensors"))
            with pytest.raises(UserError, match=rf"'head\.weight' has the value \S+ at position {position} of 262192"):
                check_finite(checkpoint, ["head.weight"])


def test_folders(tmp_path: Path) -> None:
    weights = small_weights("4")
    with pytest.raises(UserError, match=r"no \.safetensors or \.pth file"):
        open_checkpoint(tmp_path)
    one = write(tmp_path, weights)
    assert open_checkpoint(tmp_path).path == one
    two = write(tmp_path, weights, "safetensors")
    assert open_checkpoint(tmp_path).path == two
    shutil.copy(two, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"holds 2 model files \(model\.safetensors, other\.safetensors\); name"):
        open_checkpoint(tmp_path)


def test_sizes_of_the_released_models() -> None:
    """Parameters as published with the weights."""
    for version, size, published in (
        ("4", "169M", 169_342_464),
        ("7", "0.1B", 191_034_624),
        ("7", "2.9B", 2_947_735_040),
    ):
        shape = official_shape(version, size)
        count = sum(torch.Size(s).numel() for s in schema.all_tensors(shape).values())
        assert count == published, (version, size, count)


@pytest.mark.parametrize("version", VERSIONS)
def test_random_weights_behave_like_trained_ones(tmp_path: Path, version: str) -> None:
    """Logits of order one, and a state that still matters a hundred tokens later."""
    weights = small_weights(version, n_embd=64, vocab_size=256, head_size=32)
    model = load_model(write(tmp_path, weights))
    tokens = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(1))
    logits, _ = model.forward(tokens)
    assert 0.5 < float(logits.std()) < 2
    changed, _ = model.forward(torch.cat([255 - tokens[:100], tokens[100:]]))
    assert float((logits[-1] - changed[-1]).abs().max()) > 1e-3
    again = small_weights(version, n_embd=64, vocab_size=256, head_size=32)
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert not torch.equal(weights["blocks.0.att.key.weight"], weights["blocks.1.att.key.weight"])
    other = small_weights(version, n_embd=64, vocab_size=256, head_size=32, seed=8)
    assert not torch.equal(other["emb.weight"], weights["emb.weight"])


def test_lazy_tensors_are_made_once_each(tmp_path: Path) -> None:
    made: list[int] = []

    def maker(value: int) -> LazyTensor:
        def make() -> torch.Tensor:
            made.append(value)
            return torch.full((2, 3), float(value))

        return LazyTensor((2, 3), torch.float32, make)

    write_safetensors(tmp_path / "m.safetensors", {"a": maker(1), "b": maker(2).t()})
    assert made == [1, 2]
    read = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert (read["a"].shape, read["b"].shape, float(read["b"].sum())) == ((2, 3), (3, 2), 12.0)
