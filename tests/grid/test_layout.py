"""Who owns what: every rank has one place, every layer one stage, and the planner's choice obeys its own model."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkvmpi.errors import UserError
from rwkvmpi.grid.layout import Grid, check_grid, split_layers
from rwkvmpi.grid.plan import Machine, Work, choose_grid, predict_seconds

small = st.integers(1, 6)


@given(small, small, small)
def test_every_rank_has_one_place(stages, ring, replicas):
    grid = Grid(stages, ring, replicas)
    places = [grid.place(rank) for rank in range(grid.size)]
    assert len(set(places)) == grid.size
    assert [grid.rank(place) for place in places] == list(range(grid.size))
    for replica in range(replicas):
        members = grid.members(replica)
        assert {grid.place(rank).replica for rank in members} == {replica}
        assert grid.source(replica) == members[0]


@given(st.integers(1, 61), st.data(), st.floats(0, 100))
def test_layers_are_split_once_and_no_stage_could_be_cheaper(n_layer, data, head_cost):
    stages = data.draw(st.integers(1, n_layer))
    bounds = split_layers(n_layer, stages, 1.0, head_cost)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == n_layer
    assert all(hi > lo for lo, hi in bounds)
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    cost = max([hi - lo for lo, hi in bounds[:-1]] + [bounds[-1][1] - bounds[-1][0] + head_cost])
    for last in range(1, n_layer - stages + 2):  # every other number of layers on the last stage, split evenly above
        if stages > 1:
            assert cost <= max(-(-(n_layer - last) // (stages - 1)), last + head_cost) + 1e-9


def test_a_dear_head_takes_layers_off_the_last_stage():
    assert split_layers(12, 2, 1.0, 0.0) == [(0, 6), (6, 12)]
    assert split_layers(12, 2, 1.0, 4.0) == [(0, 8), (8, 12)]


def test_a_grid_that_does_not_fit_is_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"--stages 5: the model has 4 layers"):
        check_grid(Grid(5, 1, 1), 5, 4)
    with pytest.raises(UserError, match=r"needs 4 ranks, but 3 were started; start mpirun -n 4"):
        check_grid(Grid(2, 2, 1), 3, 12)


def work(tokens):
    return Work(12, 15e6, 100e6, 200_000, 6144, 30_000_000, 100_000_000, 1024, np.array(tokens))


def test_the_planner_chooses_what_the_corpus_asks_for():
    machine = Machine()
    assert choose_grid(work([20_000] * 200), 4, machine) == Grid(1, 1, 4)  # many documents: one each
    one = choose_grid(work([5_000_000]), 4, machine)
    assert one.replicas == 1  # one document: all ranks on it
    assert one.size == 4
    assert predict_seconds(work([5_000_000]), one, machine) < 0.3 * predict_seconds(
        work([5_000_000]), Grid(1, 1, 1), machine
    )
    assert choose_grid(work([5_000_000]), 4, machine, memory_per_rank=2.9e8).stages > 1  # too large for one rank
    assert choose_grid(work([20_000] * 200), 6, machine, stages=3).stages == 3


@given(st.integers(1, 16), st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_any_world_gets_a_grid_of_its_size(world, tokens):
    grid = choose_grid(work(tokens), world, Machine())
    assert grid.size == world
    check_grid(grid, world, 12)


def test_layout_and_plan_do_not_load_torch():
    code = "import sys, rwkvmpi.grid.layout, rwkvmpi.grid.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
