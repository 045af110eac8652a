"""The rows of bench_cpu.py: speeds of every round, their median, its share of the machine's limits, and our ratio."""

from __future__ import annotations

import statistics
from typing import Any

import _roofs

from rwkvmpi.models.schema import ModelShape

Row = dict[str, Any]
DISTURBED = 0.97  # share of the core below which a measurement on one thread is marked
HEADINGS = ("tokens/s", "min", "max", "per CPU s", "of mm", "of roof", "ours/this", "logits")
LEGEND = """
per CPU s: tokens per second of processor time, of all threads. of mm: the layers' products at torch.mm's speed on the
same shapes. of roof: prefill, the products at peak; steps, every weight and state through memory once, or the products
at peak if that takes longer; the recurrence at the float32 peak. logits: largest difference of the last token's from
ours in float32. * something else had part of the core (llama.cpp: or its file was not in memory)
"""


def prefill_row(who: Row, samples: list[Row], reference: list[float] | None, tokens: int, chunk: int) -> Row:
    """`who`: what identifies the row; `samples`: of every round; `reference`: our logits in float32."""
    row = who | {"task": "prefill", "batch": 1, "tokens": tokens, "chunk": chunk}
    row |= speeds([next(iter(sample["prefill"].values())) for sample in samples], tokens)
    if reference and samples and "logits" in samples[0]:
        row["logits_differ"] = max(abs(a - b) for a, b in zip(samples[0]["logits"], reference, strict=True))
    return row


def step_row(who: Row, samples: list[Row], batch: int, steps: int) -> Row:
    times = [sample["step"][str(batch)] for sample in samples]
    return who | {"task": "step", "batch": batch, "steps": steps} | speeds(times, steps * batch)


def speeds(times: list[Row], tokens: int) -> Row:
    """Tokens/s of every round, and what of them is quoted."""
    rates = [tokens / t["seconds"] for t in times]
    if not rates:
        return {"tokens_per_second": rates}
    shares = [t["cpu_share"] for t in times]
    quoted = {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
    quoted["per_cpu_second"] = statistics.median(rate / share for rate, share in zip(rates, shares, strict=True))
    return {"tokens_per_second": rates, "cpu_share": shares, **quoted}


def add_ratios(rows: list[Row], shape: ModelShape, rates: Row, rows_per_product: int) -> None:
    """Puts into every row its roofs, its median over them, and our median of the same task and kind over its own."""
    measured = [row for row in rows if row["who"] == "rwkvmpi" and "median" in row]
    ours = {(row["task"], row["batch"], row["kind"]): row for row in measured}
    for row in rows:
        kind = row["kind"]
        if row["task"] == "prefill":
            for key, of in (("roof_mm", "mm"), ("roof", "peak")):
                row[key] = _roofs.prefill_roof(shape, kind, row["tokens"], rows_per_product, rates, of)
        else:
            row["roof"] = _roofs.step_roof(shape, kind, row["batch"], rates)
        if "median" in row:
            for key, roof in (("of_mm", row.get("roof_mm")), ("of_roof", row["roof"])):
                if roof:
                    row[key] = row["median"] / roof
            own = ours.get((row["task"], row["batch"], kind))
            if own and row["who"] != "rwkvmpi":
                row["ours_over_this"] = own["median"] / row["median"]
                row["ours_over_this_per_cpu_second"] = own["per_cpu_second"] / row["per_cpu_second"]


def print_tables(shape: ModelShape, threads: int, rounds: int, rows: list[Row], rates: Row) -> None:
    size = f"{shape.n_layer} layers, {shape.n_embd} channels, {shape.vocab_size:,} words"
    print(f"\nRWKV-{shape.version}, {size}; threads: {threads}; rounds: {rounds}")
    peak = ", ".join(f"{kind} {value / 1e9:,.0f}" for kind, value in rates["peak"].items())
    print(f"peak GFLOP/s: {peak}; reading {rates['read_bytes_per_second'] / 1e9:.1f} GB/s")
    for task, batch in dict.fromkeys((row["task"], row["batch"]) for row in rows):
        same = [row for row in rows if (row["task"], row["batch"]) == (task, batch)]
        if task == "prefill":
            title = f"prefill of {same[0]['tokens']:,} tokens, logits of the last one only; chunk in brackets"
        else:
            title = f"single-token steps, documents at once: {batch}; logits of each"
        print(f"\n{title}\n{'':29}" + "".join(f"{heading:>11}" for heading in HEADINGS))
        for row in same:
            print_row(row, threads)
    print(LEGEND, flush=True)


def print_row(row: Row, threads: int) -> None:
    name = row["who"] + (f" ({row['chunk']})" if "chunk" in row else "")
    if "median" not in row:
        print(f"{name:<20}{row['label']:9} {row['unavailable']}")
        return
    cells = [f"{row[key]:,.1f}" for key in ("median", "min", "max", "per_cpu_second")]
    cells += [f"{row[key]:.1%}" if key in row else "" for key in ("of_mm", "of_roof")]
    cells.append(f"{row['ours_over_this']:.2f}" if "ours_over_this" in row else "")
    cells.append(f"{row['logits_differ']:.4f}" if "logits_differ" in row else "")
    disturbed = threads == 1 and statistics.median(row["cpu_share"]) < DISTURBED
    print(f"{name:<20}{row['label']:9}" + "".join(f"{cell:>11}" for cell in cells) + (" *" if disturbed else ""))
