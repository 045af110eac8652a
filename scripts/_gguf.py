"""Writes an RWKV-6 or 7 .pth as GGUF files for llama.cpp, with the types its own converter gives the tensors.

    python scripts/_gguf.py '{"version": "7", "model": "r7.pth", "outputs": {"f32": "r7-f32.gguf"}}'

bench_cpu.py runs it in the Python that has the `gguf` package. The last line of the output is JSON: the version of that
package, or {"unavailable": why}.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# By label: GGML's type of the matrices, and the number of the file's type.
TYPES = {"f32": ("F32", 0), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7)}
KEPT_FLOAT32 = ("time_mix_w1", "time_mix_w2", "time_mix_decay_w", "time_mix_first", "lerp")


def main() -> int:
    spec = json.loads(sys.argv[1])
    try:
        import torch

        weights = torch.load(spec["model"], map_location="cpu", weights_only=True)
        for label, output in spec["outputs"].items():
            write(weights, spec["version"], label, Path(output))
        result = {"version": importlib.metadata.version("gguf")}
    except ModuleNotFoundError as error:
        result = {"unavailable": f"{error.name} is not installed in {sys.executable}"}
    print(json.dumps(result))
    return 0


def write(weights: dict[str, Any], version: str, label: str, output: Path) -> None:
    """One file, its matrices of the type `label`."""
    import gguf

    type_name, file_type = TYPES[label]
    matrix_type = gguf.GGMLQuantizationType[type_name]
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    words, channels = weights["emb.weight"].shape
    heads = weights["blocks.0.att.r_k" if version == "7" else "blocks.0.att.time_faaaa"].shape[0]
    partial = output.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, f"rwkv{version}")
    writer.add_context_length(1 << 20)  # the state has no length; the loader wants a number
    writer.add_embedding_length(channels)
    writer.add_block_count(layers)
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(channels // heads)
    writer.add_feed_forward_length(weights["blocks.0.ffn.key.weight"].shape[0])
    writer.add_head_count(0)
    writer.add_file_type(file_type)
    if version == "7":
        writer.add_decay_lora_rank(weights["blocks.0.att.w1"].shape[1])
        writer.add_iclr_lora_rank(weights["blocks.0.att.a1"].shape[1])
        writer.add_value_residual_mix_lora_rank(weights["blocks.1.att.v1"].shape[1])
        writer.add_gate_lora_rank(weights["blocks.0.att.g1"].shape[1])
    else:
        writer.add_rescale_every_n_layers(0)
        writer.add_time_mix_extra_dim(weights["blocks.0.att.time_maa_w2"].shape[1])
        writer.add_time_decay_extra_dim(weights["blocks.0.att.time_decay_w1"].shape[1])
    add_vocabulary(writer, words)
    for name, tensor in tensors(weights, version, layers):
        data = tensor.float().contiguous().numpy()
        if tensor.dim() < 2 or label == "f32" or any(part in name for part in KEPT_FLOAT32):
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, matrix_type), raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(output)


def add_vocabulary(writer: Any, words: int) -> None:
    """Token 0, the 256 bytes, and names for the rest: the benchmark tokenises nothing, but the loader wants a table."""
    import gguf

    single = [repr(bytes([byte]))[2:-1] for byte in range(256)]
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(["<s>", *single, *(f"[{number}]" for number in range(257, words))])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (words - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def tensors(weights: dict[str, Any], version: str, layers: int) -> Iterator[tuple[str, Any]]:
    """(name, tensor) as llama.cpp's loader expects them: low-rank matrices [outputs, inputs], mixes stacked."""
    yield "token_embd.weight", weights["emb.weight"]
    yield "output.weight", weights["head.weight"]
    for part in ("weight", "bias"):
        yield f"token_embd_norm.{part}", weights[f"blocks.0.ln0.{part}"]
        yield f"output_norm.{part}", weights[f"ln_out.{part}"]
    for i in range(layers):
        own = {n.removeprefix(f"blocks.{i}."): t for n, t in weights.items() if n.startswith(f"blocks.{i}.")}
        parts = shared(own)
        parts |= version_7(own, i) if version == "7" else version_6(own)
        yield from ((f"blk.{i}.{name}", tensor) for name, tensor in parts.items())


def shared(own: dict[str, Any]) -> dict[str, Any]:
    """What a layer of either version has."""
    result = {}
    for part in ("weight", "bias"):
        result[f"attn_norm.{part}"] = own[f"ln1.{part}"]
        result[f"attn_norm_2.{part}"] = own[f"ln2.{part}"]
        result[f"time_mix_ln.{part}"] = own[f"att.ln_x.{part}"]
    for name in ("key", "value", "receptance", "output"):
        result[f"time_mix_{name}.weight"] = own[f"att.{name}.weight"]
    for name in ("key", "value"):
        result[f"channel_mix_{name}.weight"] = own[f"ffn.{name}.weight"]
    return result


def version_7(own: dict[str, Any], layer: int) -> dict[str, Any]:
    result = {}
    for letter in "wavg":
        # Layer 0 has no value mix, but the loader asks for one of the shapes of `a`; it is never read.
        source = "a" if (layer, letter) == (0, "v") else letter
        for digit in "12":
            result[f"time_mix_{letter}{digit}.weight"] = own[f"att.{source}{digit}"].t()
        if letter != "g":
            result[f"time_mix_{letter}0.weight"] = own[f"att.{source}0"].flatten()
    result["time_mix_lerp_fused.weight"] = stacked([own[f"att.x_{letter}"] for letter in "rwkvag"])
    for name in ("k_k", "k_a", "r_k"):
        result[f"time_mix_{name}.weight"] = own[f"att.{name}"].flatten()
    result["channel_mix_lerp_k.weight"] = own["ffn.x_k"].flatten()
    return result


def version_6(own: dict[str, Any]) -> dict[str, Any]:
    result = {
        "time_mix_w1.weight": own["att.time_maa_w1"].t(),
        "time_mix_w2.weight": own["att.time_maa_w2"].permute(0, 2, 1),
        "time_mix_decay_w1.weight": own["att.time_decay_w1"].t(),
        "time_mix_decay_w2.weight": own["att.time_decay_w2"].t(),
        "time_mix_decay.weight": own["att.time_decay"].flatten(),
        "time_mix_first.weight": own["att.time_faaaa"],
        "time_mix_lerp_x.weight": own["att.time_maa_x"].flatten(),
        "time_mix_lerp_fused.weight": stacked([own[f"att.time_maa_{letter}"] for letter in "wkvrg"]),
        "time_mix_gate.weight": own["att.gate.weight"],
        "channel_mix_receptance.weight": own["ffn.receptance.weight"],
    }
    return result | {f"channel_mix_lerp_{n}.weight": own[f"ffn.time_maa_{n}"].flatten() for n in "kr"}


def stacked(vectors: list[Any]) -> Any:
    """Per-channel vectors [C] to [M, 1, 1, C]."""
    import torch

    return torch.stack([vector.view(1, 1, -1) for vector in vectors])


if __name__ == "__main__":
    sys.exit(main())
