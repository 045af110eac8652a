"""The measurement as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from rwkvmpi.bench.hops import is_between_nodes

RAW = "raw verbs"


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `measure.run` gave."""
    _say(console, _head(result))
    for table in _tables(result):
        console.print()
        console.print(table)
    console.print()
    _say(console, [f"kept for `plan` and --chunk auto in {result['stored'] or 'no file: it cannot be written'}"])


def _tables(result: dict[str, Any]) -> Iterator[Table]:
    yield _roofs(result)
    for dtype, found in result["dtypes"].items():
        yield _products(dtype, found)
        if found["few_rows"]:
            yield _few_rows(dtype, found)
        yield _layer(dtype, found)
        yield _chunks(dtype, found, result["model"]["n_layer"])
        if found["steps"]:
            yield _steps(dtype, found)
    if result["hops"]:
        yield _hops(result["hops"])


def show_fabric(result: dict[str, Any], console: Console) -> None:
    """Print what `fabric.run` gave: of the pairs on one node, and of those between nodes, the slowest one."""
    model, raw = result["model"], result["perftest"]
    _say(
        console,
        [
            f"{result['ranks']} ranks, {result['mpi']}, {result['device']}; one way, in us, half of there and back",
            f"state and activations: RWKV-{model['version']}, {model['n_embd']} channels, chunks of {model['chunk']:,}",
            *([f"{RAW}: perftest's ib_write_lat, and ib_write_bw, which does not wait for answers"] if raw else []),
        ],
    )
    everything = {**result["transports"], **({"perftest": raw} if raw else {})}
    for between in (False, True):
        kind = {name: [hop for hop in hops if is_between_nodes(hop) == between] for name, hops in everything.items()}
        if any(kind.values()):
            console.print()
            console.print(_fabric("between nodes" if between else "on one node", kind))
    console.print()
    kept = f"kept for `plan` and the choice of a grid in {result['stored'] or 'no file: it cannot be written'}"
    _say(console, [*(f"without {name}: {why}" for name, why in result["absent"].items()), kept])


def _fabric(where: str, kind: dict[str, list[dict[str, Any]]]) -> Table:
    """Per size, us and GB/s of each way's slowest pair (that of the largest message)."""
    chosen = {name: max(hops, key=_slowness) for name, hops in kind.items() if hops}
    pairs = max(len(hops) for hops in kind.values())
    of = f"slowest of {pairs} pairs" if pairs > 1 else "ranks {} - {}".format(*next(iter(chosen.values()))["ranks"])
    columns = [text for name in chosen for text in (RAW if name == "perftest" else name, "GB/s")]
    table = _table(f"hops {where}, {of}", "message", "bytes", *columns)
    ways = reversed(chosen.values())  # the first one's bytes count, with the envelope
    sizes = {size: entry["bytes"] for hop in ways for size, entry in hop["sizes"].items()}
    for size in sorted(sizes, key=lambda size: sizes[size]):
        cells = []
        for hop in chosen.values():
            entry = hop["sizes"].get(size)
            if entry is None:
                cells += ["-", "-"]
                continue
            rate = entry.get("bytes_per_second", entry["bytes"] / entry["seconds"])
            cells += [f"{entry['seconds'] * 1e6:,.1f}", f"{rate / 1e9:,.2f}"]
        table.add_row(size, f"{sizes[size]:,}", *cells)
    return table


def _slowness(hop: dict[str, Any]) -> float:
    largest = max(hop["sizes"].values(), key=lambda entry: entry["bytes"], default={"seconds": 0.0})
    return float(largest["seconds"])


def _say(console: Console, lines: Iterable[str]) -> None:
    console.print("\n".join(lines), soft_wrap=True, markup=False)


def _head(result: dict[str, Any]) -> Iterator[str]:
    machine, model = result["machine"], result["model"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    yield f"{machine['processor']}, operators {machine['operators']}, torch {machine['torch']}, {threads}"
    yield from (f"  {line}" for line in machine["placement"])
    sizes = f"{model['n_layer']} layers x {model['n_embd']} channels, {model['vocab_size']:,} words"
    yield f"RWKV-{model['version']}, {sizes}, random weights"
    if model["measured_layers"] < model["n_layer"]:
        yield f"  {model['measured_layers']} of the layers are measured and stand for the others"


def _roofs(result: dict[str, Any]) -> Table:
    table = _table("what this machine can do", "", "at most")
    for dtype, rate in result["roofs"]["flops_per_second"].items():
        table.add_row(f"multiply-adds, {dtype}", f"{rate / 1e9:,.0f} GFLOP/s")
    table.add_row("reading memory", f"{result['roofs']['memory_bytes_per_second'] / 1e9:,.1f} GB/s")
    return table


def _products(dtype: str, found: dict[str, Any]) -> Table:
    rows = found["products"][0]["rows"]
    table = _table(
        f"{dtype}: products of {rows:,} rows", "inputs x outputs", "GFLOP/s", "of the peak", "torch.mm", "times"
    )
    for entry in found["products"]:
        rate, torch_rate = entry["flops_per_second"], entry["torch_flops_per_second"]
        table.add_row(
            f"{entry['inputs']} x {entry['outputs']}",
            f"{rate / 1e9:,.0f}",
            f"{entry['share_of_peak']:.0%}",
            f"{torch_rate / 1e9:,.0f}" if torch_rate else "-",
            f"{rate / torch_rate:.2f}" if torch_rate else "-",
        )
    return table


def _few_rows(dtype: str, found: dict[str, Any]) -> Table:
    table = _table(
        f"{dtype}: products of few rows, weights from memory", "rows, inputs x outputs", "us", "GB/s", "of the memory's"
    )
    for entry in found["few_rows"]:
        table.add_row(
            f"{entry['rows']:>2}, {entry['inputs']} x {entry['outputs']}",
            f"{entry['seconds'] * 1e6:,.0f}",
            f"{entry['bytes_per_second'] / 1e9:,.1f}",
            f"{entry['share_of_memory']:.0%}",
        )
    return table


def _layer(dtype: str, found: dict[str, Any]) -> Table:
    layer, head = found["layer"], found["head"]
    scale = 1e6 * 1024 / layer["chunk"]
    table = _table(f"{dtype}: one layer", "operator", "calls", "us/1,024 tokens", "share", "GFLOP/s", "of peak")
    for entry in layer["operators"]:
        rate = entry["flops_per_second"]
        table.add_row(
            entry["operator"],
            str(entry["calls"]),
            f"{entry['seconds'] * scale:,.0f}",
            f"{entry['share']:.1%}",
            f"{rate / 1e9:,.0f}" if rate else "",
            f"{entry['share_of_peak']:.0%}" if rate else "",
        )
    rest = layer["seconds"] - sum(entry["seconds"] for entry in layer["operators"])
    table.add_row("(between the operators)", "", f"{rest * scale:,.0f}", f"{rest / layer['seconds']:.1%}", "", "")
    table.add_row("whole layer", "", f"{layer['seconds'] * scale:,.0f}", "100.0%", "", "")
    table.add_row(
        *("head_logprobs", "1", f"{head['seconds'] * scale:,.0f}", f"{head['layers']:.1f} x"),
        *("", f"{head['share_of_peak']:.0%}"),
    )
    return table


def _chunks(dtype: str, found: dict[str, Any], layers: int) -> Table:
    title = f"{dtype}: reading, all layers"
    if found["chunk_layers"] < layers:
        title = f"{dtype}: reading, all layers (from {found['chunk_layers']} of {layers})"
    table = _table(title, "tokens per chunk", "tokens/s without head", "tokens/s of a score")
    for entry in found["chunks"]:
        rates = entry["forward_tokens_per_second"], entry["score_tokens_per_second"]
        table.add_row(f"{entry['chunk']:,}", *(f"{rate:,.0f}" for rate in rates))
    table.add_row("", "", f"{found['flops_per_second'] / 1e9:,.0f} GFLOP/s in all")
    return table


def _steps(dtype: str, found: dict[str, Any]) -> Table:
    table = _table(f"{dtype}: single steps", "documents", "ms per step", "tokens/s")
    for entry in found["steps"]:
        table.add_row(str(entry["batch"]), f"{entry['seconds'] * 1e3:,.2f}", f"{entry['tokens_per_second']:,.1f}")
    return table


def _hops(hops: list[dict[str, Any]]) -> Table:
    table = _table("hops between neighbours", "ranks", "message", "bytes", "us", "GB/s")
    for hop in hops:
        where = f"{hop['ranks'][0]} - {hop['ranks'][1]}, " + (
            "on one node" if len(set(hop["nodes"])) == 1 else "between nodes"
        )
        for name, entry in hop["sizes"].items():
            rate = entry["bytes"] / entry["seconds"] / 1e9
            table.add_row(where, name, f"{entry['bytes']:,}", f"{entry['seconds'] * 1e6:,.1f}", f"{rate:,.1f}")
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
