"""What is refused when a model is opened: each with one sentence that names the file and what is wrong."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_cases import Raw, small_weights, write, write_zip

from rwkvmpi.errors import UserError
from rwkvmpi.models.checkpoint import check_finite, open_checkpoint
from rwkvmpi.models.random_weights import write_pth, write_safetensors

Weights = dict[str, Any]
Change = Callable[[Weights], Any]


def refused(path: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert str(path.parent) in text, "the sentence does not name the file"
    assert "\n" not in text
    assert text.endswith((".", ")"))


def cut(name: str) -> Change:
    return lambda weights: weights.pop(name)


def put(name: str, tensor: torch.Tensor) -> Change:
    return lambda weights: weights.update({name: tensor})


X = torch.zeros(16, 16)
SCHEMA: dict[str, tuple[str, Change, str]] = {
    "missing": ("7", cut("blocks.1.att.w1"), r"'blocks\.1\.att\.w1' of an RWKV-7 model is missing"),
    "missing layer": (
        "6",
        lambda w: [w.pop(n) for n in list(w) if n.startswith("blocks.0.")],
        r"the tensors of layer 0 are missing although there is a layer 1",
    ),
    "missing embedding": ("7", cut("emb.weight"), r"'emb\.weight' is missing"),
    "missing head": ("4", cut("head.weight"), r"'head\.weight' of an RWKV-4 model is missing"),
    "missing ln0": ("5.2", cut("blocks.0.ln0.bias"), r"'blocks\.0\.ln0\.bias' of an RWKV-5\.2 model is missing"),
    "missing 5.0 bonus": ("5.0", cut("blocks.1.att.time_first"), r"'blocks\.1\.att\.time_first' .* is missing"),
    "extra": ("4", put("head_q.weight", X), r"'head_q\.weight' does not belong to an RWKV-4 model"),
    "extra ln0": ("7", put("blocks.1.ln0.weight", X[0]), r"'blocks\.1\.ln0\.weight' does not belong"),
    "extra v0 in layer 0 of 6": ("6", put("blocks.0.att.v0", X[0]), r"'blocks\.0\.att\.v0' does not belong"),
    "odd layer number": ("7", put("blocks.01.ln1.weight", X[0]), r"'blocks\.01\.ln1\.weight' does not belong"),
    "far layer": ("7", put("blocks.99999.ln1.weight", X[0]), r"layer 2 are missing although there is a layer 99999"),
    "wrong vector": (
        "7",
        put("blocks.1.att.k_a", torch.zeros(1, 1, 15)),
        r"k_a' has the shape \[1, 1, 15\], expected \[16\]",
    ),
    "wrong matrix": (
        "4",
        put("blocks.1.att.key.weight", torch.zeros(16, 8)),
        r"has the shape \[16, 8\], expected \[16, 16\]",
    ),
    "transposed": ("7", put("blocks.1.att.w1", torch.zeros(3, 16)), r"has the shape \[3, 16\], expected \[16, 3\]"),
    "heads": (
        "7",
        put("blocks.0.att.r_k", torch.zeros(3, 5)),
        r"3 heads of size 5 \(layer 0\) do not make the 16 channels",
    ),
    "heads of another layer": ("6", put("blocks.1.att.time_faaaa", torch.zeros(4, 4)), r"\[4, 4\], expected \[2, 8\]"),
    "one more dimension": ("7", put("blocks.1.att.r_k", torch.zeros(1, 2, 8)), r"\[1, 2, 8\], expected \[2, 8\]"),
    "empty": ("7", put("emb.weight", torch.zeros(0, 16)), r"'emb\.weight' has the shape \[0, 16\]"),
    "dimensions": (
        "7",
        put("blocks.0.att.g1", X[0]),
        r"'blocks\.0\.att\.g1' has the shape \[16\], expected 2 dimensions",
    ),
    "vocabulary": ("7", put("head.weight", torch.zeros(12, 16)), r"\[12, 16\], expected \[11, 16\]"),
    "5.1": (
        "5.2",
        put("blocks.0.att.time_decay", torch.zeros(2)),
        r"RWKV-5\.1 model .* \[2\]\), which is not supported",
    ),
    "5.0 by channel": ("5.0", put("blocks.0.att.time_decay", torch.zeros(2, 8)), r"\[2, 8\], expected \[2\]"),
    "5.0 with another bonus": (
        "5.0",
        put("blocks.1.att.time_faaaa", torch.zeros(2, 8)),
        r"does not belong to an RWKV-5\.0",
    ),
    "v7a": ("7", put("blocks.0.ffn.s_emb.weight", X), r"RWKV-7a model with DeepEmbed"),
    "v7b": ("7", put("blocks.1.qkv.x_q", X), r"RWKV-7b model"),
    "v8": ("7", put("blocks.1.rosa.emb", X), r"RWKV-8 \(ROSA\) model"),
    "quantised names": ("4", put("blocks.0.att.key.weight_mx", X[0]), r"quantised by another program"),
    "quantised values": ("4", put("blocks.0.att.key.weight", X.to(torch.int8)), r"has the dtype int8, expected one of"),
    "double": ("4", put("blocks.1.ln1.bias", X[0].double()), r"has the dtype float64, expected one of float32"),
    "no time mix": ("4", lambda w: [w.pop(n) for n in list(w) if ".att." in n], r"not an RWKV-4, 5, 6 or 7 model"),
    "stranger": (
        "4",
        lambda w: [w.clear(), w.update({"model.layers.0.self_attn.q_proj.weight": X})],
        r"not an RWKV model: its tensors are called like 'model\.layers\.0\.self_attn",
    ),
    "nothing": ("4", lambda w: w.clear(), r"not an RWKV model: there is no tensor in it"),
}


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize("case", SCHEMA)
def test_schema(tmp_path: Path, case: str, form: str) -> None:
    version, change, sentence = SCHEMA[case]
    weights: Weights = small_weights(version)
    change(weights)
    writer = write_pth if form == "pth" else write_safetensors
    refused(writer(tmp_path / f"model.{form}", weights), sentence)


PTH: dict[str, tuple[Change, str]] = {
    "rescaled": (lambda w: w.update(_strategy="cpu fp32", _rescale_layer=6), r"converted for the `rwkv` package"),
    "text": (lambda w: w.update(note="hello"), r"the entry 'note' is of type str, not a tensor"),
    "number": (lambda w: w.update(step=17), r"the entry 'step' is of type int, not a tensor"),
    "list": (lambda w: w.update(blocks=[torch.zeros(2)]), r"the entry 'blocks' is of type list"),
    "number as name": (lambda w: w.update({7: torch.zeros(2)}), r"a key of its dictionary is of type int"),
    "sparse": (lambda w: w.update(a=torch.eye(3).to_sparse()), r"it holds a sparse tensor"),
    "quantised": (
        lambda w: w.update(a=torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)),
        r"it holds a quantised",
    ),
    "meta": (lambda w: w.update(a=torch.empty(3, device="meta")), r"it holds a meta tensor"),
    "complex": (lambda w: w.update(a=torch.zeros(3, dtype=torch.complex64)), r"unusual storage \('torch\.ComplexFloat"),
    "strided": (lambda w: w.update({"emb.weight": torch.zeros(16, 11).t()}), r"'emb\.weight' is a strided view"),
    "expanded": (lambda w: w.update({"emb.weight": torch.zeros(1, 16).expand(11, 16)}), r"is a strided view"),
    "tied": (
        lambda w: w.update({"head.weight": w["emb.weight"]}),
        r"'emb\.weight' and 'head\.weight' share the same bytes",
    ),
    "conjugate view": (lambda w: w.update(a=torch.zeros(3)._neg_view()), r"described in an unknown way"),
    "object": (lambda w: w.update(a=Path("x")), r"it would call 'pathlib\.PosixPath' when unpickled"),
}


@pytest.mark.parametrize("case", PTH)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_pth(tmp_path: Path, case: str) -> None:
    change, sentence = PTH[case]
    weights: Weights = small_weights("7")
    change(weights)
    torch.save(weights, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", sentence)


def test_nested_dictionary(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "model": small_weights("7")}, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", r"the entry 'epoch' is of type int")
    torch.save({"model": small_weights("7")}, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", r"nested under the key 'model'; save that dictionary alone")
    torch.save([torch.zeros(2)], tmp_path / "model.pth")
    refused(tmp_path / "model.pth", r"holds something of type list instead of a dictionary of tensors")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_not_a_model_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(small_weights("7"), path, _use_new_zipfile_serialization=False)
    refused(path, r"format of torch before 1\.6, which cannot be mapped; save it again: torch\.save\(torch\.load")
    for content, sentence in (
        (b"", r"the file is empty"),
        (b"GGUF\3\0\0\0" + bytes(99), r"a GGUF file"),
        (b"fmgg" + bytes(99), r"an rwkv\.cpp file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"pointer of git-lfs.*git lfs pull"),
        (b"<!DOCTYPE html><html>", r"a web page instead of the weights"),
        (b"\x80\x04K\x07.", r"a bare pickle, which is never loaded"),
        (b"Hello, this is no model at all.", r"neither a \.pth \(zip\) nor a safetensors file"),
        (b"PK\x03\x04" + bytes(50), r"cut off: the end of the archive is missing"),
    ):
        path.write_bytes(content)
        refused(path, sentence)
    refused(tmp_path / "missing.pth", r"there is no such model file or folder")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path / "config.json", r"a JSON file that is not an index of shards")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/readme.txt", "x")
    refused(path, r"a zip archive, but not one of torch\.save")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    refused(path, r"is compressed \(.* \(a TorchScript program: its state_dict\)")


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    """The classic attack, and that it would have worked on a loader that trusts files."""
    flag = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(flag),))

    weights: Weights = small_weights("7")
    weights["emb.weight"] = Attack()
    torch.save(weights, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", r"it would call 'posix\.mkdir' when unpickled.*nothing of it was executed")
    assert not flag.exists()
    torch.load(tmp_path / "model.pth", weights_only=False)
    assert flag.exists()
    refused(
        write_zip(tmp_path / "m.pth", Raw(b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R."), {}),
        r"it would call 'os\.system'",
    )


def test_archives_that_lie(tmp_path: Path) -> None:
    weights = small_weights("7")
    path = write(tmp_path, weights)
    good = path.read_bytes()
    path.write_bytes(good + b"x")
    refused(path, r"damaged.*something follows its end")
    path.write_bytes(good[: len(good) // 2])
    refused(path, r"cut off: the end of the archive is missing")
    path.write_bytes(good[:1000] + good[5000:])  # a hole, as an interrupted download leaves
    refused(path, r"damaged")
    patched = bytearray(good)
    patched[good.index(b"data.pkl") + 100] ^= 1
    path.write_bytes(patched)
    refused(path, r"data\.pkl' does not match its checksum")
    patched = bytearray(write_zip(path, {}, {}).read_bytes())
    patched[-12:-10] = b"\xff\xff"  # many members in a small table of contents
    path.write_bytes(patched)
    refused(path, r"its table of contents has an impossible size")

    value = torch.zeros(4)
    torch.save({"emb.weight": value}, path)
    with zipfile.ZipFile(path) as archive:
        code = Raw(archive.read("model/data.pkl"))
    refused(write_zip(path, code, {}), r"the bytes of tensor 'emb\.weight' are missing")
    refused(write_zip(path, code, {"0": bytes(8)}), r"needs a storage of 16 bytes, but the archive has 8")
    refused(write_zip(path, code, {"0": bytes(1 << 20)}, zipfile.ZIP_DEFLATED), r"is compressed \(\d+ bytes for \d+\)")
    assert path.stat().st_size < 5000  # a bomb: 200 times smaller than what it would unpack to
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", code.code)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/data.pkl", code.code)
    refused(path, r"a member occurs twice")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", code.code)
        archive.writestr("a/byteorder", "big")
    refused(path, r"not little-endian")


def test_tensors_that_lie(tmp_path: Path) -> None:
    """Descriptions of tensors that reach outside their storage, or are no plain tensors."""
    path = tmp_path / "model.pth"
    torch.save({"emb.weight": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        code = archive.read("model/data.pkl")
    for old, new, sentence in (
        (b"QK\0K\4\x85", b"QK\1K\4\x85", r"'emb\.weight' of shape \[4\] reaches beyond its 16 bytes"),
        (b"QK\0K\4\x85", b"QK\0K\5\x85", r"'emb\.weight' of shape \[5\] reaches beyond"),
        (b"QK\0K\4\x85", b"QJ\xff\xff\xff\xffK\4\x85", r"described in an unknown way"),
        (b"QK\0K\4\x85", b"QK\0J\xff\xff\xff\xff\x85", r"described in an unknown way"),
        (b"QK\0K\4\x85", b"QK\0G" + bytes(8) + b"\x85", r"described in an unknown way"),
        (b"K\1\x85", b"K\1K\1\x86", r"described in an unknown way"),
        (b"K\1\x85", b"K\2\x85", r"is a strided view \(shape \[4\], strides \[2\]\)"),
        (b"OrderedDict\nq\n)R", b"OrderedDict\nq\n)RX\1\0\0\0aNs", r"described in an unknown way"),
        (b"X\1\0\0\x000", b"X\3\0\0\0../", r"described in an unknown way"),
        (b"X\1\0\0\x000", b"X\1\0\0\x007", r"the bytes of tensor 'emb\.weight' are missing"),
        (b"X\3\0\0\0cpu", b"N", r"described in an unknown way"),
    ):
        assert code.count(old) == 1, (old, code)
        refused(write_zip(path, Raw(code.replace(old, new)), {"0": bytes(16)}), sentence)
    refused(write_zip(path, Raw(code), {"0": bytes(24)}), r"needs a storage of 16 bytes, but the archive has 24")


def test_members_that_overlap(tmp_path: Path) -> None:
    """The bomb of many members that point to the same bytes: here one lies inside another one's data."""
    path = write_zip(tmp_path / "m.pth", {}, {"1": b"a" * 64})
    data = path.read_bytes()
    start = data.index(b"PK\x03\x04", 4)
    inner = data[start : data.index(b"PK\x01\x02")]  # the header and the bytes of member 1
    data = bytearray(write_zip(path, {}, {"0": inner, "1": b"a" * 64}).read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 42 : entry + 46] = data.index(inner).to_bytes(4, "little")
    path.write_bytes(data)
    refused(path, r"the member 'archive/data/1' overlaps another one")
    data[entry + 42 : entry + 46] = bytes(4)
    path.write_bytes(data)
    refused(path, r"the member 'archive/data/1' is not where the table of contents says")
    sound = write_zip(path, {}, {"1": b"a" * 64}).read_bytes()
    for offset, value, sentence in (
        (8, b"\1\0", r"'archive/data/1' is encrypted"),
        (20, b"\xff\0\0\0\xff\0\0\0", r"'archive/data/1' reaches beyond the data"),
        (42, b"\0\0\xff\0", r"'archive/data/1' lies outside the file"),
        (20, b"\xff" * 8, r"a 64-bit size is missing"),
    ):
        data = bytearray(sound)
        entry = data.rindex(b"PK\x01\x02")
        data[entry + offset : entry + offset + len(value)] = value
        path.write_bytes(data)
        refused(path, sentence)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "overlap": (lambda h: h["emb.weight"].update(data_offsets=[4, 708]), r"leaves a hole|overlaps"),
    "swapped": (lambda h: h["emb.weight"].update(data_offsets=[704, 0]), r"the header gives it -704"),
    "beyond": (lambda h: h["emb.weight"].update(data_offsets=[10**9, 10**9 + 704]), r"leaves a hole after|cut off"),
    "too large": (
        lambda h: h["emb.weight"].update(shape=[10**12, 16]),
        r"needs \d+ bytes, but the header gives it 704",
    ),
    "negative": (
        lambda h: h["emb.weight"].update(shape=[-11, -16]),
        r"'emb\.weight' has a shape that is no list of sizes",
    ),
    "float": (lambda h: h["emb.weight"].update(shape=[11.0, 16]), r"has a shape that is no list of sizes"),
    "bool": (lambda h: h["emb.weight"].update(shape=[True, 176]), r"has a shape that is no list of sizes"),
    "text": (lambda h: h["emb.weight"].update(shape="11,16"), r"has a shape that is no list of sizes"),
    "offsets": (lambda h: h["emb.weight"].update(data_offsets=[0]), r"data_offsets that are not two positions"),
    "dtype": (lambda h: h["emb.weight"].update(dtype="F7"), r"the dtype 'F7', which is not known"),
    "fields": (lambda h: h["emb.weight"].pop("dtype"), r"'emb\.weight' lacks dtype, shape or data_offsets"),
    "not a tensor": (lambda h: h.update(x=[1, 2]), r"'x' lacks dtype"),
    "one less": (lambda h: h.pop("head.weight"), r"leaves a hole|describes \d+ bytes but the file has \d+"),
}


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers(tmp_path: Path, case: str) -> None:
    change, sentence = HEADERS[case]
    path = write(tmp_path, small_weights("7"), "safetensors")
    rewrite_header(path, change)
    refused(path, sentence)


def with_hole(content: bytes) -> bytes:
    """The same tensors, all of them four bytes later."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    for fields in header.values():
        fields["data_offsets"] = [position + 4 for position in fields["data_offsets"]]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4) + content[8 + length :]


def test_safetensors_files(tmp_path: Path) -> None:
    path = write(tmp_path, small_weights("7"), "safetensors")
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    body = good[8 + length :]
    for content, sentence in (
        (good[:-1], r"describes \d+ bytes but the file has \d+: it was cut off"),
        (good + b"x", r"something was appended"),
        (with_hole(good), r"'emb\.weight' leaves a hole after the header"),
        (good[:100], r"cut off: its header claims \d+ bytes and the file has 100"),
        (good[:5], r"cut off"),
        ((2**63).to_bytes(8, "little") + good[8:], r"its header claims 9223372036854775808 bytes"),
        ((2).to_bytes(8, "little") + b"[]" + body, r"neither a \.pth|not a JSON object"),
        ((10).to_bytes(8, "little") + b'{"a": 1, }' + body, r"is not valid JSON"),
        ((16).to_bytes(8, "little") + b'{"a": 1, "a": 1}' + body, r"a key occurs twice"),
        ((200_000).to_bytes(8, "little") + b'{"a":' * 40_000, r"is not valid JSON \(nested too deeply\)"),
        ((12).to_bytes(8, "little") + b'{"\xff\xfe": 1}  ' + body, r"is not valid JSON"),
    ):
        path.write_bytes(content)
        if content[8:9] != b"[":
            refused(path, sentence)
    path.write_bytes((2).to_bytes(8, "little") + b"[]" + body)
    refused(path, r"not a JSON object")


def test_sharded_indexes(tmp_path: Path) -> None:
    weights = small_weights("7")
    index = write(tmp_path, weights, "sharded")
    good = json.loads(index.read_text())
    shards = sorted(set(good["weight_map"].values()))

    def with_map(**changes: Any) -> None:
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], **changes}}))

    (tmp_path / "sub").mkdir()
    outside = safetensors.torch.save(weights)
    (tmp_path.parent / "outside.safetensors").write_bytes(outside)
    for shard in ("../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 7, "a\0.safetensors"):
        with_map(**{"emb.weight": shard})
        refused(index, r"'emb\.weight' lies in .*, but a shard must be a \.safetensors file in the index's own folder")
    with_map(**{"emb.weight": "none.safetensors"})
    refused(index, r"the shard 'none\.safetensors' is missing")
    with_map(**{"emb.weight": shards[-1]})
    refused(index, r"holds the tensor 'emb\.weight', which the index .* does not place there")
    with_map(extra=shards[0])
    refused(index, r"the tensor 'extra' should be in the shard .* but is not there")
    for text, sentence in (
        ("", r"is not valid JSON"),
        ("[]", r"is not a JSON object"),
        ("{}", r"there is no weight_map"),
        ('{"weight_map": []}', r"there is no weight_map"),
    ):
        index.write_text(text)
        refused(index, sentence)
    index.write_text(json.dumps(good))
    shard = tmp_path / shards[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-4])
    refused(index, rf"{shards[1]}: the header describes")
    shard.unlink()
    refused(index, rf"the shard '{shards[1]}' is missing")


@pytest.mark.parametrize(
    ("naming", "config", "sentence"),
    [
        ("hf-a", {"norm_eps": 1e-6}, r"config\.json: norm_eps is 1e-06, but RWKV uses 1e-05"),
        ("hf-a", {"norm_eps": 1e-5}, r"norm_eps times the head size is 8e-05, but RWKV uses 0\.00064"),
        ("hf-b", {"group_norm_epsilon": 1e-5}, r"group_norm_epsilon is 1e-05, but RWKV uses 0\.00064"),
        ("hf-b", {"layer_norm_epsilon": "x"}, r"layer_norm_epsilon is x, but RWKV uses 1e-05"),
        ("hf-b", {"embedding_layer_norm_fused": False}, r"is false, but the weights have no blocks\.0\.ln0"),
        ("hf-b", {"embedding_layer_norm_fused": 1}, r"embedding_layer_norm_fused is '1', expected true or false"),
    ],
)
def test_configs(tmp_path: Path, naming: str, config: dict[str, Any], sentence: str) -> None:
    path = write(tmp_path, small_weights("7"), "safetensors", naming)
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(path, sentence)


def test_two_tensors_for_one(tmp_path: Path) -> None:
    path = write(tmp_path, small_weights("7"), "safetensors", "hf-b", fused=True)
    weights = safetensors.torch.load_file(path)
    weights["model.ln_out.weight"] = weights["rwkv7.ln_out.weight"].clone()
    safetensors.torch.save_file(weights, path)
    refused(path, r"'\w+\.ln_out\.weight' and '\w+\.ln_out\.weight' stand for the same one")


@pytest.mark.parametrize("width", [16, 640])  # tensors that are copied, and tensors that are mapped
def test_a_file_that_shrinks_while_in_use(tmp_path: Path, width: int) -> None:
    path = write(tmp_path, small_weights("7", n_embd=width))
    checkpoint = open_checkpoint(path)
    checkpoint.tensor("blocks.1.att.key.weight")
    os.truncate(path, 5000)
    with pytest.raises(UserError, match=r"model\.pth: the file became shorter while it was in use"):
        check_finite(checkpoint, ["blocks.1.att.key.weight"])
    path.unlink()
    with pytest.raises(UserError, match=r"model\.pth: cannot be read"):
        checkpoint.sha256()
