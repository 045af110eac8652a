"""What the program sees of two RoCE v2 ports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rwkvmpi.cluster import rdma
from rwkvmpi.errors import UserError
from rwkvmpi.grid.verbs import door


def test_both_ports_are_found_with_the_address_to_use():
    found = rdma.ports()
    assert [port.name for port in found] == ["rxe0:1", "rxe1:1"]
    for number, port in enumerate(found):
        assert (port.state, port.link_layer, port.active_mtu) == ("ACTIVE", "Ethernet", 4096)
        gid = port.best_gid()
        assert gid is not None
        assert (gid.index, gid.kind, str(gid.ip)) == (1, "RoCE v2", f"10.77.0.{number + 1}")
    assert door.reason() == ""


def test_a_port_that_is_down_is_not_chosen(cable):
    cable.down("v0")
    assert [port.name for port in rdma.ports() if port.active] == ["rxe1:1"]
    assert rdma.choose_port(rdma.ports(), local_rank=0).name == "rxe1:1"
    with pytest.raises(UserError, match="mlx5_7:1"):
        rdma.choose_port(rdma.ports(), local_rank=0, wanted="mlx5_7:1")


@pytest.mark.thorough
def test_the_doctor_names_ports_and_settings():
    done = subprocess.run(
        [sys.executable, "-m", "rwkvmpi", "doctor", "--fabric", "--emit", "env"],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    assert "rxe0:1" in done.stdout + done.stderr
    assert "GID_INDEX=1" in done.stdout


@pytest.mark.thorough
def test_the_doctor_reports_ports_as_json():
    done = subprocess.run(
        [sys.executable, "-m", "rwkvmpi", "doctor", "--fabric", "--json"],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert "rxe1:1" in json.dumps(json.loads(done.stdout))
