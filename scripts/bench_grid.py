"""Measures what the grid promises, each comparison in one run of this script, in turns, medians quoted.

    python scripts/bench_grid.py --json figures.json              everything (about half an hour on two cores)
    python scripts/bench_grid.py speedup --tokens 16384            P=2 and S=2 on two ranks against one rank
    python scripts/bench_grid.py commits --tokens 65536            commits every 10 s against none
    python scripts/bench_grid.py watched --tokens 24576           telemetry, a watcher and a trace against neither
    python scripts/bench_grid.py length                            one document of 10 MB against one of 200 KB
    python scripts/bench_grid.py counting                          `plan` tokenises a file of 1 GB in one document
    python scripts/bench_grid.py start                             --help, and mpirun -n 2 to the first chunk

Speeds are those of the reading itself, without start-up, as the run reports them; one thread per rank.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}
EVENT_BYTES = 48  # of a trace, see rwkvmpi/telemetry/trace.py
LAYOUTS = {"1 rank": (1, []), "P=2": (2, ["--stages", "2"]), "S=2": (2, ["--ring", "2"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(MEASUREMENTS))
    parser.add_argument("--tokens", type=int, default=16_384, help="length of the document of speedup and commits")
    parser.add_argument("--size", default="0.1B", help="shape of the RWKV-7 of speedup and commits")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", type=int, default=10_000_000, help="bytes of the long document")
    parser.add_argument("--counted", type=int, default=1_000_000_000, help="bytes of the file that is counted")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"command": " ".join(sys.argv), "cores": len(os.sched_getaffinity(0)), "cpu": cpu_name()}
    with tempfile.TemporaryDirectory(prefix="rwkvmpi-bench-") as name:
        for what in arguments.what:
            print(f"== {what}", flush=True)
            figures[what] = MEASUREMENTS[what](Path(name), arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def speedup(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """tokens/s of P=2 and S=2 on two ranks over one rank, all with one thread per rank."""
    model, text = shaped_model(folder, arguments.size), random_words(folder / "words.txt", 4 * arguments.tokens)
    rates: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for repeat in range(arguments.repeats):
        for layout, (ranks, options) in LAYOUTS.items():
            run = folder / f"speedup-{layout}-{repeat}".replace(" ", "")
            facts = score(ranks, model, text, run, "--dtype", arguments.dtype, *options)
            rates[layout].append(facts["tokens_per_second"])
            print(f"{layout:8} {facts['tokens_per_second']:10,.1f} tokens/s", flush=True)
    medians = {layout: statistics.median(values) for layout, values in rates.items()}
    ratios = {layout: medians[layout] / medians["1 rank"] for layout in ("P=2", "S=2")}
    for layout, ratio in ratios.items():
        print(f"{layout}: {ratio:.3f} x one rank")
    return {"tokens_per_second": rates, "speedup": ratios, "dtype": arguments.dtype, "tokens": arguments.tokens}


def commits(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What commits every 10 s cost."""
    model, text = shaped_model(folder, arguments.size), random_words(folder / "words.txt", 4 * arguments.tokens)
    rates: dict[str, list[float]] = {"10": [], "100000": []}
    for repeat in range(arguments.repeats):
        for every in rates:
            run = folder / f"commits-{every}-{repeat}"
            facts = score(1, model, text, run, "--dtype", arguments.dtype, "--commit-every", every)
            rates[every].append(facts["tokens_per_second"])
            print(
                f"every {every:>6} s {facts['tokens_per_second']:10,.1f} tokens/s, {facts['commits']} commits",
                flush=True,
            )
    cost = 1 - statistics.median(rates["10"]) / statistics.median(rates["100000"])
    print(f"commits every 10 s cost {cost:.2%}")
    return {"tokens_per_second": rates, "cost": cost}


def watched(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What telemetry, somebody who watches and a trace cost a ring of two.

    Rates of whole runs differ by more than these cost; so beside the ratios of runs that follow each other, what is
    known of the parts: processor time of the sampling threads, and the number of events times what adding one takes.
    """
    model, text = shaped_model(folder, arguments.size), random_words(folder / "words.txt", 4 * arguments.tokens)
    kinds = {"off": ["--telemetry", "off"], "on": [], "watched": [], "trace": ["--telemetry", "off", "--trace"]}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    sampling, tracing = [], []
    add_s = seconds_per_event(folder)
    for repeat in range(arguments.repeats):
        for kind, options in kinds.items():
            run = folder / f"watched-{kind}-{repeat}"
            watcher = watch(run) if kind == "watched" else None
            facts = score(2, model, text, run, "--ring", "2", "--dtype", arguments.dtype, *options)
            if watcher is not None:
                watcher.wait(30)
            rates[kind].append(facts["tokens_per_second"])
            print(f"{kind:8} {facts['tokens_per_second']:10,.1f} tokens/s over {facts['seconds']:.1f} s", flush=True)
            samples = [json.loads(file.read_text()) for file in (run / "logs/telemetry").glob("rank_*.json")]
            sampling += [sample["sampling_s"] / sample["reading_s"] for sample in samples]
            if kind == "trace":
                sizes = [file.stat().st_size / EVENT_BYTES for file in (run / "trace").glob("*.events")]
                tracing += [size * add_s / facts["seconds"] for size in sizes]
    ratios = {kind: [rate / off for rate, off in zip(rates[kind], rates["off"], strict=True)] for kind in kinds}
    for kind in ("on", "watched", "trace"):
        print(f"{kind:8} {statistics.median(ratios[kind]):.4f} of the rate without, median; all: {ratios[kind]}")
    parts = {"sampling": max(sampling), "tracing": max(tracing)}
    print(f"the sampling thread takes {parts['sampling']:.3%} of a rank's time, adding events {parts['tracing']:.3%}")
    return {"tokens_per_second": rates, "ratios": ratios, "seconds_per_event": add_s, "share_of_time": parts}


def seconds_per_event(folder: Path) -> float:
    """What a trace takes for an event, its share of the writing included."""
    from rwkvmpi.telemetry.trace import TraceRecorder

    recorder = TraceRecorder(folder, 1, 0, {}, 0, 0)
    begun = time.perf_counter()
    for number in range(100_000):
        recorder.add(0, "layer 3", number, number + 1, number)
    return (time.perf_counter() - begun) / 100_000


def watch(run: Path) -> subprocess.Popen[bytes]:
    """`rwkvmpi watch`, which begins before the run and ends with it."""
    return subprocess.Popen([*program(), "watch", str(run), "--json"], stdout=subprocess.DEVNULL)


def length(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory and speed of one long and one short document with the bundled model, on two ranks in a ring."""
    facts = {}
    for name, size in (("short", 200_000), ("long", arguments.long)):
        text = stdlib_text(folder / f"{name}.txt", size)
        facts[name] = score(2, "bundled", text, folder / name, "--ring", "2")
        peaks = ", ".join(f"{peak / 1e6:.1f}" for peak in facts[name]["peak_bytes"])
        print(
            f"{size:>11,} bytes: {facts[name]['tokens_per_second']:10,.1f} tokens/s, peak {peaks} MB per rank",
            flush=True,
        )
    growth = [
        long - short for long, short in zip(facts["long"]["peak_bytes"], facts["short"]["peak_bytes"], strict=True)
    ]
    ratio = facts["long"]["tokens_per_second"] / facts["short"]["tokens_per_second"]
    print(f"the long document: {max(growth) / 1e6:+.1f} MB, {ratio - 1:+.1%} tokens/s")
    return {**facts, "growth_bytes": growth, "speed_ratio": ratio}


def counting(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Reading and tokenising alone: `plan` over one file in one document."""
    model = shaped_model(folder, "0.1B")
    text = stdlib_text(folder / "counted.txt", arguments.counted)
    start = time.perf_counter()
    process = subprocess.Popen([*program(), "plan", str(model), str(text), "--json"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    plan = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    seconds, peak = time.perf_counter() - start, usage.ru_maxrss * 1024
    text.unlink()
    print(f"{plan['tokens']:,} world tokens in {seconds:.1f} s, peak {peak / 1e6:.1f} MB")
    return {"bytes": arguments.counted, "tokens": plan["tokens"], "seconds": seconds, "peak_bytes": peak}


def start(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of --help, and of mpirun -n 2 to the end of a run whose text fits one chunk."""
    text = stdlib_text(folder / "small.txt", 900)
    help_s, run_s = [], []
    for repeat in range(arguments.repeats):
        begun = time.perf_counter()
        subprocess.run([*program(), "--help"], check=True, capture_output=True)
        help_s.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        score(2, "bundled", text, folder / f"start-{repeat}")
        run_s.append(time.perf_counter() - begun)
    print(
        f"--help {statistics.median(help_s):.2f} s; mpirun -n 2, first chunk and all: {statistics.median(run_s):.2f} s"
    )
    return {"help_s": help_s, "run_s": run_s}


MEASUREMENTS = {
    "speedup": speedup,
    "commits": commits,
    "watched": watched,
    "length": length,
    "counting": counting,
    "start": start,
}


def score(ranks: int, model: Path | str, text: Path, run: Path, *options: str) -> dict[str, Any]:
    """One run; what its closing words and its provenance say."""
    command = [*program(), "score", str(model), str(text), "-o", str(run), "--threads", "1", *options]
    if ranks > 1:
        command = [mpirun(), "-n", str(ranks), *command]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    facts: dict[str, Any] = json.loads((run / "SUCCESS").read_text())["figures"]
    return facts


def shaped_model(folder: Path, size: str) -> Path:
    path = folder / f"rwkv7-{size}.safetensors"
    if not path.exists():
        subprocess.run(
            [*program(), "random-model", "7", "--size", size, "-o", str(path)], check=True, capture_output=True
        )
    return path


def random_words(path: Path, nbytes: int) -> Path:
    """Words of the standard library in a fixed order: about four bytes per world token."""
    return stdlib_text(path, nbytes)


def stdlib_text(path: Path, nbytes: int) -> Path:
    """The standard library's sources one after the other, over and over, up to `nbytes`."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    with path.open("wb") as file:
        left = nbytes
        while left:
            for source in sources:
                data = source.read_bytes()[:left]
                left -= file.write(data)
    return path


def cpu_name() -> str:
    match = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else "unknown"


def program() -> list[str]:
    return [sys.executable, "-m", "rwkvmpi"]


def mpirun() -> str:
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else "mpirun"


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(main())
