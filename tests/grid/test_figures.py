"""What was measured here: kept, found again by plan and --chunk auto, and never believed when somebody broke it."""

import json
import logging
import os
import time

import pytest

from rwkvmpi.config import DEFAULT_CHUNK, make_job
from rwkvmpi.errors import UserError
from rwkvmpi.grid import figures
from rwkvmpi.grid.plan import Machine
from rwkvmpi.models.random_weights import official_shape
from rwkvmpi.plan_report import describe, make_plan
from rwkvmpi.prepare import identity_path, resolve, resolve_chunk
from rwkvmpi.store.run_folder import RunFolder

RATES = {256: 900.0, 512: 1100.0, 1024: 1000.0, 2048: 1099.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def warnings(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("rwkvmpi"), "propagate", True)
    caplog.set_level(logging.INFO, logger="rwkvmpi")
    return lambda: [record.getMessage() for record in caplog.records]


def keep_chunks(rates, width=768, dtype="bfloat16", version="7"):
    figures.update(lambda known: figures.set_chunks(known, "cpu", dtype, 1, version, width, rates))


def choose(width=768, dtype="bfloat16", threads=1, version="7"):
    return figures.choose_chunk("cpu", dtype, threads, version, width)


def test_without_figures_there_are_the_defaults_and_no_words(warnings):
    assert figures.load_machine("cpu", "float32", 1) == Machine()
    choice = choose()
    assert choice.chunk == DEFAULT_CHUNK
    assert "nothing was measured here for RWKV-7 in bfloat16 with 1 thread (" in choice.reason
    assert warnings() == []


def test_the_later_measurement_wins_whoever_made_it():
    figures.note_speed("cpu", "int8", 2, flops=8e12, seconds=20.0)
    machine = figures.load_machine("cpu", "int8", 2)
    assert machine.flops_per_second == 4e11
    assert machine.speed_from.startswith("a finished run on ")
    figures.update(lambda known: figures.set_speed(known, "bench", "cpu", "int8", 2, 5e11))
    machine = figures.load_machine("cpu", "int8", 2)
    assert machine.flops_per_second == 5e11
    assert machine.speed_from == f"rwkvmpi bench on {os.uname().nodename}, {time.strftime('%Y-%m-%d')}"
    figures.note_speed("cpu", "int8", 2, flops=6e12, seconds=20.0)
    assert figures.load_machine("cpu", "int8", 2).flops_per_second == 3e11
    assert figures.load_machine("cpu", "int8", 1) == Machine()


def test_a_run_too_short_says_nothing(cache):
    figures.note_speed("cpu", "float32", 1, flops=1e12, seconds=figures.SHORTEST_RUN_S - 0.1)
    figures.note_speed("cpu", "float32", 1, flops=0.0, seconds=100.0)
    assert list(cache.iterdir()) == []


def test_measured_hops_replace_the_assumed_ones():
    figures.update(lambda known: figures.set_hop(known, "mpi", 3e-6, 2e10))
    machine = figures.load_machine("cpu", "float32", 1)
    assert (machine.hop_latency_s, machine.hop_bytes_per_second) == (3e-6, 2e10)
    assert machine.hop_from.endswith(", over mpi")
    assert machine.speed_from == ""


def latency_us(device="cpu", transport="auto"):
    return round(figures.load_machine(device, "bfloat16", 1, transport).hop_latency_s * 1e6)


def test_hops_are_those_of_the_transport_that_a_run_would_use(monkeypatch):
    for number, name in enumerate(("mpi", "mpi-device", "verbs"), 1):
        figures.update(lambda known, name=name, number=number: figures.set_hop(known, name, number * 1e-6, 1e9))
    assert [latency_us(), latency_us(transport="mpi"), latency_us(transport="verbs")] == [1, 1, 3]
    assert [latency_us("cuda"), latency_us("cuda", "mpi")] == [2, 2]
    monkeypatch.setenv("RWKVMPI_DEVICE_MPI", "0")
    assert latency_us("cuda") == 1
    figures.update(lambda known: figures.set_hop(known, "verbs", 3e-6, 1e9, between_nodes=True))
    assert [latency_us(), latency_us(transport="mpi")] == [3, 1]
    monkeypatch.setenv("OMPI_MCA_pml", "ucx")
    assert [latency_us(), latency_us(transport="verbs")] == [1, 3]


def test_verbs_never_go_by_the_figures_of_mpi():
    figures.update(lambda known: figures.set_hop(known, "mpi", 3e-6, 1e9))
    machine = figures.load_machine("cpu", "float32", 1, "verbs")
    assert (machine.hop_latency_s, machine.hop_from) == (Machine().hop_latency_s, "")


@pytest.mark.parametrize(
    ("rates", "chunk"),
    [
        (RATES, 2048),  # as fast as the fastest, and larger
        ({256: 900.0, 512: 1019.0, 1024: 1000.0}, 1024),  # not 2% faster
        ({256: 1021.0, 1024: 1000.0}, 256),
        ({512: 1100.0, 2048: 900.0}, 1024),  # nothing to compare with
    ],
)
def test_auto_takes_the_fastest_chunk_if_it_is_worth_it(rates, chunk):
    keep_chunks(rates)
    assert choose().chunk == chunk


def test_auto_goes_by_the_same_kind_of_rank_and_the_nearest_width():
    keep_chunks({512: 1100.0, 1024: 1000.0}, width=768)
    keep_chunks({2048: 1100.0, 1024: 1000.0}, width=4096)
    assert choose(width=1024).chunk == 512
    assert choose(width=2560).chunk == 2048
    assert choose(dtype="float32").chunk == choose(version="6").chunk == choose(threads=2).chunk == 1024


BROKEN = {
    "not JSON": b'{"speeds": ',
    "not an object": b"[1, 2]",
    "nested without end": b"[" * 100_000,
    "not UTF-8": b'{"speeds": {"\xff": 1}}',
    "a rate below zero": b'{"memory": {"1": {"source": "bench", "host": "h", "when": 1, "bytes_per_second": -1}}}',
    "a rate without end": b'{"memory": {"1": {"source": "bench", "host": "h", "when": 1, "bytes_per_second": 1e999}}}',
    "not a number": b'{"memory": {"1": {"source": "bench", "host": "h", "when": 1, "bytes_per_second": NaN}}}',
    "half an entry": b'{"hops": {"mpi": {"latency_s": 1e-6}}}',
    "an impossible chunk": b'{"chunks": {"k": {"source": "bench", "host": "h", "when": 1, "version": "7", "width": 64, '
    b'"tokens_per_second": {"100": 5.0}}}}',
    "too large": b" " * (figures.MOST_BYTES + 1),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_ignored_with_one_warning_and_replaced(content, warnings):
    path = figures.figures_path()
    path.parent.mkdir()
    path.write_bytes(content)
    assert figures.load_machine("cpu", "float32", 1) == Machine()
    assert choose().chunk == DEFAULT_CHUNK
    (warning,) = warnings()
    assert warning.startswith(f"{path} is not used: ")
    figures.note_speed("cpu", "float32", 1, flops=1e12, seconds=10.0)
    assert figures.load_machine("cpu", "float32", 1).flops_per_second == 1e11
    assert len(warnings()) == 1


def test_a_folder_in_the_place_of_the_file_troubles_nobody(warnings):
    figures.figures_path().mkdir(parents=True)
    assert figures.load_machine("cpu", "float32", 1) == Machine()
    assert figures.update(lambda known: figures.set_memory(known, 1, 1e9)) is None
    assert len(warnings()) == 1


def job(chunk, **model):
    found = make_job({"model": {"path": "bundled", "chunk": chunk, **model}, "input": {"paths": ["x"]}}, "here")
    resolve(found)
    return found


def resolved_chunk(folder, chunk="auto"):
    found = job(chunk, dtype="bfloat16")
    resolve_chunk(found, official_shape("7", "0.1B"), folder, 1)
    return found.model.chunk


def test_a_run_keeps_the_chunk_it_was_begun_with_whatever_is_measured_later(tmp_path, warnings):
    keep_chunks({512: 1100.0, 1024: 1000.0})
    run = RunFolder(tmp_path / "run")
    assert resolved_chunk(run.path) == 512
    run.create()
    identity_path(run).write_text(json.dumps({"chunk": 512}))
    keep_chunks({512: 900.0, 1024: 1000.0, 2048: 1200.0})
    assert resolved_chunk(run.path) == 512
    assert resolved_chunk(None) == 2048  # --force: a new run
    assert warnings()[1] == "--chunk auto is 512: as this run was begun"


def test_a_plan_says_what_it_rests_on():
    keep_chunks({512: 1100.0, 1024: 1000.0}, width=128, dtype="int8")
    options = {"dtype": "int8", "chunk": "auto"}
    plan = make_plan("bundled", [], ranks=2, task="score", threads=1, options=options)
    assert plan["chunk"] == 512
    assert "assumed; mpirun -n 2 rwkvmpi bench measures them" in describe(plan)
    assert "speed   " not in describe(plan)
    figures.update(lambda known: figures.set_speed(known, "bench", "cpu", "int8", 1, 5e11))
    figures.update(lambda known: figures.set_hop(known, "mpi", 3e-6, 2e10))
    plan = make_plan("bundled", [], ranks=2, task="score", threads=1, options=options)
    assert "speed       500 GFLOP/s of one rank: rwkvmpi bench on " in describe(plan)
    assert "hops        3 us + 20.0 GB/s: rwkvmpi bench on " in describe(plan)
    as_float = make_plan("bundled", [], ranks=2, task="score", threads=1, options={})
    assert plan["bytes_per_rank"][0] < as_float["bytes_per_rank"][0] / 2


def test_a_gpu_is_planned_as_one_and_never_with_a_cpus_figures():
    figures.update(lambda known: figures.set_speed(known, "run", "cpu", "bfloat16", 1, 1e11))
    plan = make_plan("bundled", [], ranks=2, task="score", threads=1, options={"device": "cuda"})
    assert plan["machine"]["flops_per_second"] > 1e14
    assert plan["machine"]["speed_from"] == ""
    with pytest.raises(UserError, match="on a GPU choose --dtype bfloat16"):
        make_plan("bundled", [], ranks=2, task="score", threads=1, options={"device": "cuda", "dtype": "int8"})


def test_the_same_command_resumes_although_another_chunk_is_faster_now(rwkvmpi, small_model, write_documents, tmp_path):
    keep_chunks({256: 1100.0, 1024: 1000.0}, width=64, dtype="float32")
    run = tmp_path / "run"
    command = ("read", small_model("7"), write_documents(tmp_path / "in", [700]), "-o", run, "--chunk", "auto")
    assert "--chunk auto is 256: 10% faster than 1,024 (rwkvmpi bench on " in rwkvmpi(*command).stderr
    assert "chunk = 256" in (run / "job.toml").read_text()
    keep_chunks({512: 1300.0, 1024: 1000.0}, width=64, dtype="float32")
    assert "is finished" in rwkvmpi(*command).stderr
    assert "chunk = 256, now it is 512" in rwkvmpi(*command[:-1], 512, code=2).stderr
    assert "--chunk auto is 512" in rwkvmpi(*command, "--force").stderr
    assert "chunk = 512" in (run / "job.toml").read_text()
