"""The verbs transport on a fabric in memory: what arrives is what was sent, and whatever goes wrong is a sentence."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verbs_stand_in import Comm, Fabric

from rwkvmpi.cluster.rdma import Gid, Port
from rwkvmpi.errors import FabricError, UserError
from rwkvmpi.grid.transport import Room, Terms
from rwkvmpi.grid.verbs import device, door, link, transport

GID = Gid(3, "0000:0000:0000:0000:0000:ffff:0a4d:0001", "RoCE v2", "eth7")
PORT = Port("mlx5_0", 1, "ACTIVE", "Ethernet", 100.0, 1024, "eth7", 0, "", (GID,))
ROOM = Room(64, 1000)


@pytest.fixture
def fabric(monkeypatch):
    return use_fabric(monkeypatch)


def use_fabric(monkeypatch):
    fabric = Fabric()
    modules = fabric.modules()
    monkeypatch.setattr(device, "pyverbs", lambda: modules)
    monkeypatch.setattr(transport, "require", lambda: None)
    monkeypatch.setattr(transport.rdma, "port_of_rank", lambda local_rank, gpu: PORT)
    monkeypatch.setattr(transport.rdma, "ports", lambda: [PORT])
    monkeypatch.setattr(transport.VerbsTransport, "compare_clocks", lambda self, comm, peers: None)
    return fabric


def pair(depths=(1,), deadline=2.0):
    """Two transports with channels of these depths from 0 to 1, not yet connected."""
    first = Comm()
    ends = [
        transport.VerbsTransport(comm, Terms(job=9, deadline_s=deadline, summed=True)) for comm in (first, Comm(first))
    ]
    for one in ends:
        one.terms.idle = lambda: [each.tick() for each in ends]  # both ranks poll in one thread
    senders = [ends[0].sender(1, tag, ROOM, depth, f"channel {tag}") for tag, depth in enumerate(depths)]
    receivers = [ends[1].receiver(0, tag, ROOM, depth, f"channel {tag}") for tag, depth in enumerate(depths)]
    return ends, senders, receivers


def together(*calls):
    """Each call in a thread of its own, as ranks do; what they raised."""
    errors = [None] * len(calls)

    def run(number, call):
        try:
            call()
        except Exception as error:
            errors[number] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return errors


def connected(depths=(1,), **options):
    ends, senders, receivers = pair(depths, **options)
    assert together(*(one.connect for one in ends)) == [None, None]
    return ends, senders, receivers


def send(sender, number, content):
    parcel = sender.buffer()
    parcel.head[:] = number % 256
    parcel.body[: len(content)] = content
    sender.send(number, len(content))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 1000)), max_size=60), st.integers(1, 9))
def test_everything_arrives_in_order_whoever_is_ahead(steps, spare):
    """Sends and receives in any order; few places in the send queue; at the end everything is given back."""
    with pytest.MonkeyPatch.context() as patch:
        fabric = use_fabric(patch)
        patch.setattr(link, "SPARE", spare + link.SIGNAL_EVERY)
        ends, senders, receivers = connected((1, 2, 4))
        random, expected, sent, taken = np.random.default_rng(1), {}, [0, 0, 0], [0, 0, 0]
        for channel, sending, nbytes in steps:
            if sending and senders[channel]._free():
                content = random.integers(0, 256, nbytes, dtype=np.uint8)
                expected[channel, sent[channel]] = content
                send(senders[channel], sent[channel], content)
                sent[channel] += 1
            elif taken[channel] < sent[channel]:
                take(receivers[channel], taken, channel, expected)
        for channel in range(3):
            while taken[channel] < sent[channel]:
                take(receivers[channel], taken, channel, expected)
            senders[channel].flush()
        assert together(*(one.close for one in ends)) == [None, None]
        assert (fabric.pairs, fabric.regions, fabric.queues) == ({}, {}, [])


def take(receiver, taken, channel, expected):
    parcel = receiver.wait(taken[channel])
    assert (parcel.head == taken[channel] % 256).all()
    assert np.array_equal(parcel.body, expected[channel, taken[channel]])
    receiver.release()
    taken[channel] += 1


def test_a_slot_is_not_written_before_it_is_released(fabric):
    ends, (sender,), (receiver,) = connected((2,))
    for number in range(4):  # two in slots, two in buffers
        send(sender, number, [number])
    assert not sender._free()
    ends[0].terms.deadline_s = 0.0
    with pytest.raises(FabricError, match="no sign of life"):
        sender.buffer()
    for number in range(4):
        assert receiver.wait(number).body.tolist() == [number]
        receiver.release()
    assert sender._free()


def test_a_damaged_byte_is_found(fabric):
    _, (sender,), (receiver,) = connected()
    send(sender, 0, [1, 2, 3])
    while not receiver._here():
        pass
    receiver._parcel()[2][1] ^= 4
    with pytest.raises(FabricError, match=r"channel 0.* was damaged"):
        receiver.wait(0)


def test_a_message_over_another_is_found(fabric):
    ends, (sender,), _ = connected()
    send(sender, 0, [1])
    sender._slot_full[0] = False  # as if the receiver had released it
    send(sender, 1, [2])
    with pytest.raises(FabricError, match="wrote over a message"):
        ends[1].wait(ends[1].progress, 0, "nothing")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_message_twice_or_too_few_is_found(fabric, change):
    _, (sender,), (receiver,) = connected((2,))
    send(sender, 0, [1])
    receiver.wait(0)
    receiver.release()
    sender._number += change
    send(sender, 1, [1])
    with pytest.raises(FabricError, match="twice" if change < 0 else "lost"):
        receiver.wait(1)


def test_a_dead_link_is_a_sentence_on_the_passive_side_too(fabric):
    ends, _, (receiver,) = connected()
    fabric.dead = True
    ends[1].terms.idle, ends[1]._next_beat = ends[1].tick, 0.0
    with pytest.raises(FabricError) as error:
        receiver.wait(0)  # it sends nothing but its signs of life
    for part in (
        "rank 1 on",
        "rank 0 on",
        "mlx5_0:1 (GID 3, 10.77.0.1)",
        "did not answer",
        "status 12",
        "doctor --fabric",
    ):
        assert part in str(error.value)


def test_a_silent_neighbour_is_waited_for_until_the_deadline(fabric):
    ends, _, (receiver,) = connected(deadline=0.2)
    ends[1].terms.idle = ends[1].tick  # and not the neighbour's
    with pytest.raises(FabricError, match="no sign of life"):
        receiver.wait(0)


@pytest.mark.parametrize(("number", "remedy"), [(110, "ping"), (101, "link is up"), (22, "RWKVMPI_RDMA_GID_INDEX")])
def test_who_cannot_connect_says_why_on_all_ranks(fabric, number, remedy):
    ends, _, _ = pair()
    fabric.refuses = number
    errors = together(*(one.connect for one in ends))
    assert str(errors[0]) == str(errors[1])
    assert isinstance(errors[1], UserError)
    assert remedy in str(errors[0])


def test_one_rank_without_a_port_stops_both(fabric, monkeypatch):
    ends, _, _ = pair()
    ends[1]._local_rank = 5

    def port_of_rank(local_rank, gpu):
        if local_rank == 5:
            raise UserError("no RDMA port is up")
        return PORT

    monkeypatch.setattr(transport.rdma, "port_of_rank", port_of_rank)
    errors = together(*(one.connect for one in ends))
    assert [type(error) for error in errors] == [UserError, UserError]
    assert str(errors[0]).startswith("rank 1 on ")
    assert "no RDMA port is up" in str(errors[0])


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(fabric):
    ends, _, _ = pair(deadline=0.1)
    (error,) = together(ends[0].connect)
    assert isinstance(error, FabricError)


def test_the_systems_pyverbs_is_found_alone(tmp_path, monkeypatch):
    suffix = door.importlib.machinery.EXTENSION_SUFFIXES[0]
    for name, text in (("__init__.py", "found = 1"), ("enums.py", "X = 5"), (f"device{suffix}", "")):
        (tmp_path / name).write_text(text)
    for name in [name for name in sys.modules if name.split(".")[0] == "pyverbs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(door.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(door, "SYSTEM_FOLDERS", (tmp_path / "none", tmp_path))
    path = list(sys.path)
    door._find_package()
    assert door._enums().X == 5
    assert sys.path == path
    for name in ("pyverbs", "pyverbs.enums"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(door, "SYSTEM_FOLDERS", (tmp_path / "none",))
    with pytest.raises(ImportError, match="apt install"):
        door._find_package()


def test_without_a_device_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(door.rdma, "ports", list)
    door.reason.cache_clear()
    assert "no RDMA device" in door.reason()
    with pytest.raises(UserError, match="--transport mpi"):
        door.require()
    door.reason.cache_clear()


def test_memory_that_may_not_be_locked_is_a_sentence(fabric, monkeypatch):
    ends, _, _ = pair()
    modules = fabric.modules()
    modules.mr = SimpleNamespace(MR=lambda *a, **k: (_ for _ in ()).throw(modules.pyverbs_error.PyverbsRDMAError(12)))
    monkeypatch.setattr(device, "pyverbs", lambda: modules)
    errors = together(*(one.connect for one in ends))
    assert "ulimit -l unlimited" in str(errors[0])
