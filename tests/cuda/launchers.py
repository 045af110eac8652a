"""The launchers of cuda/*.cu with what each argument stands for, so that they can be called with all kinds of values.

Signatures are read from the sources; this table says what they cannot: how large a buffer is and which values a number
may have. Only Python's own library is imported: a process under AddressSanitizer reads this, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parents[2] / "cuda"
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int64": 8, "uint8": 1}
DTYPES = ("float32", "bfloat16", "float16")  # in the order of their numbers
NOT_LAUNCHERS = {"error_text", "version", "architectures", "emulation_order"}


class Parameter(NamedTuple):
    """One of a C function's: its type without const, and whether it points to constants."""

    name: str
    type: str
    constant: bool


class Signature(NamedTuple):
    source: str
    result: str
    parameters: list[Parameter]


def signatures() -> dict[str, Signature]:
    """Every `extern "C"` function of cuda/*.cu by its name without the prefix."""
    found = {}
    pattern = re.compile(r'extern "C"\s+([\w\s*]+?)\b(\w+)\(([^)]*)\)\s*\{')
    for path in sorted(SOURCES.glob("*.cu")):
        text = re.sub(r"//.*", "", path.read_text())
        matches = list(pattern.finditer(text))
        assert len(matches) == text.count('extern "C"'), f"{path.name}: a function is declared in an unknown way"
        for match in matches:
            assert match[2].startswith("rwkvmpi_cuda_"), match[2]
            parameters = [_parameter(part) for part in match[3].split(",") if part.strip()]
            name = match[2].removeprefix("rwkvmpi_cuda_")
            found[name] = Signature(path.name, " ".join(match[1].split()), parameters)
    return found


def _parameter(text: str) -> Parameter:
    match = re.fullmatch(r"(const )?(\w+\*?) ?(\w*)", " ".join(text.split()))
    assert match, text
    return Parameter(match[3], match[2], bool(match[1]))


# A buffer is "TYPE elements", the elements a formula over the numbers; TYPE is one of ELEMENT_BYTES, or the name of the
# parameter that tells its dtype; ? after it: may be null. "ids" counts as a type, too: see buffer_type. A number is a
# tuple of its legal values; one more word before it in a tuple says what it is: "size" (an extent: may be cut short,
# must be refused when negative or enormous), "stride" (at least so large as the formula says), "kind" (an enumeration),
# "flag", "real", "dtype", "bytes" (of a buffer: as the formula says, or too few).
Kind = tuple[object, ...]
Value = str | Kind

TOKENS: Kind = ("size", 1, 2, 5, 17, 33, 50)
CHANNELS: Kind = ("size", 1, 3, 8, 24, 64, 72)
COUNT: Kind = ("size", 1, 7, 8, 100, 1000, 4099)
SEGMENTS: Kind = ("size", 0, 1, 2, 3)
HEADS: Kind = ("size", 1, 2)
HEAD_SIZE: Kind = ("size", 1, 8, 17, 40, 64, 64, 96)
BATCH: Kind = ("size", 1, 2)
DTYPE: Kind = ("dtype", 0, 1, 2)
REAL: Kind = ("real", 1e-5, 1.0, 64e-5)
ACTIVATION: Kind = ("kind", 0, 1, 2, 3)

_TC, _THN = "dtype tokens * channels", "dtype tokens * heads * n"
_HN, _STATE = "float32 heads * n", "float32 segments * heads * n * n"
_ROWS = "int32 2 * segments"
_ALONE = "float32 max(segments, 1) * heads * n * n"  # without rows there is one segment
_V6 = {
    "r": _THN, "k": _THN, "v": _THN, "w_lin": "dtype? tokens * heads * n", "time_decay": _HN, "u": _HN,
    "g": "dtype? tokens * heads * n", "ln_weight": _HN, "ln_bias": _HN, "h": _THN, "heads": HEADS, "n": HEAD_SIZE,
}  # fmt: skip
_V7 = {
    **dict.fromkeys(("r", "k", "v", "w_lin", "a_lin", "g", "h"), _THN),
    **dict.fromkeys(("v_lin", "v_first", "v_out"), "dtype? tokens * heads * n"),
    **dict.fromkeys(("w0", "a0", "k_k", "k_a", "r_k", "ln_weight", "ln_bias"), _HN),
    "v0": "float32? heads * n", "heads": HEADS, "n": HEAD_SIZE,
}  # fmt: skip
_BTHN, _BHNN = "dtype batch * tokens * heads * size", "float32 batch * heads * size * size"
_TRAIN = {
    **dict.fromkeys("rwkvab", _BTHN),
    "stored": "float32 batch * heads * ((tokens + every - 1) // every) * size * size",
    "batch": BATCH, "tokens": TOKENS, "heads": HEADS, "size": HEAD_SIZE, "every": ("loose", 16, 16, 16, 5),
    "body": ("kind", 0, 1, 2),
}  # fmt: skip
_TRAIN6 = {
    **dict.fromkeys("rwkv", _BTHN), "u": "float32 heads * size", "stored": _TRAIN["stored"], "batch": BATCH,
    "heads": HEADS, "size": HEAD_SIZE, "every": ("kind", 16),
}  # fmt: skip
_BTC, _B3C, _BC = "dtype batch * tokens * channels", "float32 batch * 3 * channels", "float32 batch * channels"
_TRAIN4 = {
    "k": _BTC, "v": _BTC, "w": "float32 channels", "u": "float32 channels",
    "stored": "float32 batch * ((tokens + every - 1) // every) * 3 * channels", "batch": BATCH, "every": ("kind", 16),
}  # fmt: skip
COMMON: dict[str, Value] = {
    "dtype": DTYPE, "eps": REAL, "scale": REAL, "op": ACTIVATION, "tokens": TOKENS, "channels": CHANNELS,
    "segments": SEGMENTS, "device": ("kind", 0), "stream": "uint8? 0",
}  # fmt: skip

# Only what COMMON does not say.
LAUNCHERS: dict[str, dict[str, Value]] = {
    "activate": {"x": "dtype count", "count": COUNT},
    "gated_add": {
        "x": "float32 rows * channels", "product": "dtype rows * channels", "gate": "dtype rows * channels",
        "rows": TOKENS,
    },
    "mix": {
        "out": "dtype rows * channels", "product": "dtype rows * channels", "u": "float32 rows * channels",
        "d": "float32 rows * channels", "weight": "float32 channels", "rows": TOKENS,
    },
    "all_finite": {"x": "dtype count", "flag": "int32 1", "count": COUNT},
    "convert": {
        "x": "from_dtype count", "out": "to_dtype count", "count": COUNT, "from_dtype": DTYPE, "to_dtype": DTYPE,
    },
    "mark_not_finite": {"x": "float32 segments * count", "flags": "int32 segments", "count": COUNT},
    "head_begin": {"running": "float32 4 * rows", "rows": TOKENS},
    "head_slice": {
        "logits": "dtype (rows - 1) * row_stride + n", "targets": "ids rows", "running": "float32 4 * rows",
        "rows": TOKENS, "n": ("size", 1, 8, 77, 700), "first_id": ("offset", 0, 8, 333), "row_stride": ("stride", "n"),
    },
    "head_end": {"running": "float32 4 * rows", "targets": "ids rows", "out": "float32 rows", "rows": TOKENS},
    "layer_norm": {
        "x": "float32 rows * channels", "weight": "float32 channels", "bias": "float32 channels",
        "out": "dtype rows * channels", "rows": TOKENS,
    },
    "embed": {
        "tokens": "ids count", "tokens64": ("flag", 0, 1), "table": "table_dtype vocabulary * channels",
        "table_dtype": DTYPE, "weight": "float32? channels", "bias": "float32? channels",
        "x": "float32 count * channels", "count": TOKENS, "vocabulary": ("size", 1, 5, 300),
    },
    "shift_mix": {
        "x": "float32 count * channels", "weight": "float32 channels", "bias": "float32 channels",
        "shift": "float32 (segments - 1) * shift_stride + channels", "mixes": "float32 mix_count * channels",
        "rows": _ROWS, "mixed": "dtype mix_count * count * channels", "u": "float32? count * channels",
        "d": "float32? count * channels", "shift_stride": ("stride", "channels"), "mix_count": ("size", 1, 2, 5, 6),
        "count": TOKENS,
    },
    "thin_product": {
        "x": "dtype (rows - 1) * x_stride + inputs", "w": "dtype outputs * inputs", "out": "result rows * outputs",
        "gate": "dtype? rows * outputs", "u": "float32? rows * outputs", "d": "float32? rows * outputs",
        "mix": "float32? outputs", "rows": ("size", 1, 2, 7, 16), "outputs": ("size", 1, 5, 16, 40, 130),
        "inputs": ("size", 1, 6, 8, 24, 64, 200), "x_stride": ("stride", "inputs"),
        "accumulate": ("kind", 0, 1, 2, 3, 4),
    },
    "v4_time_mix": {
        "r": _TC, "k": _TC, "v": _TC, "w": "float32 channels", "u": "float32 channels",
        "state": "float32 segments * 3 * channels", "rows": _ROWS, "h": _TC,
    },
    "wkv4": {
        "k": _TC, "v": _TC, "w": "float32 channels", "u": "float32 channels",
        "state_in": "float32 max(segments, 1) * 3 * channels", "state_out": "float32 max(segments, 1) * 3 * channels",
        "rows": "int32? 2 * segments", "y": _TC,
    },
    "v6_time_mix": {**_V6, "state": _STATE, "rows": _ROWS},
    "v6_step": {
        **{name: value.replace("tokens", "states") if isinstance(value, str) else value for name, value in _V6.items()},
        "state": "state_dtype states * heads * n * n", "state_dtype": ("dtype", 0, 2), "states": ("size", 1, 2, 3),
    },
    "wkv6": {
        **dict.fromkeys("rkvy", _THN), "w": "decay tokens * heads * n", "u": _HN, "state_in": _ALONE,
        "state_out": _ALONE, "rows": "int32? 2 * segments", "heads": HEADS, "n": HEAD_SIZE,
        "decay_per_head": ("flag", 0, 1),
    },
    "v7_time_mix": {
        **_V7, "state": _STATE, "rows": _ROWS, "scratch": "uint8? scratch_bytes", "body": ("kind", 0, 1, 2, 3),
        "scratch_bytes": ("bytes", "v7_time_mix_scratch"),
    },
    "v7_step": {
        **{name: value.replace("tokens", "batch") if isinstance(value, str) else value for name, value in _V7.items()},
        "state": "state_dtype batch * heads * n * n", "state_dtype": ("dtype", 0, 2), "batch": ("size", 1, 2, 3),
    },
    "wkv7": {
        **dict.fromkeys("rwkvaby", _THN), "state_in": _ALONE, "state_out": _ALONE, "rows": "int32? 2 * segments",
        "heads": HEADS, "n": HEAD_SIZE, "body": ("kind", 0, 1, 2),
    },
    "wkv4_train_forward": {**_TRAIN4, "state": _B3C, "y": _BTC, "last": _B3C},
    "wkv4_train_backward": {
        **_TRAIN4, **dict.fromkeys(("dy", "dk", "dv"), _BTC), "dw": _BC, "du": _BC, "dlast": _B3C, "dstate": _B3C,
    },
    "wkv6_train_forward": {**_TRAIN6, "state": _BHNN, "y": _BTHN, "last": _BHNN},
    "wkv6_train_backward": {
        **_TRAIN6, **dict.fromkeys(("dy", "dr", "dw", "dk", "dv"), _BTHN), "du": "float32 batch * heads * size",
        "dlast": _BHNN, "dstate": _BHNN,
    },
    "wkv7_train_forward": {**_TRAIN, "state": _BHNN, "y": _BTHN, "last": _BHNN},
    "wkv7_train_backward": {
        **_TRAIN, **dict.fromkeys(("dy", "dr", "dw", "dk", "dv", "da", "db"), _BTHN), "dlast": _BHNN, "dstate": _BHNN,
    },
}  # fmt: skip
# Functions that give a number of bytes and take what the launcher takes.
NUMBERS = {"v7_time_mix_scratch"}


def meaning(launcher: str, parameter: str) -> Value | None:
    """What the table says of a parameter; None if it does not know it."""
    return LAUNCHERS.get(launcher, {}).get(parameter, COMMON.get(parameter))


def buffer_type(launcher: str, word: str, numbers: Mapping[str, float]) -> str:
    """The element type of a buffer whose formula starts with `word`."""
    word = word.removesuffix("?")
    if word == "ids":
        return "int64" if numbers.get("tokens64", 1) else "int32"
    if word == "result":  # of a product: sums are float32
        word = "dtype" if numbers["accumulate"] in (0, 4) else "float32"
    if word == "decay":
        word = "float32" if numbers["decay_per_head"] else "dtype"
    if word in ELEMENT_BYTES:
        return word
    number = int(numbers[word])
    return DTYPES[number] if 0 <= number < len(DTYPES) else "float32"


def unknown() -> list[str]:
    """What the sources have and this table lacks, or the other way round, one sentence each."""
    found, sentences = signatures(), []
    for name, signature in found.items():
        if name in NOT_LAUNCHERS | NUMBERS:
            continue
        if name not in LAUNCHERS:
            sentences.append(f"{signature.source}: {name} is not in the table")
            continue
        for parameter in signature.parameters:
            value = meaning(name, parameter.name)
            if value is None or isinstance(value, str) != parameter.type.endswith("*"):
                sentences.append(f"{signature.source}: {name}: the table does not say what {parameter.name} is")
        stale = LAUNCHERS[name].keys() - {parameter.name for parameter in signature.parameters}
        sentences += [f"{name} has no parameter {parameter}" for parameter in sorted(stale)]
    sentences += [f"{name} is in the table, but in no source" for name in LAUNCHERS.keys() - found.keys()]
    return sentences
