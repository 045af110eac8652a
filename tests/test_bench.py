"""`rwkvmpi bench`: it counts what it claims to count, measures a small model for real, and others find its figures."""

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import launching
import pytest
import torch
from rich.console import Console

from rwkvmpi.bench import peak_flops, perftest, timing
from rwkvmpi.bench.hops import message_rooms
from rwkvmpi.bench.layers import layer_profile
from rwkvmpi.bench.measure import store
from rwkvmpi.bench.products import matrices
from rwkvmpi.bench.report import show, show_fabric
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
    rooms = message_rooms(shape, 1024)
    assert (rooms["state"].head, rooms["state"].body) == (0, cost.state_bytes(shape))
    assert rooms["activations"].body == 1024 * cost.activation_bytes(shape)
    assert rooms["activations"].nbytes < 1024 * cost.activation_bytes(shape) * 1.1


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


@pytest.mark.parallel
def test_the_fabric_is_measured_and_kept_for_plan(rwkvmpi, small_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = json.loads(rwkvmpi("bench", small_model("7"), "--fabric", "--quick", "--json", ranks=2).stdout)
    (hop,) = result["transports"]["mpi"]
    assert hop["ranks"] == [0, 1]
    assert list(hop["sizes"]) == ["64 B", "4 KiB", "64 KiB", "1 MiB", "state", "activations"]
    assert hop["sizes"]["1 MiB"]["bytes"] == (1 << 20) + 64
    names = {"mpi", "mpi-device", "verbs", "perftest"}
    assert {*result["transports"], *result["absent"]} | ({"perftest"} if result["perftest"] else set()) == names
    assert all(result["absent"].values())
    kept = json.loads((tmp_path / "cache/rwkvmpi/figures.json").read_text())["hops"]
    assert set(kept) == set(result["transports"])
    assert kept["mpi"]["latency_s"] == hop["latency_s"]


def test_one_rank_has_no_fabric(rwkvmpi):
    assert "mpirun -n 2 rwkvmpi bench --fabric" in rwkvmpi("bench", "--fabric", code=2).stderr


LATENCY_TABLE = """
                    RDMA_Write Latency Test
 TX depth        : 1
 GID index       : 1
---------------------------------------------------------------------------------------
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec]
 64      1000          1.48           9.49         1.53     	       1.54        	0.13   		1.70    		9.49
---------------------------------------------------------------------------------------
"""  # noqa: E501
BANDWIDTH_TABLE = """
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
 1048576    64             97.00              96.00 		   0.011444
"""


def test_the_tables_of_perftest_are_read():
    assert perftest.typical_seconds(LATENCY_TABLE) == pytest.approx(1.53e-6)
    assert perftest.bytes_per_second(BANDWIDTH_TABLE) == 12e9
    with pytest.raises(ValueError, match="it measured inf"):
        perftest.typical_seconds(LATENCY_TABLE.replace(" 1.53 ", " inf "))
    with pytest.raises(ValueError, match="no table"):
        perftest.typical_seconds("Couldn't connect to node7:18515")


PERFTEST = """#!{python}
# plays both programs: the server listens late, the client fails until then
import os, socket, sys, time
*_, port, host = sys.argv if not sys.argv[-1].isdigit() else [*sys.argv, None]
if host is None:
    time.sleep(0.5)
    socket.create_server(("127.0.0.1", int(port))).accept()
    sys.exit()
assert sys.argv[sys.argv.index("-x") + 1] == "1", sys.argv
try:
    socket.create_connection((host, int(port)))
except OSError:
    sys.exit(f"Couldn't connect to {{host}}:{{port}}")
print({table!r} if {works} else "Failed to modify QP to RTR")
sys.exit(not {works})
"""


@pytest.mark.parallel
@pytest.mark.parametrize("works", [True, False])
def test_perftest_is_run_between_two_ranks(works, tmp_path):
    for name, table in ((perftest.LATENCY, LATENCY_TABLE), (perftest.BANDWIDTH, BANDWIDTH_TABLE)):
        path = tmp_path / name
        path.write_text(PERFTEST.format(python=sys.executable, table=table, works=works))
        path.chmod(0o755)
    program = Path(__file__).parent / "perftest_program.py"
    done = subprocess.run(
        [launching.mpirun(), "-n", "2", sys.executable, program],
        env=launching.environment(PATH=f"{tmp_path}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pairs, failed = json.loads(done.stdout)
    assert [pair["ranks"] for pair in pairs] == [[0, 1]]
    assert pairs[0]["ports"] == ["rxe0:1", "rxe1:1"]
    if works:
        assert failed == ""
        entry = {"seconds": pytest.approx(1.53e-6), "bytes_per_second": 12e9}
        assert pairs[0]["sizes"] == {"64 B": {"bytes": 64, **entry}, "1 MiB": {"bytes": 1 << 20, **entry}}
        shown = io.StringIO()
        found = {"ranks": 2, "mpi": "MPI", "device": "cpu", "transports": {}, "perftest": pairs, "absent": {}}
        model = {"version": "7", "n_embd": 768, "chunk": 1024}
        show_fabric({**found, "model": model, "stored": None}, Console(file=shown, width=120))
        assert ["1", "MiB", "1,048,576", "1.5", "12.00"] in [line.split() for line in shown.getvalue().splitlines()]
    else:
        assert pairs[0]["sizes"] == {}
        assert failed.startswith("between ranks 0 and 1 ib_write_lat failed: exit code 1, Failed to modify QP to RTR")
