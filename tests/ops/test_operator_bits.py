"""The laws that bit-identical results rest on: a row's bits do not depend on its place in the chunk, on what lies
around it, on where the document is cut, on the threads, or (with a hardware FMA) on the width of the registers."""

from __future__ import annotations

import pytest
import torch
from operator_cases import CASES, SEGMENT_CASES, Case, rows_of
from torch import Tensor

from rwkvmpi import ops
from rwkvmpi.ops import library

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_segment_case = pytest.mark.parametrize("case", SEGMENT_CASES, ids=lambda case: case.name)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def alone(case: Case, inputs: list[Tensor], state: Tensor) -> tuple[list[Tensor], Tensor]:
    out, after = case.run(inputs, state.unsqueeze(0), rows_of((0, inputs[0].shape[0])))
    return out, after[0]


@every_case
@pytest.mark.parametrize("length", [1, 31, 33, 70])
def test_place_and_neighbours(case: Case, length: int, isa: str, poisoned: None) -> None:
    document, state = case.inputs(length, generator(1)), case.state(generator(2))
    want, want_state = alone(case, document, state)
    chunk = case.inputs(320, generator(3))
    rows = rows_of((0, 40), (96, length), (192, 100))
    padding = torch.ones(320, dtype=torch.bool)
    for first, count in rows.tolist():
        padding[first : first + count] = False
    for whole, part in zip(chunk, document, strict=True):
        whole[padding] = torch.nan
        whole[96 : 96 + length] = part
    states = torch.stack([case.state(generator(4)), state, case.state(generator(5))])
    got, got_states = case.run(chunk, states, rows)
    for x, y in zip(got, want, strict=True):
        assert same(x[96 : 96 + length], y)
        assert not x[~padding].isnan().any()
        if case.zero_padding:
            assert same(x[padding], torch.zeros_like(x[padding]))
    assert same(got_states[1], want_state)
    assert not got_states.isnan().any()


@every_segment_case
@pytest.mark.parametrize("pieces", [[64, 96], [32] * 5, [1, 159], [128, 31, 1]])
def test_cut(case: Case, pieces: list[int], isa: str) -> None:
    document, state = case.inputs(160, generator(1)), case.state(generator(2))
    want, want_state = alone(case, document, state)
    got: list[list[Tensor]] = []
    begin = 0
    for count in pieces:
        out, state = alone(case, [x[begin : begin + count] for x in document], state)
        got.append(out)
        begin += count
    for parts, y in zip(zip(*got, strict=True), want, strict=True):
        assert same(torch.cat(parts), y)
    assert same(state, want_state)


@every_case
def test_threads(case: Case, isa: str) -> None:
    inputs = case.inputs(700, generator(1))  # enough values for three threads everywhere
    states = torch.stack([case.state(generator(2)), case.state(generator(3))])
    rows = rows_of((0, 500), (512, 150))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, after = case.run(inputs, states, rows)
        results.append([*out, after])
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


@every_case
def test_register_width(case: Case) -> None:
    """All builds with a hardware FMA agree."""
    inputs, state = case.inputs(50, generator(1)), case.state(generator(2))
    results = []
    for build in library.runnable()[1:]:
        with library.use(build):
            out, after = alone(case, inputs, state)
        results.append([*out, after])
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True)), library.runnable()


def test_single_tokens_of_many_documents(isa: str) -> None:
    """One row for each document, as in a step of generating text: the bits of the same tokens in one long chunk."""
    for case in SEGMENT_CASES:
        document, state = case.inputs(9, generator(1)), case.state(generator(2))
        want, want_state = alone(case, document, state)
        others = [case.inputs(9, generator(seed)) for seed in (3, 4)]
        states = torch.stack([case.state(generator(5)), state, case.state(generator(6))])
        for t in range(9):
            step = [torch.stack([a[t], b[t], c[t]]) for a, b, c in zip(others[0], document, others[1], strict=True)]
            got, states = case.run(step, states, rows_of((0, 1), (1, 1), (2, 1)))
            assert all(same(x[1], y[t]) for x, y in zip(got, want, strict=True)), case.name
        assert same(states[1], want_state), case.name


def test_callers_denormal_mode_changes_nothing(isa: str) -> None:
    case = next(case for case in SEGMENT_CASES if case.name == "wkv6")
    inputs, state = case.inputs(64, generator(1)), case.state(generator(2)) * 1e-30
    inputs = [inputs[0], inputs[1], inputs[2] * 1e-20, inputs[3] * 1e-18]
    want, want_state = alone(case, inputs, state)
    torch.set_flush_denormal(True)
    try:
        got, got_state = alone(case, inputs, state)
    finally:
        torch.set_flush_denormal(False)
    assert same(got[0], want[0])
    assert same(got_state, want_state)


def test_a_state_decays_to_zero_not_to_denormals(isa: str) -> None:
    still, half = torch.zeros(100, 1, 64), torch.full([100, 1, 64], 0.5)
    state = torch.full([1, 64, 64], 1e-25)
    _, after = ops.wkv6(still, half, still, still, torch.zeros(1, 64), state)
    assert not after.any()
