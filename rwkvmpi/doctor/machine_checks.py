"""The doctor's checks of the machine and of the installation; none of them needs torch or MPI."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rwkvmpi import __version__
from rwkvmpi.cluster import affinity
from rwkvmpi.cluster.launcher import launch_facts, slurm_job_id, slurm_seconds_left
from rwkvmpi.cluster.logs import duration
from rwkvmpi.doctor.diagnosis import Finding

NEEDED = ("numpy", "h5py", "pydantic", "click", "rich", "zstandard", "pyarrow", "tokenizers", "pyrwkv_tokenizer")
FREE_ENOUGH = 2 << 30
SHARED_MEMORY_ENOUGH = 256 << 20
SLOW_FSYNC_S = 0.5
HUGE_SHARED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def python() -> Iterator[Finding]:
    """Which Python and which rwkvmpi these are: a look at where they lie settles many a riddle."""
    value = f"{platform.python_version()}, rwkvmpi {__version__} in {Path(__file__).parents[1]}"
    yield Finding("python", "ok", value)


def packages() -> Iterator[Finding]:
    """The packages that the program imports are there."""
    found, missing = [], []
    for name in NEEDED:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Finding("packages", "fail", f"missing: {', '.join(missing)}", "install rwkvmpi again: pip install .")
    else:
        yield Finding("packages", "ok", ", ".join(found))


def processor() -> Iterator[Finding]:
    """Cores that may be used, by whose word, and whether the threads asked for fit them."""
    facts = launch_facts()
    cores, threads = affinity.cores_available(), affinity.threads_per_rank()
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    value = "; ".join([processor_name(), *affinity.describe(threads)[:2]])
    ranks = facts.local_size
    # a launcher that binds leaves each rank its own cores; one that does not leaves them all the same ones
    if chosen and threads > cores:
        remedy = f"unset OMP_NUM_THREADS (now {chosen}) or set it to at most {cores}"
        yield Finding("processor", "warn", value, remedy)
    elif ranks > (os.cpu_count() or 1):
        yield Finding("processor", "warn", value, "start at most one rank per core; more are correct but slower")
    else:
        yield Finding("processor", "ok", value)


def shared_memory() -> Iterator[Finding]:
    """/dev/shm is how ranks of one node exchange messages; containers often come with 64 MB of it. The weights that
    ranks share need no room there, but may lie on huge pages where the kernel allows them for shared memory."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        yield Finding("shared memory", "warn", "/dev/shm is missing", "mount a tmpfs there; MPI is slow without it")
        return
    value = f"/dev/shm has {usage.free >> 20:,} MiB free of {usage.total >> 20:,}"
    try:  # always within_size [advise] never deny force
        value += f", huge pages {HUGE_SHARED.read_text().partition('[')[2].partition(']')[0]}"
    except OSError:
        value += ", no huge pages"
    if usage.free < SHARED_MEMORY_ENOUGH:
        yield Finding("shared memory", "warn", value, "give a container more, for instance docker run --shm-size=1g")
    else:
        yield Finding("shared memory", "ok", value)


def run_folder(folder: Path) -> Iterator[Finding]:
    """The file system of the run: space, and that write, fsync, rename and lock work as commits need them."""
    if not folder.exists():
        remedy = f"create {folder}"
        yield Finding("folder", "fail", f"{folder} does not exist", remedy, lambda: folder.mkdir(parents=True))
        return
    if not folder.is_dir():
        yield Finding("folder", "fail", f"{folder} is not a folder", "name a folder with --folder")
        return
    free = shutil.disk_usage(folder).free
    try:
        seconds = _commit_like(folder)
    except OSError as error:
        value = f"{folder}: writing, fsync, rename or lock failed ({error.strerror or error})"
        yield Finding("folder", "fail", value, "use a folder on a file system that you may write to and that has locks")
        return
    value = f"{folder}: {free / 2**30:,.1f} GiB free, one commit's writing takes {1000 * seconds:.0f} ms"
    if free < FREE_ENOUGH:
        yield Finding("folder", "warn", value, "results of long texts need room: about 8 bytes per token; make some")
    elif seconds > SLOW_FSYNC_S:
        yield Finding("folder", "warn", value, "the disk is slow or busy; commit less often: --commit-every 600")
    else:
        yield Finding("folder", "ok", value)


def hdf5(folder: Path) -> Iterator[Finding]:
    """h5py writes and reads back with checksums, in memory as shards are built."""
    import h5py
    import numpy as np

    data = np.arange(1000, dtype=np.float32)
    with h5py.File("doctor.h5", "w", driver="core", backing_store=False) as file:
        file.create_dataset("x", data=data, chunks=(100,), fletcher32=True)
        good = np.array_equal(file["x"][:], data)
    value = f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
    if good:
        yield Finding("hdf5", "ok", value)
    else:
        yield Finding("hdf5", "fail", f"{value}: data read back differs", "pip install --force-reinstall h5py")


def slurm() -> Iterator[Finding]:
    """The Slurm job around this process, if there is one."""
    job = slurm_job_id()
    if job is None:
        here = "no job around this process" if shutil.which("sbatch") else "not on this machine"
        yield Finding("slurm", "ok", here)
        return
    left = slurm_seconds_left()
    end = f"{duration(left)} left" if left is not None else "its end is not told"
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    value = f"job {job} on {os.environ.get('SLURM_JOB_NODELIST', '?')}, {end}, restarted {restarts} times"
    if left is None:
        yield Finding("slurm", "warn", value, "give --max-time, or let the batch script send SIGUSR1 before the end")
    else:
        yield Finding("slurm", "ok", value)


def _commit_like(folder: Path) -> float:
    """Seconds of one commit's writing: 4 MiB to a temporary file, fsync, lock, rename, fsync of the folder."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
        path = Path(scratch) / "file.tmp"
        with path.open("wb") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(os.urandom(4 << 20))
            file.flush()
            os.fsync(file.fileno())
        path.rename(path.with_suffix(""))
        handle = os.open(scratch, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return time.perf_counter() - start


def processor_name() -> str:
    """The processor's name as its maker gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.machine()
