"""Wrong arguments are refused with a sentence, and torch knows the operators."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from operator_cases import C1, C2, CASES, CHANNELS, MIXES, R_K, Case, rows_of

from rwkvmpi import ops
from rwkvmpi.errors import UserError
from rwkvmpi.ops import library

GOOD = torch.zeros(64, 2, 8)
STATE = torch.zeros(1, 2, 8, 8)
X = torch.zeros(64, CHANNELS)
HEADS_STATE = torch.zeros(1, 3, 40, 40)
ALL, TWO = rows_of((0, 64)), rows_of((0, 3), (4, 5))

WRONG: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (TypeError, "wkv7: w must be float32, but it is bfloat16", lambda: wkv7(w=GOOD.bfloat16())),
    (ValueError, r"wkv7: k must have shape \[64, 2, 8\], but it has \[32, 2, 8\]", lambda: wkv7(k=GOOD[:32])),
    (ValueError, "wkv7: v must be contiguous", lambda: wkv7(v=torch.zeros(64, 8, 2).transpose(1, 2))),
    (ValueError, r"wkv7: state must have shape \[1, 2, 8, 8\]", lambda: wkv7(state=torch.zeros(2, 8, 8))),
    (TypeError, "wkv7: rows must be int32", lambda: wkv7(rows=torch.zeros(1, 2))),
    (ValueError, "within the 64 rows", lambda: wkv7(rows=rows_of((40, 25)))),
    (ValueError, "count >= 1", lambda: wkv7(rows=rows_of((40, 0)))),
    (ValueError, "begin at row 10", lambda: wkv7(rows=rows_of((0, 10), (9, 3)), state=torch.zeros(2, 2, 8, 8))),
    (
        ValueError,
        "head size must be 1 to 512",
        lambda: ops.wkv7(*[torch.zeros(1, 1, 513)] * 6, torch.zeros(1, 513, 513)),
    ),
    (ValueError, r"wkv5: w must have shape \[2, 8\]", lambda: ops.wkv5(*[GOOD] * 4, GOOD[0], STATE[0])),
    (ValueError, r"wkv4: state must have shape \[3, 120\]", lambda: ops.wkv4(X, X, C1, C2, X[:2].contiguous())),
    (ValueError, "within the 64 rows", lambda: ops.shift_mix(X, C1, C2, X[:1], MIXES, rows_of((60, 9)))),
    (ValueError, r"shift must have shape \[1, 120\]", lambda: ops.shift_mix(X, C1, C2, X[:2], MIXES, ALL)),
    (ValueError, "shift must be contiguous", lambda: ops.shift_mix(X, C1, C2, X[:1].expand(2, -1), MIXES, TWO)),
    (
        ValueError,
        "shift must be contiguous",
        lambda: ops.shift_pair(X, C1, C2, torch.zeros(CHANNELS, 2).t(), MIXES, TWO),
    ),
    (TypeError, "layer_norm: out_dtype must be", lambda: ops.layer_norm(X, C1, C2, 1e-5, torch.float16)),
    (
        ValueError,
        "shift_mix: mixes must have shape",
        lambda: ops.shift_mix(X, C1, C2, X[:1], MIXES[:, :8].clone(), ALL),
    ),
    (TypeError, "embed: tokens must be int32 or int64", lambda: ops.embed(X[0], X)),
    (ValueError, "embed: weight and bias belong together", lambda: ops.embed(torch.zeros(1, dtype=torch.int32), X, C1)),
    (TypeError, "v7_time_mix: a_lin must be float32", lambda: v7_time_mix(a_lin=X.bfloat16())),
    (ValueError, r"v7_time_mix: g must have shape \[64, 120\]", lambda: v7_time_mix(g=X[:3])),
    (ValueError, r"v7_time_mix: k_a must have shape \[120\]", lambda: v7_time_mix(k_a=C1[:5])),
    (ValueError, "v7_time_mix: v_first needs v_lin and v0", lambda: v7_time_mix(v_lin=None)),
    (ValueError, r"v7_time_mix: state must have shape \[1, 3, 40, 40\]", lambda: v7_time_mix(state=STATE)),
    (ValueError, "v7_time_mix: 120 channels do not divide into 7 heads", lambda: v7_time_mix(r_k=torch.zeros(7, 8))),
    (ValueError, r"v7_time_mix: r_k must have shape \[3, 40\]", lambda: v7_time_mix(r_k=torch.zeros(3, 8))),
    (ValueError, "v7_time_mix: rows.* within the 64 rows", lambda: v7_time_mix(rows=rows_of((1, 64)))),
    (TypeError, "v7_time_mix: out_dtype must be", lambda: v7_time_mix(out_dtype=torch.float64)),
    (
        ValueError,
        r"v6_time_mix: time_decay must have shape \[120\]",
        lambda: ops.v6_time_mix(X, X, X, X, R_K, R_K, X, C1, C2, HEADS_STATE, ALL),
    ),
    (
        ValueError,
        r"v5_time_mix: w must have shape \[3, 40\]",
        lambda: ops.v5_time_mix(X, X, X, C1, R_K, None, C1, C2, HEADS_STATE, ALL),
    ),
    (
        ValueError,
        r"v4_time_mix: state must have shape \[1, 3, 120\]",
        lambda: ops.v4_time_mix(X, X, X, C1, C2, X[:3], ALL),
    ),
    (
        ValueError,
        "fold_rows: rows 60 to 70",
        lambda: ops.fold_rows(torch.zeros(CHANNELS, dtype=torch.float64), X, 60, 10),
    ),
    (TypeError, "fold_rows: acc must be float64", lambda: ops.fold_rows(torch.zeros(CHANNELS), X, 0, 1)),
]


def wkv7(**changed: torch.Tensor) -> object:
    arguments = dict.fromkeys("rwkvab", GOOD) | {"state": STATE, "rows": rows_of((0, 64))} | changed
    return ops.wkv7(**arguments)


def v7_time_mix(**changed: object) -> object:
    arguments = dict.fromkeys(["r", "k", "v", "w_lin", "a_lin", "v_lin", "g", "v_first"], X)
    arguments |= dict.fromkeys(["w0", "a0", "v0", "k_k", "k_a", "ln_weight", "ln_bias"], C1)
    return ops.v7_time_mix(**arguments | {"r_k": R_K, "state": HEADS_STATE, "rows": ALL} | changed)  # type: ignore


@pytest.mark.parametrize(("error", "words", "call"), WRONG, ids=[words for _, words, _ in WRONG])
def test_wrong_arguments(error: type[Exception], words: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shapes_without_data(case: Case) -> None:
    """On the meta device every operator gives outputs of the shapes and dtypes that it gives on the CPU."""
    g = torch.Generator().manual_seed(1)
    inputs, states, rows = case.inputs(64, g), torch.stack([case.state(g), case.state(g)]), rows_of((0, 32), (32, 20))
    out, after = case.run(inputs, states, rows)
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_out, fake_after = case.run(
            [mode.from_tensor(x) for x in inputs], mode.from_tensor(states), mode.from_tensor(rows)
        )
    for real, fake in zip([*out, after], [*fake_out, fake_after], strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)


def test_torchs_own_checks_of_the_registration() -> None:
    x, tail = torch.randn(32, CHANNELS), (64e-5, torch.bfloat16)
    for operator, arguments in [
        (torch.ops.rwkvmpi.wkv7, (*[torch.rand(32, 2, 8)] * 6, torch.zeros(1, 2, 8, 8), rows_of((0, 32)))),
        (torch.ops.rwkvmpi.layer_norm, (x, C1, C2, 1e-5, torch.bfloat16)),
        (torch.ops.rwkvmpi.fold_rows, (torch.zeros(CHANNELS, dtype=torch.float64), x, 0, 3)),
        (torch.ops.rwkvmpi.shift_mix, (x, C1, C2, x[:1].clone(), MIXES, rows_of((0, 9)), torch.bfloat16)),
        (torch.ops.rwkvmpi.shift_pair, (x, C1, C2, x[:1].clone(), MIXES, rows_of((0, 9)), torch.float32)),
        (torch.ops.rwkvmpi.embed, (torch.tensor([3, 5]), x, C1, C2)),
        (
            torch.ops.rwkvmpi.v7_time_mix,
            (*[x] * 5, None, x, None, C1, C1, None, C1, C1, R_K, C1, C1, HEADS_STATE.clone(), rows_of((0, 9)), *tail),
        ),
        (
            torch.ops.rwkvmpi.v6_time_mix,
            (x, x, x, x, C1, R_K, None, C1, C1, HEADS_STATE.clone(), rows_of((0, 32)), 64e-5, torch.float32),
        ),
        (
            torch.ops.rwkvmpi.v5_time_mix,
            (x, x, x, R_K.sigmoid(), R_K, x, C1, C1, HEADS_STATE.clone(), rows_of((0, 32)), 64e-5, torch.float32),
        ),
        (torch.ops.rwkvmpi.v4_time_mix, (x, x, x, C1, C2, torch.ones(1, 3, CHANNELS), rows_of((2, 9)), torch.float32)),
    ]:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_info_and_choice() -> None:
    info = library.info()
    assert info["isa"] in library.runnable()
    assert str(info["path"]).endswith(f"_cpu_{info['isa']}.so")
    with pytest.raises(UserError, match="cannot run here"), library.use("neon"):
        pass


@pytest.mark.parametrize(("wanted", "answer"), [("portable", "portable"), ("sse9", "RWKVMPI_ISA is 'sse9'")])
def test_forced_choice(wanted: str, answer: str) -> None:
    code = (
        "from rwkvmpi.ops import library\n"
        "try: print(library.info()['isa'])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = os.environ | {"RWKVMPI_ISA": wanted, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert answer in done.stdout, done.stderr
