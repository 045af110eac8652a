"""What was measured on this machine, for `plan` and `--chunk auto`: by `rwkvmpi bench`, and by runs that were finished.

The file is $XDG_CACHE_HOME/rwkvmpi/figures.json (~/.cache by default); losing it loses nothing else. What is measured
later replaces what was measured before, whoever did it. A file that somebody has broken counts as absent.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rwkvmpi.config import DEFAULT_CHUNK, MAX_CHUNK, MIN_CHUNK, ROW_ALIGNMENT
from rwkvmpi.grid.choose import DEVICE_MEMORY
from rwkvmpi.grid.plan import Machine

SHORTEST_RUN_S = 10.0
# Per second, of a large GPU's products; "auto" is bfloat16 there.
GPU_FLOPS = {"auto": 400e12, "bfloat16": 400e12, "float16": 400e12, "float32": 40e12}
WORTH_CHANGING = 1.02  # so much faster a chunk must be than the default one
EQUALLY_FAST = 0.995  # of several chunks, within this, the largest is taken: fewer hops per token
MOST_BYTES = 1 << 20

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ChunkSize = Annotated[int, Field(ge=MIN_CHUNK, le=MAX_CHUNK, multiple_of=ROW_ALIGNMENT)]
Source = Literal["run", "bench"]


class _Entry(BaseModel):
    """Who measured it, where and when (seconds since 1970)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    source: Source
    host: str = Field(max_length=255)
    when: float = Field(ge=0, lt=1e11, allow_inf_nan=False)

    def __str__(self) -> str:
        by = "rwkvmpi bench" if self.source == "bench" else "a finished run"
        return f"{by} on {self.host}, {time.strftime('%Y-%m-%d', time.localtime(self.when))}"


class Speed(_Entry):
    """Operations per second of one rank that computes, of all kinds of work together."""

    flops_per_second: Positive


class Hop(_Entry):
    """A message to a neighbour takes latency_s + bytes / bytes_per_second; between_nodes: of another machine."""

    latency_s: Positive
    bytes_per_second: Positive
    between_nodes: bool = False


class Memory(_Entry):
    """Reading what no cache holds."""

    bytes_per_second: Positive


class ChunkSpeeds(_Entry):
    """tokens/s of all layers by tokens per chunk, of a model of this version and width."""

    version: str
    width: int = Field(gt=0)
    tokens_per_second: dict[ChunkSize, Positive]


class Figures(BaseModel):
    """The whole file. Keys: "DEVICE DTYPE THREADS" for speeds, the same and "VERSION WIDTH" for chunks, "THREADS" for
    memory, a transport's name for hops."""

    model_config = ConfigDict(extra="ignore")

    speeds: dict[str, Speed] = Field(default_factory=dict)
    chunks: dict[str, ChunkSpeeds] = Field(default_factory=dict)
    memory: dict[str, Memory] = Field(default_factory=dict)
    hops: dict[str, Hop] = Field(default_factory=dict)


def figures_path() -> Path:
    """Where the figures of this machine lie."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "rwkvmpi" / "figures.json"


def load() -> Figures:
    """What was measured here so far. A warning, once, where the file cannot be read or is not what we wrote."""
    path = figures_path()
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError("it is larger than such a file can be")
        return Figures.model_validate_json(data)
    except FileNotFoundError:
        return Figures()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        _warn(path, f"{where}: {first['msg']}" if where else first["msg"])
    except (OSError, ValueError) as error:
        _warn(path, str(getattr(error, "strerror", None) or error))
    return Figures()


@functools.cache
def _warn(path: Path, reason: str) -> None:
    logging.getLogger("rwkvmpi").warning(
        "%s is not used: %s; remove it, or measure again with `rwkvmpi bench`", path, reason
    )


def update(change: Callable[[Figures], None]) -> Path | None:
    """Load, `change`, and write again; the file's path, or None where it cannot be written."""
    path = figures_path()
    figures = load()
    change(figures)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{platform.node()}.{os.getpid()}")
        temporary.write_text(figures.model_dump_json(indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return None  # a home folder that cannot be written is no reason to trouble a finished run
    return path


def load_machine(device: str, dtype: str, threads: int, transport: str = "auto") -> Machine:
    """The measured figures for this kind of rank, with the hops of what a job with this `transport` would use; what
    was not measured is Machine's default."""
    figures = load()
    machine = Machine() if device == "cpu" else Machine(flops_per_second=GPU_FLOPS[dtype])
    if (speed := figures.speeds.get(_key(device, dtype, threads))) is not None:
        machine = machine.with_speed(speed.flops_per_second, str(speed))
    for name in _likely(figures, device, transport):
        if (hop := figures.hops.get(name)) is not None:
            return machine.with_hop(hop.latency_s, hop.bytes_per_second, f"{hop}, over {name}")
    return machine


def _likely(figures: Figures, device: str, wanted: str) -> list[str]:
    """Names of transports, the likeliest first: what `grid.choose` would take, as far as one process can tell.

    It cannot know whether ranks will be on several nodes; but where hops over verbs were measured between nodes, they
    were at least once.
    """
    if wanted == "verbs":
        return ["verbs"]
    over_mpi = ["mpi"] if device == "cpu" or os.environ.get(DEVICE_MEMORY) == "0" else ["mpi-device", "mpi"]
    verbs = figures.hops.get("verbs")
    chosen_ucx = os.environ.get("OMPI_MCA_pml") == "ucx"  # noqa: SIM112 - Open MPI's own spelling
    if wanted == "auto" and verbs is not None and verbs.between_nodes and not chosen_ucx:
        return ["verbs", *over_mpi]
    return over_mpi


def note_speed(device: str, dtype: str, threads: int, flops: float, seconds: float) -> None:
    """Remember that a run's ranks did `flops` operations in `seconds` of computing; too short a run says nothing."""
    if seconds >= SHORTEST_RUN_S and flops > 0:
        update(lambda figures: set_speed(figures, "run", device, dtype, threads, flops / seconds))


def set_speed(figures: Figures, source: Source, device: str, dtype: str, threads: int, rate: float) -> None:
    """Put a rank's operations per second among the figures."""
    figures.speeds[_key(device, dtype, threads)] = Speed(flops_per_second=rate, **_here(source))


def set_chunks(
    figures: Figures, device: str, dtype: str, threads: int, version: str, width: int, rates: Mapping[int, float]
) -> None:
    """Put the tokens/s of all layers by tokens per chunk among the figures."""
    entry = ChunkSpeeds(version=version, width=width, tokens_per_second=dict(rates), **_here("bench"))
    figures.chunks[f"{_key(device, dtype, threads)} {version} {width}"] = entry


def set_memory(figures: Figures, threads: int, bytes_per_second: float) -> None:
    """Put the rate of reading memory among the figures."""
    figures.memory[str(threads)] = Memory(bytes_per_second=bytes_per_second, **_here("bench"))


def set_hop(
    figures: Figures, transport: str, latency_s: float, bytes_per_second: float, between_nodes: bool = False
) -> None:
    """Put what a message to a neighbour takes among the figures."""
    figures.hops[transport] = Hop(
        latency_s=latency_s, bytes_per_second=bytes_per_second, between_nodes=between_nodes, **_here("bench")
    )


class Choice(NamedTuple):
    """What `--chunk auto` stands for, and why."""

    chunk: int
    reason: str


def choose_chunk(device: str, dtype: str, threads: int, version: str, width: int) -> Choice:
    """The chunk that was fastest here for this kind of rank and model, whatever the grid; of several as fast as it the
    largest. The default where none is 2% faster than that, and where nothing was measured.

    A model's own width counts; if it was not measured, the nearest width of the same version.
    """
    key = _key(device, dtype, threads)
    curves = [
        curve
        for name, curve in load().chunks.items()
        if name.startswith(key + " ") and curve.version == version and DEFAULT_CHUNK in curve.tokens_per_second
    ]
    if not curves:
        kind = f"RWKV-{version} in {dtype} with {threads} thread{'s' if threads > 1 else ''}"
        return Choice(DEFAULT_CHUNK, f"nothing was measured here for {kind} (`rwkvmpi bench` does it)")
    curve = min(curves, key=lambda curve: abs(math.log(curve.width / width)))
    rates = curve.tokens_per_second
    fastest, base = max(rates.values()), rates[DEFAULT_CHUNK]
    if fastest < WORTH_CHANGING * base:
        return Choice(DEFAULT_CHUNK, f"none was 2% faster ({curve})")
    chunk = max(size for size, rate in rates.items() if rate >= EQUALLY_FAST * fastest)
    return Choice(chunk, f"{rates[chunk] / base - 1:.0%} faster than {DEFAULT_CHUNK:,} ({curve})")


def _key(device: str, dtype: str, threads: int) -> str:
    return f"{device} {dtype} {threads}"


def _here(source: Source) -> dict[str, Any]:
    return {"source": source, "host": platform.node(), "when": time.time()}
