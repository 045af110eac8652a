"""Cores: how many this process may use, how many threads are its share, and keeping each rank on its own.

Too many threads are worse than too few: ranks that each start a thread per core of the node fight for them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from rwkvmpi.cluster.launcher import LaunchFacts, launch_facts, launcher_ancestors

CGROUP = Path("/sys/fs/cgroup")
CPUS = Path("/sys/devices/system/cpu")
PIN_SWITCH = "RWKVMPI_PIN_THREADS"
_remembered: frozenset[int] | None = None  # see remember_mask


def cores_available(environ: Mapping[str, str] | None = None) -> int:
    """Physical cores that this process may use: its affinity mask, cut by a cgroup's quota and by Slurm's word.

    Hardware threads of one core count once: matrix products gain nothing from the second.
    """
    env = os.environ if environ is None else environ
    limits = [physical_cores(rank_mask())]
    quota = cgroup_quota()
    if quota is not None:
        limits.append(max(1, int(quota)))
    if env.get("SLURM_CPUS_PER_TASK", "").isdigit() and launch_facts(env).launcher == "slurm":
        limits.append(max(1, int(env["SLURM_CPUS_PER_TASK"])))
    return min(limits)


def threads_per_rank(local_size: int | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Threads for this rank: OMP_NUM_THREADS where it is set, else the rank's share of its node's cores, at least 1.

    A launcher that binds ranks has already divided the cores; one that does not leaves all ranks of a node the same
    mask, which its daemon has too. So the share is the smaller of the own mask and the daemon's divided by the ranks.
    """
    env = os.environ if environ is None else environ
    chosen = env.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if chosen.isdigit() and int(chosen) > 0:
        return int(chosen)
    facts = launch_facts(env)
    ranks_here = max(1, facts.local_size if local_size is None else local_size)
    own = cores_available(env)
    if facts.launcher == "slurm" and env.get("SLURM_CPUS_PER_TASK", "").isdigit():
        return own
    node = [_allocation_cores()]
    quota = cgroup_quota()
    if quota is not None:
        node.append(max(1, int(quota)))
    if env.get("SLURM_CPUS_ON_NODE", "").isdigit():
        node.append(int(env["SLURM_CPUS_ON_NODE"]))
    return max(1, min(own, min(node) // ranks_here))


def pin(threads: int | None = None, environ: Mapping[str, str] | None = None) -> set[int] | None:
    """Bind this rank to its own cores; returns them, or None where nothing was changed.

    Only where it cannot do harm: several ranks share one unbound mask, there are enough cores for all of them, and
    Slurm says that every core of the mask belongs to this job. On a machine shared with strangers a fixed choice
    of cores would pile all jobs onto the first ones. Call it before torch starts its threads.
    """
    env = os.environ if environ is None else environ
    facts = launch_facts(env)
    mask = sorted(rank_mask())
    if facts.local_size < 2 or env.get("SLURM_CPUS_ON_NODE", "") != str(len(mask)):
        return None
    if len(mask) != len(_allocation_mask()):
        return None
    cpus = own_slice(core_groups(mask), facts, threads or threads_per_rank(environ=env))
    if cpus:
        for thread in _threads_of_this_process():  # MPI's too
            with contextlib.suppress(OSError):  # it has just ended
                os.sched_setaffinity(thread, cpus)
    return cpus


def rank_mask() -> set[int]:
    """The hardware threads that this process may use, also while its main thread is bound to one core of them."""
    return os.sched_getaffinity(0) if _remembered is None else set(_remembered)


def remember_mask(mask: set[int] | None) -> None:
    """What `rank_mask` gives from now on, whatever becomes of the calling thread's own mask; None: that one again."""
    global _remembered
    _remembered = None if mask is None else frozenset(mask)


def is_own_mask(environ: Mapping[str, str] | None = None) -> bool:
    """Whether somebody has set this process's hardware threads aside for it, or for ranks of its job alone.

    The launcher, `taskset` or `pin`: they leave it fewer than the process that started it has. Slurm, when every core
    of the mask belongs to the job. Or the user's word: RWKVMPI_PIN_THREADS=1 says they are, 0 that they are not.
    """
    env = os.environ if environ is None else environ
    if env.get(PIN_SWITCH) in ("0", "1"):
        return env[PIN_SWITCH] == "1"
    mask = rank_mask()
    by_hand = launch_facts(env).launcher == "none"
    return mask < _mask_of([os.getppid()] if by_hand else launcher_ancestors()[::-1]) or (
        env.get("SLURM_CPUS_ON_NODE", "") == str(len(mask))
    )


def describe(threads: int | None = None) -> list[str]:
    """Cores and threads of this process in three lines: what it may use and who says so, its share, where the threads
    are bound. `threads`: how many it starts; None: the rank's share."""
    from rwkvmpi.cluster import pinning

    facts, mask, quota = launch_facts(), rank_mask(), cgroup_quota()
    ranks = f"{facts.local_size} rank{'s' if facts.local_size > 1 else ''} on this node"
    return [
        f"{physical_cores(mask)} cores in the mask ({shown(mask)} of {os.cpu_count()} hardware threads), "
        f"{'no quota' if quota is None else f'a quota of {quota:g} CPUs'}, {slurm_word() or 'no word of Slurm'}",
        f"{ranks}, threads per rank: {threads or threads_per_rank()}",
        pinning.described(),
    ]


def slurm_word(environ: Mapping[str, str] | None = None) -> str:
    """What Slurm's variables say about cores: 'SLURM_CPUS_PER_TASK=4, SLURM_CPUS_ON_NODE=16'; '' outside a job."""
    env = os.environ if environ is None else environ
    names = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")
    return ", ".join(f"{name}={env[name]}" for name in names if name in env)


def shown(cpus: Collection[int]) -> str:
    """Hardware threads as taskset takes them: 0-3,8."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1][1:] = [cpu]
        else:
            parts.append([cpu])
    return ",".join("-".join(map(str, part)) for part in parts)


def own_slice(groups: list[list[int]], facts: LaunchFacts, threads: int) -> set[int] | None:
    """The hardware threads of this rank's cores, neighbours in the list; None when there are too few for all."""
    if facts.local_size * threads > len(groups):
        return None
    first = facts.local_rank * threads
    return {cpu for group in groups[first : first + threads] for cpu in group}


def physical_cores(cpus: Collection[int]) -> int:
    """Number of cores behind these hardware threads."""
    return max(1, len(core_groups(sorted(cpus))))


def core_groups(cpus: list[int]) -> list[list[int]]:
    """Hardware threads grouped by core, cores in order of their package and first thread."""
    groups: dict[tuple[str, str], list[int]] = {}
    for cpu in cpus:
        topology = CPUS / f"cpu{cpu}" / "topology"
        package = _read(topology / "physical_package_id") or "0"
        core = _read(topology / "core_id") or f"cpu{cpu}"
        groups.setdefault((package, core), []).append(cpu)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], groups[key][0]))]


def cgroup_quota(root: Path = CGROUP, process: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs that the cgroups allow on average (cpu.max of version 2, cfs_quota of version 1); None without a limit."""
    limits = []
    for line in (_read(process) or "").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            folder = root / path.lstrip("/")
            while folder == root or root in folder.parents:
                limits.append(_ratio((_read(folder / "cpu.max") or "").split()))
                folder = folder.parent
        elif "cpu" in controllers.split(","):
            folder = root / controllers / path.lstrip("/")
            limits.append(_ratio([_read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]))
    numbers = [limit for limit in limits if limit is not None]
    return min(numbers) if numbers else None


def _ratio(quota_period: list[str]) -> float | None:
    try:
        quota, period = (float(text) for text in quota_period)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _allocation_mask() -> set[int]:
    """The cores of the launcher's daemon on this node, before it bound the ranks."""
    return _mask_of(launcher_ancestors()[::-1])


def _mask_of(processes: Iterable[int]) -> set[int]:
    """The mask of the first of these processes that can be asked; else this one's."""
    for pid in processes:
        with contextlib.suppress(OSError):
            return os.sched_getaffinity(pid)
    return rank_mask()


def _allocation_cores() -> int:
    return physical_cores(_allocation_mask())


def _threads_of_this_process() -> list[int]:
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/proc/self/task")]
    return [0]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
