"""Whether MPI can be given a GPU's memory: found out before a run does so, for a wrong setting ends the process.

An MPI library that knows nothing of GPUs takes their addresses for the host's and dies in a copy; no process can catch
that and live on. The library's own word is not enough either way: Open MPI answers for itself, not for the UCX below,
and a library built for CUDA still dies where its UCX finds no transport for it. So there are three steps, each of
which may say no, and only the last one could hurt a job:

1. Signs, read without touching anything: the library's word, or a transport for GPUs among the libraries it loaded.
   Without any, nothing is tried; that is the usual case.
2. A trial in a child on every node: `mpirun -n 2` of its own where there is one (it takes over the settings of the
   job's), else one process that sends to itself, which works under every launcher. A crash is the child's.
3. A trial between all neighbours in the job itself, for only that takes the ways between the nodes: small, odd and
   large messages, their bytes compared. A marker lies in the run's folder meanwhile, and a crash ends the job as one
   that was stopped: the same command goes on, finds the marker, and with the same settings does not try again.

Who is told no sends through the host's memory, which always works.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rwkvmpi.cluster import mpi
from rwkvmpi.cluster.launcher import launch_facts
from rwkvmpi.errors import FabricError

if TYPE_CHECKING:
    from rwkvmpi.models.device import Device

MARKER = "device-memory.trial"
SIZES = (64, 8200, (1 << 20) + 40)  # bytes: within one packet, two protocols on, and by rendezvous; odd ends
TRIAL_TAG = 4000
TRIAL_LIMIT_S = 30.0
CHILD_LIMIT_S = 60.0
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)
OVERSUBSCRIBE = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# What a launcher tells its ranks; a child that inherits it would take itself for one of them. Settings of the library
# (OMPI_MCA_..., UCX_...) stay.
_PLACES = re.compile(
    r"(PMIX?_|SLURM_|PALS_|HYDRA_|HYDI_|MPI_LOCAL|PRTE_LAUNCHED|PRTE_SHARED_FS|OMPI_(?!MCA_|ALLOW_)|OMPI_MCA_num_procs"
    r"|OMPI_MCA_initial_wdir|OMPI_MCA_PREFIXES|OMPI_MCA_(ess|orte)_)"
)
_SETTINGS = re.compile(r"(UCX_|OMPI_MCA_|MPICH_|MPIR_|FI_|LD_PRELOAD$|LD_LIBRARY_PATH$|MPI4PY_|CUDA_VISIBLE_DEVICES$)")
_UCX_CUDA = re.compile(r"libuct_(cuda\w*)\b")


class Signs(NamedTuple):
    """What MPI shows of GPUs without being tried."""

    library_says: bool | None  # None: the library has no such question
    transports: str  # modules for CUDA that it has loaded, "" if none

    @property
    def against(self) -> str:
        """Why there is no point in trying; "" if there is."""
        if self.library_says or self.transports:
            return ""
        says = "it says so itself" if self.library_says is False else "it cannot be asked"
        return f"MPI does not know of GPUs ({says}, and no transport of UCX for CUDA is loaded)"


class Probe(NamedTuple):
    """What a trial in a child found. ranks: 2, 1 if it sent to itself, 0 if nothing was tried."""

    works: bool
    library_says: bool | None
    transports: str
    ranks: int
    reason: str  # "" if it works, else one sentence


def probe_between_neighbours(comm: Any, device: Device, neighbours: Iterable[int], folder: Path | None = None) -> str:
    """ "" if this device's memory travels between all neighbours through MPI, else the reason, the same on all ranks.

    Collective over `comm`; whoever is a rank's neighbour has that rank as its own. folder: the run's, for the marker.
    FabricError when a message does not come at all; then too the next start does not try again.
    """
    if device.target.type != "cpu":  # the emulation's memory is the host's
        if why := _first(comm, signs().against):
            return why
        if why := _first(comm, in_child().reason if launch_facts().local_rank == 0 else ""):
            return why
    marker = _Marker(folder) if folder is not None and comm.rank == 0 else None
    why = _first(comm, marker.set() if marker is not None else "")
    if why:
        return why
    with _crashes_end_as_stopped():
        why = _first(comm, _exchange(comm, device, sorted(set(neighbours) - {comm.rank})))
    if marker is not None:
        marker.remove()
    return why


def in_child(first_gpu: int = 0, command: Sequence[str] | None = None) -> Probe:
    """Try it in processes that may die of it. command: the program of one rank, for tests."""
    own = [sys.executable, "-m", "rwkvmpi.cluster.device_probe", str(first_gpu)]
    ranks = list(own if command is None else command)
    program = _mpirun()
    environment = {name: value for name, value in os.environ.items() if not _PLACES.match(name)}
    environment |= OVERSUBSCRIBE | AS_ROOT
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [program, "-n", "2", *ranks] if program else ranks,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHILD_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        why = f"a trial with a GPU's memory did not end within {CHILD_LIMIT_S:.0f} s"
        return Probe(False, None, "", 0, why)
    said: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                said |= json.loads(line)
    found = Signs(said.get("library_says"), said.get("transports", ""))
    if done.returncode == 0 and said.get("moved"):
        return Probe(True, *found, said["ranks"], "")
    if "reason" in said:
        return Probe(False, *found, said.get("ranks", 0), said["reason"])
    return Probe(False, *found, said.get("ranks", 0), _end_of_child(done))


def signs() -> Signs:
    """What the MPI library of this process shows; it must have been started."""
    mapped = _mapped()
    word: bool | None = None
    for path in mapped:
        if not re.match(r"libmpi(_abi)?\.so", Path(path).name):
            continue
        with contextlib.suppress(OSError, AttributeError):
            word = bool(ctypes.CDLL(path).MPIX_Query_cuda_support())
            break
    modules = {match[1] for path in mapped if (match := _UCX_CUDA.search(Path(path).name))}
    modules |= {"gtl_cuda" for path in mapped if "libmpi_gtl_cuda" in path}
    return Signs(word, ", ".join(sorted(modules)))


def memory_at(address: int, nbytes: int) -> Any:
    """Memory of a device as MPI takes it: an object with an address and a size, which is never looked into."""
    return (ctypes.c_ubyte * nbytes).from_address(address)


def pattern(source: int, nbytes: int) -> np.ndarray:
    """uint8 [nbytes] that `source` sends in a trial."""
    return np.random.default_rng([source, nbytes]).integers(0, 256, nbytes, dtype=np.uint8)


def _exchange(comm: Any, device: Device, neighbours: list[int]) -> str:
    """Send to and receive from every neighbour; "" if all bytes came right."""
    out = {size: device.message_memory(size) for size in SIZES}
    into = {(peer, size): device.message_memory(size) for peer in neighbours for size in SIZES}
    for size, memory in out.items():
        device.copy((device.upload(pattern(comm.rank, size)), memory)).wait()
    for memory in into.values():
        memory.zero_()
    device.ticket().wait()
    requests = [
        comm.Irecv(memory_at(memory.data_ptr(), size), source=peer, tag=TRIAL_TAG + SIZES.index(size))
        for (peer, size), memory in into.items()
    ]
    comm.Barrier()  # all receives are posted: what comes, comes into the device's memory
    for peer in neighbours:
        for number, size in enumerate(SIZES):
            requests.append(comm.Isend(memory_at(out[size].data_ptr(), size), dest=peer, tag=TRIAL_TAG + number))
    _complete(requests, comm.rank)
    for (peer, size), memory in into.items():
        found = np.empty(size, dtype=np.uint8)
        device.fetch((memory, found)).wait()
        if not np.array_equal(found, pattern(peer, size)):
            return f"of {size} bytes that rank {peer} sent from its GPU's memory, rank {comm.rank} received others"
    return ""


def _complete(requests: list[Any], rank: int) -> None:
    deadline = time.monotonic() + TRIAL_LIMIT_S
    while requests:
        requests = [request for request in requests if not request.Test()]
        if requests and time.monotonic() > deadline:
            raise FabricError(
                f"rank {rank}: a GPU's memory was given to MPI for a trial, and {len(requests)} messages did not come "
                f"within {TRIAL_LIMIT_S:.0f} s; the same command again will send through the host's memory"
            )


@contextlib.contextmanager
def _crashes_end_as_stopped() -> Iterator[None]:
    """Within, a crash in a library is a sentence and the exit code of a stopped run.

    The handler is Python called from a signal: nothing to build upon, but the thread is inside a call of MPI, which
    has let go of the interpreter, and where it fails the process ends as it would have anyway.
    """
    sentence = (
        f"rwkvmpi: rank {launch_facts().rank} on {platform.node()}: the MPI library crashed over a GPU's memory in the "
        "trial between neighbours; the same command goes on from the last commit, through the host's memory\n"
    ).encode()

    def leave(_number: int) -> None:
        os.write(2, sentence)
        os._exit(mpi.EXIT_STOPPED)

    handler, libc = ctypes.CFUNCTYPE(None, ctypes.c_int)(leave), ctypes.CDLL(None)
    before = {number: ctypes.create_string_buffer(256) for number in CRASHES}  # larger than any struct sigaction
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    for number, action in before.items():
        libc.sigaction(number, None, action)
        libc.signal(number, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        for number, action in before.items():
            libc.sigaction(number, action, None)


def _first(comm: Any, reason: str) -> str:
    """The reason of the first rank that has one, on all ranks."""
    return next(filter(None, comm.allgather(reason)), "")


class _Marker:
    """The file that lies in the run's folder during the trial in the job."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / MARKER
        found = {name: value for name, value in os.environ.items() if _SETTINGS.match(name)}
        text = json.dumps([mpi.library_version(), sorted(found.items())])
        self._settings = hashlib.sha256(text.encode()).hexdigest()

    def set(self) -> str:
        """Lay it there; or the reason, where one lay there already that was laid with these settings."""
        with contextlib.suppress(OSError):
            if self._path.read_text().split()[-1:] == [self._settings]:
                return (
                    "the last start ended while a GPU's memory was given to MPI for a trial, with the same settings "
                    f"(remove {self._path} to try again)"
                )
        text = f"A GPU's memory is given to MPI for a trial; if this file stays, that ended the job. {self._settings}\n"
        try:
            with open(self._path, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return f"no marker for the trial could be left in {self._path.parent} ({error.strerror})"
        return ""

    def remove(self) -> None:
        """The trial is over, and everybody lives."""
        self._path.unlink(missing_ok=True)


def _mpirun() -> str | None:
    """The mpirun beside this Python (which a wheel brings with the library), or the one on PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def _end_of_child(done: subprocess.CompletedProcess[str]) -> str:
    code = done.returncode
    words = done.stdout + done.stderr
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number == signal.SIGSEGV or "Segmentation fault" in words or "signal 11" in words:
        return "the MPI library crashed over a GPU's address (segmentation fault, in a child process)"
    last = next((line.strip() for line in reversed(words.splitlines()) if line.strip(" -*=")), "nothing was printed")
    return f"a trial with a GPU's memory ended with exit code {code}: {last}"


def _mapped() -> list[str]:
    """Paths of the libraries that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return sorted({line.split(maxsplit=5)[5] for line in lines if line.count("/") and ".so" in line})


# --- the child


class _Gpu:
    """Memory of GPU number `index` of those visible, through the driver alone: torch would take seconds to load."""

    def __init__(self, index: int) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise OSError("the driver shows no GPU")
        self._call("cuDeviceGet", ctypes.byref(device), index % count.value)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def place(self, values: np.ndarray) -> int:
        """The address of memory that holds these."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(values.nbytes))
        self._call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(values.nbytes))
        self._call("cuCtxSynchronize")
        return address.value

    def read(self, address: int, nbytes: int) -> np.ndarray:
        """What stands there."""
        values = np.empty(nbytes, dtype=np.uint8)
        target = ctypes.c_void_p(values.ctypes.data)
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(nbytes))
        return values

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._driver, name)(*arguments):
            raise OSError(f"{name} of the NVIDIA driver failed with code {code}")


class _Host:
    """The host's memory instead of a GPU's, for tests of the way itself."""

    def __init__(self) -> None:
        self._held: list[np.ndarray] = []

    def place(self, values: np.ndarray) -> int:
        """See _Gpu."""
        self._held.append(values.copy())
        return int(self._held[-1].ctypes.data)

    def read(self, address: int, nbytes: int) -> np.ndarray:
        """See _Gpu."""
        return np.frombuffer(memory_at(address, nbytes), dtype=np.uint8).copy()


def _child(place: str) -> None:
    """One rank of a trial. place: the first GPU's number, or "host". Speaks in lines of JSON."""
    from mpi4py import MPI

    comm, host = MPI.COMM_WORLD, place == "host"
    _tell(comm, ranks=comm.size, **signs()._asdict())
    if not host and (why := signs().against):
        _tell(comm, reason=why)
        return
    try:
        memory: _Gpu | _Host = _Host() if host else _Gpu(int(place) + comm.rank)
    except OSError as error:
        _tell(comm, reason=f"no GPU can be used ({error})")
        return
    peer = (comm.rank + 1) % comm.size  # on its own a process sends to itself
    for size in SIZES:
        out, into = memory.place(pattern(comm.rank, size)), memory.place(np.zeros(size, dtype=np.uint8))
        comm.Sendrecv(memory_at(out, size), dest=peer, recvbuf=memory_at(into, size), source=peer)
        if not np.array_equal(memory.read(into, size), pattern(peer, size)):
            _tell(comm, reason=f"of {size} bytes sent from a GPU's memory to a GPU's memory others arrived")
            comm.Abort(1)
    comm.Barrier()
    _tell(comm, moved=True)


def _tell(comm: Any, **said: object) -> None:
    if comm.rank == 0 or "reason" in said:
        sys.stdout.write(json.dumps(said) + "\n")  # one write: lines of two ranks do not mix
        sys.stdout.flush()


if __name__ == "__main__":
    _child(sys.argv[1])
