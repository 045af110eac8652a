"""Whole models on a GPU: against the same models on the CPU, and the promise that neighbours change no bit.

    python scripts/_gpu_models.py [--json FILE]

Exits with 1 when something is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from rwkvmpi.models.chunk_reader import make_reader
from rwkvmpi.models.model import Model, Stage
from rwkvmpi.models.random_checkpoint import random_checkpoint
from rwkvmpi.models.random_weights import make_shape, official_shape
from rwkvmpi.models.schema import VERSIONS
from rwkvmpi.ops.cuda import library

DTYPES = ("float32", "bfloat16", "float16")
LARGEST = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 8e-3}  # of the largest logit
NEEDED_BY_JOBS = ("click", "pydantic", "h5py", "rich", "tomli_w", "zstandard", "pyarrow")
BITS_PER_BYTE = 0.002  # between the bundled model on a CPU and on a GPU

Row = dict[str, Any]


def device() -> str:
    """Where torch draws and compares: the emulation's tensors are the CPU's."""
    return "cpu" if library.emulating() else "cuda"


def agree_with_the_cpu() -> Iterator[Row]:
    """Prefill and steps of small models of every version."""
    tokens = np.random.default_rng(0).integers(0, 97, 70)
    for version in VERSIONS:
        shape = make_shape(version, n_layer=3, n_embd=128, vocab_size=97, head_size=64)
        truth, _ = Model(random_checkpoint(shape, torch.float32), "float32").forward(tokens)
        for dtype in DTYPES:
            model = Model(random_checkpoint(shape, torch.float32), dtype, "cuda")
            logits, state = model.forward(tokens[:60])
            rows = [logits]
            for token in tokens[60:]:
                step, state = model.step([token], state)
                rows.append(step)
            error = float((torch.cat(rows).cpu() - truth).abs().max() / truth.abs().max())
            what = f"RWKV-{version} {dtype} against the CPU"
            yield {"check": what, "error": error, "limit": LARGEST[dtype], "good": error <= LARGEST[dtype]}


def rows_after_reading(stage: Stage, chunk: int, tokens: np.ndarray, rows: list[list[int]]) -> list[torch.Tensor]:
    """x after a chunk, and every layer's states; read twice, the second time from the graphs."""
    reader = make_reader(stage, chunk)
    segments = np.array(rows, dtype=np.int32)
    with stage.device.computing():
        for _ in range(2):
            reader.begin_tokens(tokens, segments).wait()
            states = []
            for item in range(len(stage.layers)):
                state = reader.state(item, len(segments))
                reader.read(item, state)
                states.append(state.wkv[: len(segments)].clone())
    return [reader.x.clone(), *states]


def keep_the_promise() -> Iterator[Row]:
    """A document's bits do not depend on its place in the chunk, on its neighbours, or on where the chunks cut it."""
    for version, size in (("7", "0.1B"), ("6", "1.6B"), ("4", "169M")):
        shape = official_shape(version, size)
        for dtype in DTYPES:
            whole = Model(random_checkpoint(shape, torch.bfloat16, device()), dtype, "cuda")
            for chunk in (1024, 2048):
                tokens = np.random.default_rng(1).integers(0, shape.vocab_size, chunk).astype(np.int32)
                among = [[0, 64], [96, 500], [608, 33], [704, chunk - 704]]
                together = rows_after_reading(whole.stage, chunk, tokens, among)
                for index in (1, 3):
                    first, count = among[index]
                    alone = rows_after_reading(whole.stage, chunk, np.roll(tokens, -first), [[0, count]])
                    same = torch.equal(alone[0][:count], together[0][first : first + count])
                    same &= all(torch.equal(a[0], b[index]) for a, b in zip(alone[1:], together[1:], strict=True))
                    name = f"RWKV-{version} {size} {dtype}, chunk {chunk}, document {index} alone and among others"
                    yield {"check": name, "error": 0.0 if same else 1.0, "limit": 0.0, "good": same}
            del whole
            if device() == "cuda":
                torch.cuda.empty_cache()


def jobs_run() -> Iterator[Row]:
    """`rwkvmpi score` with the bundled model: on the CPU, on the GPU, and on the GPU stopped and gone on with."""
    missing = [name for name in NEEDED_BY_JOBS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out: whole jobs, which need {', '.join(missing)} in {sys.executable}")
        return
    text = "".join(path.read_text() for path in sorted(Path("rwkvmpi").rglob("*.py")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text(text)
        found = {run: score(folder, run, kind) for run, kind in (("cpu", "cpu"), ("gpu", "cuda"))}
        stopped = score(folder, "stopped", "cuda", "--max-time", "4s", "--commit-every", "20c")
        rounds = 0
        while stopped is None and rounds < 20:
            stopped = score(folder, "stopped", "cuda", "--commit-every", "20c")
            rounds += 1
    if any(result is None for result in (*found.values(), stopped)):
        yield {"check": "rwkvmpi score --device cuda", "error": 1.0, "limit": 0.0, "good": False}
        return
    assert found["cpu"] is not None
    assert found["gpu"] is not None
    assert stopped is not None
    apart = abs(found["cpu"][1] - found["gpu"][1])
    what = f"bits per byte of the bundled model: {found['cpu'][1]:.5f} on the CPU, {found['gpu'][1]:.5f} on the GPU"
    yield {"check": what, "error": apart, "limit": BITS_PER_BYTE, "good": apart <= BITS_PER_BYTE}
    same = stopped[0] == found["gpu"][0]
    name = "a job stopped and gone on with has the results of one that was not"
    yield {"check": name, "error": float(not same), "limit": 0.0, "good": same}


def score(folder: Path, run: str, kind: str, *options: str) -> tuple[str, float] | None:
    """(digest of the results, bits per byte), or None if the job is not finished."""
    command = [sys.executable, "-m", "rwkvmpi", "score", "bundled", str(folder / "text.txt"), "-o", str(folder / run)]
    done = subprocess.run([*command, "--device", kind, *options], capture_output=True, text=True, check=False)
    success = folder / run / "SUCCESS"
    if not success.exists():
        if done.returncode != 75:
            print(done.stderr[-2000:], file=sys.stderr)
        return None
    import h5py

    with h5py.File(folder / run / "results.h5") as results:
        return json.loads(success.read_text())["content_sha256"], float(results["documents/bits_per_byte"][0])


@click.command(help=__doc__)
@click.option("--json", "path", type=click.Path(path_type=Path))
def main(path: Path | None) -> None:
    if not library.emulating() and (why := library.reason()):
        raise click.ClickException(why)
    rows = []
    for part in (agree_with_the_cpu, keep_the_promise, jobs_run):
        for row in part():
            rows.append(row)
            print(f"{row['error']:9.2e} of {row['limit']:.0e}  {row['check']}{'' if row['good'] else '   WRONG'}")
            if path is not None:
                path.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if all(row["good"] for row in rows) else 1)


if __name__ == "__main__":
    main()
