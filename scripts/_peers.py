"""What bench_cpu.py runs in processes of their own: rwkvmpi and other programs reading the same weights and tokens.

    python scripts/_peers.py '{"who": "rwkv", "model": "r7.pth", "kind": "float32", ...}'

The last line of the output is JSON: the seconds of what was asked for, or {"unavailable": why}. rwkvmpi is imported for
itself alone, so this file also runs in a Python that has only the other programs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

Spec = dict[str, Any]
COMPARED = 512  # logits of the last token that are handed back
WARM_STEPS = 4


class Unavailable(Exception):
    """Says why a program cannot take part."""


def main() -> int:
    spec: Spec = json.loads(sys.argv[1])
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the programs themselves print
            result = MEASURES[spec["who"]](spec)
    except Unavailable as error:
        result = {"unavailable": str(error)}
    except ModuleNotFoundError as error:
        result = {"unavailable": f"{error.name} is not installed in {sys.executable}"}
    print(json.dumps(result))
    return 0


def token_ids(count: int, vocabulary: int) -> list[int]:
    """The same tokens for every program."""
    draw = random.Random(0)
    return [draw.randrange(1, vocabulary) for _ in range(count)]


def timed(body: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of one call, and the processor's share in them: below 1 on one thread, something else was running; beside
    it what the call gives."""
    wall, cpu = time.perf_counter(), time.process_time()
    given = body()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cpu_share": cpu / wall}, given


def measured(
    spec: Spec, prefill: Callable[[list[int], int], Any], step: Callable[[int], Callable[[int], Any]]
) -> dict[str, Any]:
    """The measurements of a program in this process.

    prefill(tokens, chunk) gives the logits [V] after the last token; step(batch) makes a function that takes one step
    of `batch` documents, given its number.
    """
    ids = token_ids(spec["tokens"], spec["vocabulary"])
    result: dict[str, Any] = {"prefill": {}, "step": {}}
    for chunk in spec["chunks"]:
        for _ in range(2):  # scripted models compile themselves during their first two calls
            prefill(ids[:chunk], chunk)
        result["prefill"][str(chunk)], logits = timed(partial(prefill, ids, chunk))
        result["logits"] = logits.flatten()[:COMPARED].float().tolist()
    for batch in spec["batches"]:
        take = step(batch)
        take_all(take, range(WARM_STEPS))
        numbers = range(WARM_STEPS, WARM_STEPS + spec["steps"])
        result["step"][str(batch)], _ = timed(partial(take_all, take, numbers))
    return result


def take_all(take: Callable[[int], Any], numbers: range) -> None:
    for number in numbers:
        take(number)


def torch_threads(spec: Spec) -> None:
    import torch

    torch.set_num_threads(spec["threads"])


def measure_own(spec: Spec) -> dict[str, Any]:
    """rwkvmpi. The only place of the benchmark that knows our interface."""
    import torch

    import rwkvmpi
    from rwkvmpi.errors import UserError
    from rwkvmpi.ops import library

    torch_threads(spec)
    try:
        model = rwkvmpi.load_model(spec["model"], dtype=spec["kind"])
    except UserError as error:
        raise Unavailable(str(error)) from None
    ids = token_ids(spec["tokens"], spec["vocabulary"])

    def step(batch: int) -> Callable[[int], Any]:
        states = model.states(batch)
        tokens = torch.tensor([[ids[(n * batch + i) % len(ids)] for i in range(batch)] for n in range(len(ids))])

        def take(number: int) -> None:
            model.step(tokens[number % len(ids)], states)

        return take

    result = measured(spec, lambda tokens, chunk: model.prefill(torch.tensor(tokens))[0], step)
    build = {"rwkvmpi": rwkvmpi.__version__, "torch": torch.__version__, "operators": library.current()}
    return {**result, "versions": build}


def measure_rwkv(spec: Spec) -> dict[str, Any]:
    """The `rwkv` package of the authors of RWKV."""
    os.environ.update(RWKV_JIT_ON="1", RWKV_CUDA_ON="0", RWKV_V7_ON="1" if spec["version"] == "7" else "0")
    torch_threads(spec)
    from rwkv.model import RWKV

    strategy = {"float32": "cpu fp32", "bfloat16": "cpu bf16"}[spec["kind"]]
    model = RWKV(model=spec["model"].removesuffix(".pth"), strategy=strategy)
    ids = token_ids(spec["tokens"], spec["vocabulary"])

    def prefill(tokens: list[int], chunk: int) -> Any:
        state = None
        for first in range(0, len(tokens), chunk):
            logits, state = model.forward(tokens[first : first + chunk], state)
        return logits

    def step(batch: int) -> Callable[[int], Any]:
        state = model.forward(ids[:1], None)[1]

        def take(number: int) -> None:
            nonlocal state
            state = model.forward([ids[number % len(ids)]], state)[1]

        return take

    return {**measured(spec, prefill, step), "versions": versions("rwkv", "torch")}


def measure_transformers(spec: Spec) -> dict[str, Any]:
    """RwkvForCausalLM of transformers, which is RWKV-4."""
    import torch
    from transformers import RwkvConfig, RwkvForCausalLM

    torch_threads(spec)
    weights = torch.load(spec["model"], map_location="cpu", weights_only=True)
    words, channels = weights["emb.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    width = weights["blocks.0.ffn.key.weight"].shape[0]
    config = RwkvConfig(
        vocab_size=words, hidden_size=channels, num_hidden_layers=layers, intermediate_size=width, context_length=1024
    )
    with torch.device("meta"):
        model = RwkvForCausalLM(config)
    dtype = getattr(torch, spec["kind"])
    renamed = {transformers_name(name): tensor.to(dtype) for name, tensor in weights.items()}
    model.load_state_dict(renamed, assign=True)
    model.eval()
    ids = token_ids(spec["tokens"], spec["vocabulary"])

    def forward(tokens: list[int], state: Any) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([tokens]), state=state, use_cache=True, logits_to_keep=1)

    def prefill(tokens: list[int], chunk: int) -> Any:
        state = None
        for first in range(0, len(tokens), chunk):
            output = forward(tokens[first : first + chunk], state)
            state = output.state
        return output.logits[0, -1]

    def step(batch: int) -> Callable[[int], Any]:
        state = forward(ids[:1], None).state

        def take(number: int) -> None:
            nonlocal state
            state = forward([ids[number % len(ids)]], state).state

        return take

    return {**measured(spec, prefill, step), "versions": versions("transformers", "torch")}


def transformers_name(name: str) -> str:
    """blocks.0.att.time_mix_k -> rwkv.blocks.0.attention.time_mix_key"""
    for old, new in (
        ("emb.", "embeddings."),
        (".ln0.", ".pre_ln."),
        (".att.", ".attention."),
        (".ffn.", ".feed_forward."),
    ):
        name = name.replace(old, new)
    for letter, word in (("k", "key"), ("v", "value"), ("r", "receptance")):
        name = name.replace(f"time_mix_{letter}", f"time_mix_{word}")
    return name if name.startswith("head.") else f"rwkv.{name}"


def measure_llama(spec: Spec) -> dict[str, Any]:
    """llama.cpp's own benchmark, after a warm-up run of its own. Its chunk is the `ubatch`."""
    result: dict[str, Any] = {"prefill": {}, "step": {}}
    command = [spec["llama_bench"], "-m", spec["model"], "-t", str(spec["threads"]), "-r", "1", "-o", "json"]
    command += [
        "-p",
        str(spec["tokens"]),
        "-b",
        str(spec["tokens"]),
        "-n",
        str(spec["steps"] if spec["batches"] else 0),
    ]
    command += ["-ub", ",".join(str(chunk) for chunk in spec["chunks"])]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unavailable(f"{spec['llama_bench']} cannot be started: {error.strerror}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise Unavailable(f"llama-bench ended with {done.returncode}: {said[-1] if said else 'no message'}")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    share = (usage.ru_utime + usage.ru_stime) / (time.perf_counter() - start)
    for test in json.loads(done.stdout):
        seconds = {"seconds": test["avg_ns"] * 1e-9, "cpu_share": share}
        if test["n_prompt"]:
            result["prefill"][str(test["n_ubatch"])] = seconds
        elif spec["batches"]:
            result["step"]["1"] = seconds
        result["versions"] = {"llama.cpp": f"{test['build_commit']} ({test['build_number']})"}
    return result


def versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


MEASURES: dict[str, Callable[[Spec], dict[str, Any]]] = {
    "rwkvmpi": measure_own,
    "rwkv": measure_rwkv,
    "transformers": measure_transformers,
    "llama.cpp": measure_llama,
}

if __name__ == "__main__":
    sys.exit(main())
