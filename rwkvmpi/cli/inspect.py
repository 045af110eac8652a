"""rwkvmpi inspect PATH"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Verify every checksum; exit code 1 when something is wrong.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(path: Path, check: bool, as_json: bool) -> None:
    """What PATH is: a model file (or the word bundled), a run folder, or an HDF5 file of ours."""
    from rwkvmpi.store import inspect as store

    ours = store.is_ours(path)
    faults = (store.check(path) if ours else _check_model(path)) if check else []
    facts = _facts(path, ours, faults)
    if check:
        facts["faults"] = faults
    click.echo(json.dumps(facts, indent=1) if as_json else "\n".join(lines(facts)))
    sys.exit(1 if faults else 0)


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text, one per line; faults last, in words."""
    shown = []
    for key, value in facts.items():
        if key == "faults":
            continue
        if isinstance(value, dict) and value:
            shown.append(f"{key}")
            shown += [f"  {name:<24} {_short(entry)}" for name, entry in value.items()]
        elif value not in (None, [], {}):
            shown.append(f"{key:<16} {_short(value)}")
    if "faults" in facts:
        shown += [f"DAMAGED: {fault}" for fault in facts["faults"]] or ["every checksum holds"]
    return shown


def _short(value: Any) -> str:
    text = f"{value:,}" if type(value) is int else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _facts(path: Path, ours: bool, faults: list[str]) -> dict[str, Any]:
    from rwkvmpi.errors import UserError
    from rwkvmpi.store.inspect import describe

    try:
        return describe(path) if ours else _describe_model(path)
    except UserError:
        if faults:  # too damaged to be described; the faults say so
            return {"path": str(path)}
        raise


def _open_model(path: Path) -> Any:
    from rwkvmpi.models.checkpoint import open_checkpoint

    return open_checkpoint(path)


def _describe_model(path: Path) -> dict[str, Any]:
    from dataclasses import asdict

    with _open_model(path) as model:
        shape = {key: value for key, value in asdict(model.shape).items() if key != "version"}
        return {
            "kind": "model",
            "path": str(model.path),
            "version": f"RWKV-{model.version}",
            "parameters": model.parameters(),
            "dtype": model.dtype_name,
            "bytes": sum(file.stat().st_size for file in model.files),
            "shape": shape,
            "sha256": model.sha256(),
        }


def _check_model(path: Path) -> list[str]:
    """A model file has no checksums of its own: its structure is checked by opening it, its values for NaN and Inf."""
    from rwkvmpi.errors import UserError
    from rwkvmpi.models.checkpoint import check_finite

    if not path.exists() and str(path) != "bundled":
        raise UserError(f"{path}: there is no such file or folder")
    try:
        with _open_model(path) as model:
            check_finite(model, model.names())
    except UserError as error:
        return [str(error)]
    return []
