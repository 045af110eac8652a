"""Reading speed on a CPU: rwkvmpi, other programs, and the machine's own limits, measured in turns.

    python scripts/bench_cpu.py --json figures.json                                       rwkvmpi against the limits
    python scripts/bench_cpu.py --peer-python PEERS/bin/python --llama-bench llama-bench   and against the others
    python scripts/bench_cpu.py --quick                                                   does it all work? 2 minutes

Every program reads the same random weights of the 0.1B shape (12 layers, 768 channels) and the same tokens: a prefill,
after which it gives the logits of the last token, and single-token steps. Each measurement is a process of its own on
the same cores, one after the other, round after round; medians are quoted.

Others are the `rwkv` package and transformers (RWKV-4 only) of the Python given by --peer-python, and llama.cpp (RWKV-6
and 7), for which that Python needs the packages torch and gguf. One that cannot be had is a row that says why.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import _roofs
import _speed_table
import click

from rwkvmpi.models.random_weights import make_shape
from rwkvmpi.models.schema import ModelShape

HERE = Path(__file__).parent
KINDS = ("float32", "bfloat16", "int8")
CHUNK = 1024  # rows of a matrix product in rwkvmpi's prefill
CHUNKS = (256, 512, 1024)  # those that the others may choose from
FEED_FORWARD = {"7": 3072, "4": 3072, "5.2": 2688, "6": 2688}
FLAGS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "hypervisor"),
)
LONGEST_S = 1800

Json = dict[str, Any]


@dataclass
class Contender:
    """One program with one kind of weights."""

    who: str
    kind: str  # as our dtypes are called
    python: str
    label: str  # the kind as the program calls it
    batches: list[int]
    model: Path
    chunks: list[int]
    extra: Json = field(default_factory=dict)
    unavailable: str | None = None
    samples: list[Json] = field(default_factory=list)


@dataclass
class Settings:
    """The command line."""

    versions: list[str]
    rounds: int
    tokens: int
    steps: int
    batches: list[int]
    threads: int
    cores: list[int]
    peer_python: str
    llama_bench: str | None
    quick: bool


class Names(click.ParamType):
    """A list with commas, of the given names."""

    name = "LIST"

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        if isinstance(value, list):
            return value
        chosen = [part.strip() for part in value.split(",")]
        for part in chosen:
            if part not in self.known:
                self.fail(f"{part!r} is not one of {', '.join(self.known)}.", param, ctx)
        return list(dict.fromkeys(chosen))


class Numbers(click.ParamType):
    """A list with commas, of whole numbers from `least` up."""

    name = "LIST"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        chosen = [part.strip() for part in value.split(",")]
        for part in chosen:
            if not part.isdecimal() or int(part) < self.least:
                self.fail(f"{part!r} is not a whole number from {self.least} up.", param, ctx)
        return list(dict.fromkeys(int(part) for part in chosen))


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"), context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--versions", type=Names(tuple(FEED_FORWARD)), default="7,4,5.2,6", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--tokens", type=click.IntRange(32), default=2048, show_default=True, help="Of the prefill.")
@click.option("--steps", type=click.IntRange(1), default=64, show_default=True, help="Single-token steps.")
@click.option("--batches", type=Numbers(1), default="1,16", show_default=True, help="Documents per step (rwkvmpi's).")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--cores", type=Numbers(0), help="Run on these.  [default: the last of those allowed, one per thread]")
@click.option("--peer-python", default=sys.executable, metavar="PATH", help="Has rwkv, transformers, gguf.")
@click.option("--llama-bench", metavar="PATH", help="llama.cpp's benchmark program.")
@click.option("--models", type=click.Path(path_type=Path), metavar="FOLDER", help="Keep and reuse the models here.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE")
@click.option("--quick", is_flag=True, help="Two layers, 256 tokens, one round: does it work? Figures mean nothing.")
def command(models: Path | None, json_file: Path | None, cores: list[int] | None, **options: Any) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    cores = cores or allowed[-options["threads"] :]
    if options["quick"]:
        options.update(rounds=1, tokens=256, steps=8)
    settings = Settings(cores=cores, **options)
    if not set(cores) <= set(allowed) or len(cores) < settings.threads:
        known = ", ".join(map(str, allowed))
        raise click.UsageError(f"--threads {settings.threads} takes as many of the cores {known}; change --cores.")
    for option, path in (("--peer-python", settings.peer_python), ("--llama-bench", settings.llama_bench)):
        if path is not None and not (os.path.isfile(path) and os.access(path, os.X_OK)):
            raise click.UsageError(f"{option} {path}: no program lies there.")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise click.UsageError(f"--json {json_file}: its folder does not exist.")
    if models is not None and models.exists() and not models.is_dir():
        raise click.UsageError(f"--models {models}: this is no folder.")
    facts = machine(settings)
    print("\n".join(f"{key:9} {value}" for key, value in facts.items()), flush=True)
    figures: Json = {"command": shlex.join(sys.argv), "settings": asdict(settings), "machine": facts}
    figures |= {"versions": {}, "roofs": {}, "rows": []}
    with contextlib.ExitStack() as stack:
        folder = models or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rwkvmpi-bench-")))
        for version in settings.versions:
            measure_version(folder, version, settings, figures)
            if json_file is not None:  # after each version, so that an end before the last loses little
                json_file.write_text(json.dumps(figures, indent=1) + "\n")


def measure_version(folder: Path, version: str, settings: Settings, figures: Json) -> None:
    shape = shape_of(version, settings.quick)
    model = random_model(folder, shape)
    contenders = list(entrants(folder, shape, model, settings))
    if not settings.quick:
        choose_chunks(contenders, shape, settings)
    rates: list[Json] = []
    for number in range(settings.rounds):
        print(f"-- RWKV-{version}, round {number + 1} of {settings.rounds}", flush=True)
        rates.append(measure_rates(shape, settings))
        for contender in contenders:
            if contender.unavailable is None:
                sample = measure(contender, shape, settings, contender.chunks, contender.batches)
                report(contender, sample)
    figures["roofs"][version] = typical = median_rates(rates)
    for contender in contenders:
        for sample in contender.samples:
            figures["versions"].setdefault(contender.who, sample["versions"])
    rows = rows_of(contenders, version, settings)
    _speed_table.add_ratios(rows, shape, typical, CHUNK)
    figures["rows"] += rows
    _speed_table.print_tables(shape, settings.threads, settings.rounds, rows, typical)


def rows_of(contenders: list[Contender], version: str, settings: Settings) -> list[Json]:
    """One for every contender and task, first all prefills."""
    logits = [c.samples[0]["logits"] for c in contenders if c.who == "rwkvmpi" and c.samples]  # of float32 first
    who = [
        {"version": version, "who": c.who, "kind": c.kind, "label": c.label, "unavailable": c.unavailable}
        for c in contenders
    ]
    reference = logits[0] if logits else None
    rows = [
        _speed_table.prefill_row(name, c.samples, reference, settings.tokens, min(c.chunks[0], settings.tokens))
        for name, c in zip(who, contenders, strict=True)
    ]
    for batch in settings.batches:
        rows += [
            _speed_table.step_row(name, c.samples, batch, settings.steps)
            for name, c in zip(who, contenders, strict=True)
            if batch in c.batches
        ]
    return rows


def shape_of(version: str, quick: bool) -> ModelShape:
    """The 0.1B (RWKV-4: 169M) shape; in a quick run two of its layers and a small vocabulary."""
    words = 50277 if version == "4" else 65536
    return make_shape(
        version,
        n_layer=2 if quick else 12,
        n_embd=768,
        vocab_size=8192 if quick else words,
        ffn_width=FEED_FORWARD[version],
    )


def random_model(folder: Path, shape: ModelShape) -> Path:
    path = folder / f"rwkv{shape.version}-{shape.n_layer}x{shape.n_embd}-{shape.vocab_size}.pth"
    if not path.exists():
        sizes = {"layers": shape.n_layer, "width": shape.n_embd, "vocab": shape.vocab_size, "ffn": shape.ffn_width}
        command = [sys.executable, "-m", "rwkvmpi", "random-model", shape.version, "-o", str(path)]
        command += [word for key, size in sizes.items() for word in (f"--{key}", str(size))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"no model could be written: {last_line(done.stderr)}")
    return path


def entrants(folder: Path, shape: ModelShape, model: Path, settings: Settings) -> Iterator[Contender]:
    """Everything that shall be measured, some of it perhaps unavailable."""
    for kind in KINDS:
        yield Contender("rwkvmpi", kind, sys.executable, kind, settings.batches, model, [CHUNK])
    chunks = [min(512, settings.tokens)]
    single = [1] if 1 in settings.batches else []  # the others take steps of one document
    for kind, label in (("float32", "fp32"), ("bfloat16", "bf16")):
        yield Contender("rwkv", kind, settings.peer_python, label, single, model, chunks)
    if shape.version == "4":
        for kind, label in (("float32", "fp32"), ("bfloat16", "bf16")):
            yield Contender("transformers", kind, settings.peer_python, label, single, model, chunks)
    paths = {label: model.with_name(f"{model.stem}-{label}.gguf") for label in ("f32", "bf16", "q8_0")}
    unavailable = without_llama(shape, model, paths, settings)
    for kind, label in zip(KINDS, paths, strict=True):
        extra = {"llama_bench": settings.llama_bench}
        yield Contender(
            "llama.cpp", kind, settings.peer_python, label, single, paths[label], chunks, extra, unavailable
        )


def without_llama(shape: ModelShape, model: Path, paths: dict[str, Path], settings: Settings) -> str | None:
    """Writes llama.cpp's files; why it cannot take part, or None if it can."""
    if shape.version not in ("6", "7"):
        return f"it has no RWKV-{shape.version}"
    if settings.llama_bench is None:
        return "no --llama-bench given"
    outputs = {label: str(path) for label, path in paths.items() if not path.exists()}
    if not outputs:
        return None
    spec = {"version": shape.version, "model": str(model), "outputs": outputs}
    unavailable: str | None = in_process(settings.peer_python, HERE / "_gguf.py", spec, settings).get("unavailable")
    return unavailable


def choose_chunks(contenders: list[Contender], shape: ModelShape, settings: Settings) -> None:
    """Let every other program read once with each length of chunk, and go on with the one that took least time: of the
    processor on one thread, which a disturbance changes less."""
    chunks = [chunk for chunk in CHUNKS if chunk <= settings.tokens] or [settings.tokens]
    for contender in contenders:
        if contender.who == "rwkvmpi":
            continue
        seconds: dict[int, float] = {}
        for chunk in chunks if contender.unavailable is None else []:
            sample = measure(contender, shape, settings, [chunk], [])
            if "prefill" in sample:
                times = sample["prefill"][str(chunk)]
                seconds[chunk] = times["seconds"] * (times["cpu_share"] if settings.threads == 1 else 1)
        contender.samples = []
        if seconds:
            contender.chunks = [min(seconds, key=lambda chunk: seconds[chunk])]
            rates = ", ".join(f"{chunk}: {settings.tokens / s:,.0f}" for chunk, s in seconds.items())
            print(f"{contender.who} {contender.label}, tokens/s by chunk: {rates}", flush=True)


def measure(contender: Contender, shape: ModelShape, settings: Settings, chunks: list[int], batches: list[int]) -> Json:
    spec = {
        "who": contender.who,
        "version": shape.version,
        "kind": contender.kind,
        "model": str(contender.model),
        "vocabulary": shape.vocab_size,
        "tokens": settings.tokens,
        "steps": settings.steps,
        "threads": settings.threads,
        "chunks": chunks,
        "batches": batches,
        **contender.extra,
    }
    sample = in_process(contender.python, HERE / "_peers.py", spec, settings)
    contender.unavailable = sample.get("unavailable")
    if contender.unavailable is None:
        contender.samples.append(sample)
    return sample


def measure_rates(shape: ModelShape, settings: Settings) -> Json:
    products = sorted(set(_roofs.all_products(shape)))
    spec = {"products": products, "rows": CHUNK, "threads": settings.threads}
    rates = in_process(sys.executable, HERE / "_roofs.py", spec, settings)
    if "unavailable" in rates:
        raise click.ClickException(f"the machine's rates could not be measured: {rates['unavailable']}")
    return rates


def in_process(python: str, script: Path, spec: Json, settings: Settings) -> Json:
    """The JSON that a script prints last, run on the chosen cores; or {"unavailable": why}."""
    threads = str(settings.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [python, str(script), json.dumps(spec)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST_S,
            preexec_fn=lambda: os.sched_setaffinity(0, settings.cores),
        )
    except subprocess.TimeoutExpired:
        return {"unavailable": f"it took more than {LONGEST_S} s"}
    if done.returncode:
        return {"unavailable": f"it ended with {done.returncode}: {last_line(done.stderr)}"}
    result: Json = json.loads(done.stdout.splitlines()[-1])
    return result


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def report(contender: Contender, sample: Json) -> None:
    """A line while it runs."""
    if contender.unavailable is not None:
        print(f"{contender.who:13}{contender.label:10}{contender.unavailable}", flush=True)
        return
    times = {f"prefill ({chunk})": t for chunk, t in sample["prefill"].items()}
    times |= {f"steps of {batch}": t for batch, t in sample["step"].items()}
    told = ", ".join(f"{what} {t['seconds']:.2f} s" for what, t in times.items())
    print(f"{contender.who:13}{contender.label:10}{told}", flush=True)


def median_rates(rates: list[Any]) -> Any:
    """Of every figure its median over the rounds."""
    first = rates[0]
    if isinstance(first, dict):
        return {key: median_rates([one[key] for one in rates]) for key in first}
    return first if isinstance(first, str) else statistics.median(rates)


def machine(settings: Settings) -> Json:
    """What the figures depend on."""
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*:\s*(.*)", text)
    flags = re.search(r"flags\s*:\s*(.*)", text)
    present = flags[1].split() if flags else []
    return {
        "cpu": name[1] if name else platform.processor() or "unknown",
        "flags": " ".join(flag for flag in FLAGS if flag in present),
        "threads": settings.threads,
        "cores": ",".join(map(str, settings.cores)),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


def main() -> None:
    """A mistake on the command line is one sentence and exit code 2."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # which ends the measurement under way, too
    try:
        command.main(standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"bench_cpu.py: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)


if __name__ == "__main__":
    main()
