"""Whole models through the CUDA kernels, emulated, against the same models on the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import CASES, SMALL, Case, model_file

from rwkvmpi.errors import UserError
from rwkvmpi.models.chunk_reader import ChunkReader, ReplayingReader, make_reader
from rwkvmpi.models.model import Stage, load_model
from rwkvmpi.models.state import LayerState
from rwkvmpi.ops.cuda import library

LARGEST = {"float32": 1e-5, "bfloat16": 6e-2, "float16": 8e-3}  # of the largest logit
CHUNK = 256


def ids(case: Case, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, case.vocab_size, count)


def apart(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_logits_and_states_agree_with_the_cpu(case: Case, dtype: str, emulated_kernels: Path) -> None:
    """A prefill of 40 tokens, then three steps, of two states at once."""
    here = load_model(model_file(case))
    tokens = ids(case, 43)
    truth, end = here.forward(tokens)
    with library.emulated(emulated_kernels):
        there = load_model(model_file(case), "cuda", dtype)
        logits, state = there.forward(tokens[:40])
        assert apart(logits, truth[:40]) <= LARGEST[dtype]
        both = type(state).join([state, there.state()])
        for t in range(40, 43):
            stepped, both = there.step([tokens[t], tokens[0]], both)
            assert apart(stepped[0], truth[t]) <= LARGEST[dtype]
    for found, wanted in zip(both.segment(0).tensors(), end.tensors(), strict=True):
        assert apart(found, wanted) <= 4 * LARGEST[dtype]


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_a_float16_state_is_close_where_it_exists(version: str, kernels: ctypes.CDLL) -> None:
    case = SMALL[version]
    whole = load_model(model_file(case), "cuda", "float16")
    if version == "4":
        with pytest.raises(UserError, match="for RWKV-5 to 7"):
            whole.states(2, torch.float16)
        return
    exact, lossy = whole.states(2), whole.states(2, torch.float16)
    for token in ids(case, 6):
        truth, exact = whole.step([token, 1], exact)
        found, lossy = whole.step([token, 1], lossy)
    assert lossy.layers[0].wkv.dtype == torch.float16
    assert 0 < apart(found, truth) < 1e-2


def read_chunk(stage: Stage, reader: ChunkReader, tokens: np.ndarray, rows: np.ndarray) -> list[LayerState]:
    """The states of all layers after one chunk, copied."""
    reader.begin_tokens(tokens, rows).wait()
    states = []
    for item in range(len(stage.layers)):
        state = reader.state(item, len(rows))
        reader.read(item, state)
        assert not reader.look(item, state)
        states.append(LayerState(state.wkv[: len(rows)].clone(), state.shift[: len(rows)].clone()))
    ticket, broken = reader.verdict()
    ticket.wait()
    assert broken() == []
    return states


@pytest.mark.parametrize("version", ["4", "5.0", "6", "7"])
def test_neighbours_in_a_chunk_change_no_bit(version: str, kernels: ctypes.CDLL) -> None:
    """A document alone in its chunk and among others: the same states, and the same rows of x."""
    case = SMALL[version]
    stage = load_model(model_file(case), "cuda", "bfloat16").stage
    tokens = ids(case, CHUNK).astype(np.int32)
    alone, among = make_reader(stage, CHUNK), make_reader(stage, CHUNK)
    assert isinstance(alone, ReplayingReader)
    moved = np.roll(tokens, -96)
    one = read_chunk(stage, alone, moved, np.array([[0, 70]], dtype=np.int32))
    first_rows = alone.x[:70].clone()
    for _ in range(2):  # the second time from the graphs
        three = read_chunk(stage, among, tokens, np.array([[0, 64], [96, 70], [192, 33]], dtype=np.int32))
    assert torch.equal(among.x[96 : 96 + 70], first_rows)
    for small, large in zip(one, three, strict=True):
        assert torch.equal(small.wkv[0], large.wkv[1])
        assert torch.equal(small.shift[0], large.shift[1])


def test_a_chunk_may_hold_any_number_of_segments(kernels: ctypes.CDLL) -> None:
    """25 of them in 800 rows: there are graphs for powers of two, and segments of no rows."""
    case = SMALL["7"]
    stage = load_model(model_file(case), "cuda", "float32").stage
    tokens = ids(case, 800).astype(np.int32)
    reader = make_reader(stage, 800)
    for count in (1, 3, 25):
        rows = np.array([[32 * i, 7] for i in range(count)], dtype=np.int32)
        states = read_chunk(stage, reader, tokens, rows)
        last = read_chunk(stage, make_reader(stage, 800), np.roll(tokens, -32 * (count - 1)), rows[:1])
        assert all(torch.equal(a.wkv[count - 1], b.wkv[0]) for a, b in zip(states, last, strict=True))


def test_broken_states_are_named(kernels: ctypes.CDLL) -> None:
    case = SMALL["7"]
    stage = load_model(model_file(case), "cuda", "float32").stage
    reader = make_reader(stage, CHUNK)
    rows = np.array([[0, 40], [64, 50], [128, 9]], dtype=np.int32)
    reader.begin_tokens(ids(case, CHUNK).astype(np.int32), rows)
    for item in range(len(stage.layers)):
        state = reader.state(item, len(rows))
        if item == 2:
            state.wkv[1, 0, 0, 0] = torch.inf
        reader.read(item, state)
        assert reader.look(item, state) is None
    ticket, broken = reader.verdict()
    ticket.wait()
    assert (2, 1) in broken()
    assert all(segment == 1 for _, segment in broken())


def test_what_a_gpu_cannot_hold_is_refused(kernels: ctypes.CDLL) -> None:
    with pytest.raises(UserError, match="on a GPU choose --dtype bfloat16, float16 or float32"):
        load_model(model_file(SMALL["7"]), "cuda", "int8")
