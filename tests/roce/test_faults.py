"""Parcels between two ranks over the ports while something happens: the right bytes, or an error in time, for ever."""

from __future__ import annotations

import re
import signal
import time

import pytest

LIMIT_S = 150.0  # the laboratory's processors are slow
SENTENCE = re.compile(r"rank \d.*neighbour rank \d.*rxe\d:1.*; (look|set|see|use)", re.DOTALL)
thorough = pytest.mark.thorough


def until(ready, pair, what):
    """Wait for a condition; fails with what the ranks said when it does not come."""
    end = time.monotonic() + LIMIT_S
    while not ready():
        assert time.monotonic() < end, f"{what}: {pair.complaints}"
        time.sleep(0.02)


def end_of(pair):
    """mpirun's exit code and what the ranks said."""
    until(lambda: pair.code is not None, pair, "still running after the limit")
    return pair.code, pair.ended()


def assert_right(pair):
    code, ranks = end_of(pair)
    assert code == 0, pair.complaints
    assert [rank["outcome"] for rank in ranks] == ["ok", "ok"]


def assert_error(pair):
    """Somebody said what is wrong and where, mpirun ended with 75, and no byte was wrong."""
    code, ranks = end_of(pair)
    assert code == 75, (code, pair.complaints)
    told = [rank["error"] for rank in ranks if rank["outcome"] == "FabricError"]
    assert told, ranks
    assert all(SENTENCE.search(sentence) for sentence in told), told


@pytest.mark.parametrize("transport", ["verbs", "mpi"])
def test_parcels_go_by_the_ports_even_where_packets_are_lost(transport, start_pair, cable):
    cable.loss(1)
    before = cable.counters()
    pair = start_pair(transport)
    assert_right(pair)
    after = cable.counters()
    nbytes = sum(rank["bytes"] for rank in pair.ended())
    sent = sum(after[port]["sent_pkts"] - before[port]["sent_pkts"] for port in after)
    assert sent > nbytes / 4096
    assert all(after[port]["sent_pkts"] > before[port]["sent_pkts"] for port in after)


@thorough
def test_mpi_in_shared_memory_sends_nothing_over_the_ports(start_pair, cable):
    before = cable.packets()
    assert_right(start_pair("mpi", environment={"ROCE_MPI": "local"}))
    assert cable.packets() == before


@thorough
@pytest.mark.parametrize("transport", ["verbs", "mpi"])
@pytest.mark.parametrize("fault", ["10% loss", "20 ms delay", "peer stopped for 2 s"])
def test_what_heals_or_slows_down_ends_in_the_right_result(transport, fault, start_pair, cable):
    pair = start_pair(transport)
    until(pair.ready, pair, "not connected")
    if "loss" in fault:
        cable.loss(10)
    elif "delay" in fault:
        cable.delay(20)
    else:
        pair.signal(1, signal.SIGSTOP)
        time.sleep(2)
        pair.signal(1, signal.SIGCONT)
    assert_right(pair)


FOR_EVER = {"rounds": 100_000}


@pytest.mark.parametrize("transport", ["verbs", pytest.param("mpi", marks=thorough)])
def test_a_black_hole_is_an_error_in_time(transport, start_pair, cable):
    pair = start_pair(transport, **FOR_EVER)
    until(pair.ready, pair, "not connected")
    cable.hole()
    struck = time.monotonic()
    assert_error(pair)
    assert time.monotonic() - struck < 60


@thorough
@pytest.mark.parametrize("end", ["v0", "v1"])
def test_a_black_hole_one_way_is_seen_by_both_sides(end, start_pair, cable):
    pair = start_pair("verbs", **FOR_EVER)
    until(pair.ready, pair, "not connected")
    cable.hole(end)
    assert_error(pair)


@thorough
@pytest.mark.parametrize("seconds", [1, 5, 30])
def test_a_link_that_goes_down_is_right_or_an_error(seconds, start_pair, cable):
    pair = start_pair("verbs", rounds=200)
    until(pair.ready, pair, "not connected")
    cable.down()
    end = time.monotonic() + seconds
    while pair.code is None and time.monotonic() < end:
        time.sleep(0.05)
    cable.up()
    code, ranks = end_of(pair)
    assert code in (0, 75), pair.complaints
    told = [rank["error"] for rank in ranks if rank["outcome"] == "FabricError"]
    assert code == 0 or (told and all(SENTENCE.search(sentence) for sentence in told)), ranks


@thorough
@pytest.mark.parametrize("transport", ["verbs", "mpi"])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_neighbour_does_not_leave_the_other_waiting(transport, number, start_pair):
    pair = start_pair(transport, **FOR_EVER)
    until(pair.ready, pair, "not connected")
    pair.signal(1, number)
    if number == signal.SIGSTOP:  # mpirun cannot end a stopped rank until it goes on
        until(lambda: pair.alive() in ([], [1]), pair, "rank 0 waits for a stopped neighbour")
        pair.signal(1, signal.SIGKILL)
        assert SENTENCE.search(pair.complaints)
    code, _ = end_of(pair)
    assert code not in (None, 0)


@thorough
def test_what_cannot_work_is_said_before_anything_is_sent(start_pair):
    pair = start_pair("verbs", environment={"RWKVMPI_RDMA_GID_INDEX": "200"})
    code, _ = end_of(pair)
    assert code == 2
    assert "has no GID of index 200" in pair.complaints
    pair = start_pair("verbs", environment={"RWKVMPI_RDMA_GID_INDEX": "0"})  # link-local: works on one cable only
    code, _ = end_of(pair)
    assert code in (0, 2)


@thorough
def test_ports_of_different_mtu_agree_on_the_smaller(start_pair, cable):
    cable.mtu(1500, "v1")
    assert_right(start_pair("verbs"))


@thorough
def test_a_switch_that_drops_long_packets_is_named_at_the_start(start_pair, cable):
    cable.narrow(1500)
    pair = start_pair("verbs")
    code, _ = end_of(pair)
    assert code == 2
    assert "MTU" in pair.complaints
