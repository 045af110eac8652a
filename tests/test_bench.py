"""`rwkvmpi bench`: it counts what it claims to count, measures a small model for real, and others find its figures."""

import io
import itertools
import json

import pytest
import torch
from rich.console import Console

from rwkvmpi.bench import peak_flops, timing
from rwkvmpi.bench.hops import message_sizes
from rwkvmpi.bench.layers import layer_profile
from rwkvmpi.bench.measure import store
from rwkvmpi.bench.products import matrices
from rwkvmpi.bench.report import show
from rwkvmpi.bench.roofs import _peak, cold_bytes, last_cache_bytes
from rwkvmpi.bench.shapes import parse_shape, random_checkpoint, slice_of
from rwkvmpi.bench.timing import QUICK, Effort
from rwkvmpi.errors import UserError
from rwkvmpi.grid import figures
from rwkvmpi.models import cost
from rwkvmpi.models.model import Stage
from rwkvmpi.models.random_weights import make_shape
from rwkvmpi.ops import library
from rwkvmpi.ops.product import KINDS

SMALL = {"n_layer": 3, "n_embd": 64, "vocab_size": 256, "head_size": 32}
PEAKS = dict.fromkeys(KINDS, 1e12)


@pytest.mark.parametrize("variant", library.VARIANTS)
def test_the_peak_counts_every_round_and_thread(variant):
    if variant not in library.runnable():
        pytest.skip(f"this processor or build has no {variant}")
    with library.use(variant):
        for kind in KINDS.values():
            once = _peak(kind, 100, 1)
            assert once >= 100 * 2 * library.info()["lanes"]
            assert _peak(kind, 200, 1) == 2 * once
            assert _peak(kind, 100, 2) == 2 * once
        assert peak_flops("float32", effort=QUICK) > 1e8


def test_the_peak_of_no_dtype_is_refused():
    with pytest.raises(ValueError, match=r"float32, bfloat16, int8, but it is 'float16'"):
        peak_flops("float16")


def test_medians_take_turns_and_leave_the_first_round_out(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    order = []
    found = timing.medians({name: lambda name=name: order.append(name) for name in "ab"}, Effort(3.0, 4, 1e9))
    assert "".join(order) == "ab" * 5
    assert found == {"a": 1.0, "b": 1.0}
    order.clear()
    timing.medians({"a": lambda: order.append("a")}, Effort(100.0, 100, patience=0.0))
    assert len(order) == 1 + timing.FEWEST


@pytest.mark.parametrize(
    ("text", "version", "layers", "width"),
    [("0.1B", "7", 12, 768), ("768x5", "7", 5, 768), ("6:1.6B", "6", 24, 2048), ("4:128x3", "4", 3, 128)],
)
def test_shapes_by_name_and_by_size(text, version, layers, width):
    shape = parse_shape(text)
    assert (shape.version, shape.n_layer, shape.n_embd) == (version, layers, width)


@pytest.mark.parametrize("text", ["9B", "8:0.1B", "100x2", "0x3", "768", ""])
def test_impossible_shapes_are_refused(text):
    with pytest.raises(UserError):
        parse_shape(text)


def test_a_large_model_is_measured_by_a_few_of_its_layers():
    shape = parse_shape("1.5B")
    few = slice_of(shape, quick=True)
    assert 2 <= few.n_layer < shape.n_layer
    assert (few.n_embd, few.vocab_size, few.ranks) == (shape.n_embd, shape.vocab_size, shape.ranks)
    small = parse_shape("64x4")
    assert slice_of(small, quick=True) == small


def test_cold_weights_exceed_the_caches():
    assert 128 << 20 <= cold_bytes() <= cold_bytes(threads=4) <= 1 << 30
    assert cold_bytes() > min(2 * last_cache_bytes(), (1 << 30) - 1)


def test_the_messages_are_those_of_a_run():
    shape = make_shape("7", **SMALL)
    sizes = message_sizes(shape, 1024)
    assert sizes["state"] - cost.state_bytes(shape) == 32
    assert 1024 * cost.activation_bytes(shape) < sizes["activations"] < 1024 * cost.activation_bytes(shape) * 1.1


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_the_operators_of_a_layer_are_all_found(version, dtype):
    shape = make_shape(version, **SMALL)
    with random_checkpoint(shape) as checkpoint:
        stage = Stage(checkpoint, 0, shape.n_layer, dtype)
    profile = layer_profile(stage, 256, PEAKS, Effort(0.0, 3))
    products = [entry for entry in profile["operators"] if entry["flops_per_second"]]
    operations = sum(entry["flops_per_second"] * entry["seconds"] for entry in products)
    assert operations == pytest.approx(2 * 256 * cost.layer_weights(shape, 2)[0])
    found = {tuple(map(int, entry["operator"].split(",")[0].split()[1::2])) for entry in products}
    if version != "6":  # whose five low-rank matrices lie side by side in one tensor
        assert found == {(matrix.inputs, matrix.outputs) for matrix in matrices(shape)}
    assert {entry["operator"] for entry in profile["operators"]} - {entry["operator"] for entry in products}
    assert all(torch.isfinite(torch.tensor([entry["seconds"], entry["share"]])).all() for entry in products)


def test_a_quick_measurement_is_kept_and_used(rwkvmpi, small_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ("bench", small_model("7"), "--quick", "--dtype", "float32", "--chunks", "256,512", "--json")
    result = json.loads(rwkvmpi(*arguments).stdout)
    assert result["model"]["n_embd"] == 64
    assert [entry["chunk"] for entry in result["dtypes"]["float32"]["chunks"]] == [256, 512, 1024]
    assert [entry["batch"] for entry in result["dtypes"]["float32"]["steps"]] == [1, 4, 16, 64]
    assert result["hops"] == []
    kept = json.loads((tmp_path / "cache/rwkvmpi/figures.json").read_text())
    speed = result["dtypes"]["float32"]["flops_per_second"]
    assert kept["speeds"]["cpu float32 1"]["flops_per_second"] == speed
    assert kept["memory"]["1"]["bytes_per_second"] == result["roofs"]["memory_bytes_per_second"]
    plan = json.loads(rwkvmpi("plan", small_model("7"), "--chunk", "auto", "--json").stdout)
    assert plan["machine"]["flops_per_second"] == speed
    rates = {entry["chunk"]: entry["forward_tokens_per_second"] for entry in result["dtypes"]["float32"]["chunks"]}
    chosen = rates[plan["chunk"]] >= 0.995 * max(rates.values())
    assert chosen or plan["chunk"] == 1024
    assert ("nothing was measured" in plan["chunk_reason"]) == (result["machine"]["taken_by_others"] > 0.1)
    shown = io.StringIO()
    show(result, Console(file=shown, width=120))
    assert "float32: reading, all layers" in shown.getvalue()
    assert f"{result['dtypes']['float32']['flops_per_second'] / 1e9:,.0f} GFLOP/s in all" in shown.getvalue()


@pytest.mark.parametrize(("taken", "chunk"), [(0.05, 256), (0.15, 1024)])
def test_no_chunk_is_chosen_by_figures_of_a_busy_machine(taken, chunk, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates = [{"chunk": size, "forward_tokens_per_second": rate} for size, rate in ((256, 2.0), (1024, 1.0))]
    stored = store(
        {
            "machine": {"threads": 3, "taken_by_others": taken},
            "model": {"version": "6", "n_embd": 64},
            "roofs": {"memory_bytes_per_second": 1e9},
            "dtypes": {"int8": {"flops_per_second": 7e9, "chunks": rates}},
            "hops": [],
        }
    )
    assert stored == str(figures.figures_path())
    assert figures.choose_chunk("cpu", "int8", 3, "6", 64).chunk == chunk
    assert figures.load_machine("cpu", "int8", 3).flops_per_second == 7e9


@pytest.mark.parallel
def test_ranks_measure_their_hops(rwkvmpi, small_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ("bench", small_model("4"), "--quick", "--dtype", "bfloat16", "--chunks", "256", "--json")
    result = json.loads(rwkvmpi(*arguments, ranks=3).stdout)
    assert [hop["ranks"] for hop in result["hops"]] == [[0, 1], [1, 2]]
    assert all(hop["sizes"]["small"]["seconds"] > 0 for hop in result["hops"])
    slowest = max(result["hops"], key=lambda hop: hop["sizes"]["state"]["seconds"])
    plan = json.loads(rwkvmpi("plan", small_model("4"), "--ranks", 2, "--json").stdout)
    assert plan["machine"]["hop_latency_s"] == slowest["latency_s"]
    assert plan["machine"]["hop_bytes_per_second"] == slowest["bytes_per_second"]
