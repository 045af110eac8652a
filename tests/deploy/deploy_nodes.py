"""Nodes to deploy to: network namespaces with a real sshd each (nodes_lab.sh), and deploy.sh run among them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAB = Path(__file__).with_name("nodes_lab.sh")
APART = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
HIDDEN = ("/home/", "/root/", "/tmp/", "/run/", "/var/tmp/")  # every node has its own
SSH_CONFIG = """Host *
  User root
  IdentityFile {folder}/key
  UserKnownHostsFile {folder}/known_hosts
"""


def why_not() -> str:
    """Why there can be no nodes here; empty where there can be."""
    programs = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "useradd", "runuser")
    lacking = [name for name in programs if shutil.which(name) is None]
    if not Path("/usr/sbin/sshd").exists():
        lacking.append("sshd (Debian's openssh-server)")
    if os.geteuid() != 0:
        return "only root can make nodes of network namespaces"
    if lacking:
        return f"no {', '.join(lacking)}"
    for place in (Path(sys.prefix), Path(sys.base_prefix)):
        closed = [path for path in (place, *place.parents) if not path.stat().st_mode & 0o001]
        if closed and not str(place).startswith(HIDDEN):
            return f"the nodes' account could not use this Python: {closed[0]} is closed to others"
    tried = subprocess.run(["unshare", *APART, "ip", "link", "add", "nodes", "type", "bridge"], capture_output=True)
    return "" if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.decode(errors='replace')}"


def copy_of_the_project(folder: Path) -> Path:
    """What is deployed must not change while a test deploys it again. Without git's folder, too."""
    for name in ("rwkvmpi", "scripts", "cuda"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    return folder


class Nodes:
    """So many nodes, n1, n2, ..., until close(). /mnt/shared on each is `folder`/shared."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.project = copy_of_the_project(folder / "project")
        kept = {Path(sys.prefix), Path(sys.base_prefix)}
        kept = {path for path in kept if str(path).startswith(HIDDEN)}
        command = ["unshare", *APART, str(LAB), str(folder), str(count), *map(str, sorted(kept))]
        with (folder / "lab.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not all((folder / f"ready/n{number + 1}").exists() for number in range(count)):
            assert self.process.poll() is None, self.words()
            assert time.monotonic() < deadline, self.words()
            time.sleep(0.05)
        (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        (folder / "shared").chmod(0o1777)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        self.inside = ["nsenter", "-t", children.split()[0], "-n", "-m", "-p"]

    def words(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("*.log"))

    def ssh(self, node: str, command: str, user: str = "root") -> str:
        """What a shell there prints, started as mpirun starts its own: neither a login's nor anybody's."""
        ssh = ["ssh", "-F", f"{self.folder}/ssh_config", "-o", "BatchMode=yes", "-l", user, node, command]
        done = subprocess.run([*self.inside, *ssh], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def deploy(self, hosts: str, *options: object, kill_at: str = "") -> subprocess.CompletedProcess[str]:
        """deploy.sh for these lines of a hostfile; killed as soon as it prints the words `kill_at`."""
        (self.folder / "hostfile").write_text(hosts)
        words = [str(self.project / "scripts/deploy.sh"), f"{self.folder}/hostfile", *map(str, options)]
        command = ["timeout", "600", *self.inside, *words, "--", "-F", f"{self.folder}/ssh_config"]
        printed = []
        pipe, together = subprocess.PIPE, subprocess.STDOUT
        with subprocess.Popen(command, stdout=pipe, stderr=together, text=True, start_new_session=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                printed.append(line)
                if kill_at and kill_at in line:
                    os.killpg(process.pid, signal.SIGKILL)  # ssh, too: as if this machine lost its power
                    break
        return subprocess.CompletedProcess(command, process.returncode, "".join(printed))

    def close(self) -> None:
        """The end of all processes and namespaces."""
        self.process.kill()
        self.process.wait()
