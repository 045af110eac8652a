"""deploy.sh on nodes with networks, homes and sshds of their own; mpirun across them gives one rank's result."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import deploy_nodes
import pytest
from deploy_nodes import Nodes

pytestmark = pytest.mark.parallel
HOSTS = "# of the laboratory\nn1 slots=1\nn2 slots=1  # the other\n"
# as on a cluster without the internet: what this Python has is a site's module, and the nodes have no compiler
SITE = ["--packages-of", sys.executable, "--offline", "--operators", "copy"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    if reason := deploy_nodes.why_not():
        pytest.skip(reason)
    made = Nodes(tmp_path_factory.mktemp("nodes"), 2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_model: Callable[[str], Path]) -> Path:
    """Some megabytes, so that a copy can be caught in its middle."""
    return small_model("7")


def results(printed: str) -> dict[str, str]:
    """The table at the end: each host's result."""
    rows = printed.partition("\nhost ")[2].splitlines()[1:]
    return {row.split()[0]: row.split()[1] for row in rows}


def test_each_node_is_set_up_and_mpirun_joins_them(nodes: Nodes, model: Path) -> None:
    """One host is nowhere, the first start is killed, and a third one finds nothing left to do."""
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    options = ["--user", "reader", *SITE, "--ssh-keys", "--model", model, "--model-sha256", digest]
    nodes.ssh("n2", "echo 'export MINE=kept' > /etc/skel/.bashrc")  # a site's own lines

    planned = nodes.deploy(HOSTS, *options, "--dry-run")
    assert planned.returncode == 0, planned.stdout
    assert "n1: would make the account reader" in planned.stdout
    assert "reader" not in nodes.ssh("n1", "cat /etc/passwd")

    hosts = HOSTS + "n9 slots=1\n"  # is nowhere
    nodes.deploy(hosts, *options, kill_at="n1: copied the project")
    done = nodes.deploy(hosts, *options)
    assert done.returncode == 1, done.stdout
    assert results(done.stdout) == {"n1": "changed", "n2": "changed", "n9": "failed"}, done.stdout
    assert "n1: made the account reader" not in done.stdout  # that was before the interruption
    assert f"n1: copied models/{model.name} (sha256 {digest[:12]})" in done.stdout
    assert "n1: mpirun rwkvmpi doctor across 2 nodes finds nothing wrong" in done.stdout
    assert digest in nodes.ssh("n2", f"sha256sum /home/reader/rwkvmpi/models/{model.name}")
    assert "MINE=kept" in nodes.ssh("n2", "cat /home/reader/.bashrc")
    reader = "runuser -u reader -- env -C /home/reader HOME=/home/reader"
    for shell in ("bash --login -c", "ssh -o BatchMode=yes n2"):  # a person's, and mpirun's
        assert "/home/reader/rwkvmpi/venv/bin/rwkvmpi" in nodes.ssh("n1", f"{reader} {shell} 'which rwkvmpi'")

    again = nodes.deploy(hosts, *options, "--no-mpirun")
    assert results(again.stdout) == {"n1": "unchanged", "n2": "unchanged", "n9": "failed"}, again.stdout


@pytest.mark.thorough
def test_one_installation_for_all(nodes: Nodes) -> None:
    """On a file system that both nodes see; deploy.sh itself compares mpirun's result with that of one rank."""
    before = nodes.ssh("n1", "cat /proc/net/dev | grep eth0").split()[9]
    alone = nodes.deploy(HOSTS, "--user", "reader", *SITE, "--ssh-keys", "--shared", "--prefix", "/home/reader/here")
    assert alone.returncode == 1
    assert "is not on a file system that both see" in alone.stdout
    prefix = "/mnt/shared/rwkvmpi"
    done = nodes.deploy(HOSTS, "--user", "reader", *SITE, "--ssh-keys", "--shared", "--prefix", prefix)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("copied the project") == 1
    assert "mpirun across 2 nodes gives the result of one rank" in done.stdout
    after = nodes.ssh("n1", "cat /proc/net/dev | grep eth0").split()[9]
    assert int(after) - int(before) > 1_000_000  # the ranks' messages went over the wire


def test_what_deploy_did_not_make_stays(nodes: Nodes) -> None:
    nodes.ssh("n1", "mkdir -p /home/mine && echo mine > /home/mine/file")
    done = nodes.deploy("n1\n", *SITE, "--prefix", "/home/mine")
    assert done.returncode == 1
    assert "was not made by deploy.sh" in done.stdout
    assert nodes.ssh("n1", "ls -A /home/mine").split() == ["file"]
