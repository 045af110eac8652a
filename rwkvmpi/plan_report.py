"""`rwkvmpi plan`: what a job would do, before it is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from rwkvmpi.config import AUTO_CHUNK, make_job, parse_shard
from rwkvmpi.corpus.counting import count_tokens
from rwkvmpi.corpus.part import find_documents
from rwkvmpi.corpus.tokenizers import load_tokenizer
from rwkvmpi.errors import UserError
from rwkvmpi.grid.figures import choose_chunk, load_machine
from rwkvmpi.grid.layout import check_grid, split_layers
from rwkvmpi.grid.plan import choose_grid, predict_seconds, work_of
from rwkvmpi.models.checkpoint import open_checkpoint
from rwkvmpi.models.cost import ITEMSIZE, refusal

KEEP = ("chunk", "device", "dtype", "tokenizer")


def make_plan(
    model: str,
    inputs: list[str],
    *,
    ranks: int,
    task: str,
    threads: int,
    options: dict[str, Any],
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The plan as plain values; `progress` is told how far counting tokens has come. UserError for bad input."""
    corpus = {key: options[key] for key in ("text_key", "id_key", "shard") if options.get(key) is not None}
    sections = {"path": model, **{key: options[key] for key in KEEP if options.get(key) is not None}}
    corpus["paths"] = inputs or ["-"]
    job = make_job({"model": sections, "input": corpus, "task": {"name": task}}, "rwkvmpi plan")
    # What is planned here may run elsewhere: without being told, on CPUs.
    device = "cuda" if job.model.device == "cuda" else "cpu"
    dtype = {"cpu": "float32", "cuda": "bfloat16"}[device] if job.model.dtype == "auto" else job.model.dtype
    if why := refusal(device, dtype):
        raise UserError(why)
    with open_checkpoint(job.model.path) as checkpoint:
        shape = checkpoint.shape
        parameters = checkpoint.parameters()
    tokenizer = load_tokenizer(job.model.tokenizer, shape.vocab_size) if inputs else None
    tokens, failed = np.array([1_000_000]), 0
    if tokenizer is not None:
        index = find_documents(inputs, job.input.text_key, job.input.id_key, *parse_shard(job.input.shard))
        tokens = np.zeros(len(index), dtype=np.int64)
        for count in count_tokens(index, tokenizer):
            failed += count.error is not None
            tokens[count.doc] = 0 if count.error is not None else count.ntokens
            if progress is not None:
                progress(f"{count.doc + 1:,} of {len(index):,} documents, {int(tokens.sum()):,} tokens")
    machine = load_machine(device, dtype, threads)
    why = ""
    if job.model.chunk == AUTO_CHUNK:
        job.model.chunk, why = choose_chunk(device, dtype, threads, shape.version, shape.n_embd)
    work = work_of(shape, ITEMSIZE[dtype], job.model.chunk, tokens, task == "score")
    wanted = {key: options.get(key) or 0 for key in ("stages", "ring", "replicas")}
    grid = choose_grid(work, ranks, machine, **wanted)
    check_grid(grid, ranks, shape.n_layer)
    bounds = split_layers(shape.n_layer, grid.stages, work.layer_flops, work.head_flops)
    one = choose_grid(work, 1, machine)
    seconds = predict_seconds(work, grid, machine)
    return {
        "model": {"version": shape.version, "parameters": parameters, "layers": shape.n_layer, "width": shape.n_embd},
        "grid": {"stages": grid.stages, "ring": grid.ring, "replicas": grid.replicas, "ranks": grid.size},
        "chunk": job.model.chunk,
        "chunk_reason": why,
        "layers_per_stage": [hi - lo for lo, hi in bounds],
        "bytes_per_rank": [
            (hi - lo) * work.weight_bytes_per_layer + (work.weight_bytes_ends if lo == 0 or hi == shape.n_layer else 0)
            for lo, hi in bounds
        ],
        "bytes_per_hop_down": job.model.chunk * work.activation_bytes if grid.stages > 1 else 0,
        "bytes_per_hop_right": work.state_bytes if grid.ring > 1 else 0,
        "state_bytes": work.state_bytes * shape.n_layer,
        "documents": len(tokens) if inputs else None,
        "failed_documents": failed,
        "tokens": work.tokens if inputs else None,
        "flops_per_token": work.layer_flops * shape.n_layer + work.head_flops,
        "efficiency": predict_seconds(work, one, machine) / (seconds * grid.size),
        "seconds": seconds if machine.speed_from and inputs else None,
        "machine": asdict(machine),
    }


def describe(plan: dict[str, Any]) -> str:
    """The plan in words."""
    grid = plan["grid"]
    lines = [
        f"model       RWKV-{plan['model']['version']}, {plan['model']['parameters'] / 1e6:,.1f} M parameters, "
        f"{plan['model']['layers']} layers x {plan['model']['width']} channels",
        f"grid        {grid['stages']} stages x {grid['ring']} ring slots x {grid['replicas']} replicas "
        f"= {grid['ranks']} ranks",
        f"layers      {' + '.join(map(str, plan['layers_per_stage']))} per stage",
        f"weights     {', '.join(size(n) for n in plan['bytes_per_rank'])} per rank of each stage",
        f"chunk       {plan['chunk']:,} tokens" + (f": {plan['chunk_reason']}" if plan["chunk_reason"] else ""),
    ]
    if plan["bytes_per_hop_down"]:
        lines.append(f"hop down    {size(plan['bytes_per_hop_down'])} of activations per chunk")
    if plan["bytes_per_hop_right"]:
        lines.append(f"hop right   {size(plan['bytes_per_hop_right'])} of state per layer and chunk")
    lines.append(f"state       {size(plan['state_bytes'])} per document in flight, whatever its length")
    if plan["tokens"] is not None:
        failed = f", {plan['failed_documents']:,} of them cannot be read" if plan["failed_documents"] else ""
        lines.append(f"input       {plan['documents']:,} documents, {plan['tokens']:,} tokens{failed}")
    else:
        lines.append("input       none given; efficiency is for one document of a million tokens")
    lines.append(f"work        {plan['flops_per_token'] / 1e6:,.1f} MFLOP per token")
    lines.append(f"efficiency  {plan['efficiency']:.0%} of the ranks' time is predicted to be computing")
    if plan["seconds"] is not None:
        rate = plan["tokens"] / plan["seconds"]
        lines.append(f"time        {plan['seconds']:,.0f} s at {rate:,.0f} tokens/s")
    elif plan["tokens"] is not None:
        lines.append(
            "time        unknown: nothing was measured here yet; `rwkvmpi bench` does it, or any run of 10 s or more"
        )
    return "\n".join(lines + _measured(plan["machine"], grid["ranks"]))


def _measured(machine: dict[str, Any], ranks: int) -> list[str]:
    """What the predictions rest on, and who measured it last."""
    lines = []
    if machine["speed_from"]:
        rate = machine["flops_per_second"] / 1e9
        lines.append(f"speed       {rate:,.0f} GFLOP/s of one rank: {machine['speed_from']}")
    if ranks > 1:
        hop = f"{machine['hop_latency_s'] * 1e6:,.0f} us + {machine['hop_bytes_per_second'] / 1e9:,.1f} GB/s"
        lines.append(f"hops        {hop}: {machine['hop_from'] or 'assumed; mpirun -n 2 rwkvmpi bench measures them'}")
    return lines


def size(nbytes: float) -> str:
    """Bytes in words, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:,.0f} {unit}" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.1f} TB"
