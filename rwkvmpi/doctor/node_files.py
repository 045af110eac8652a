"""The files of a model and a tokenizer on this node: their sizes, and their SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rwkvmpi.doctor.node_bounded import bounded
from rwkvmpi.errors import UserError

BLOCK = 8 << 20
STALLED_S = 60.0


def sizes(model: str | None, tokenizer: str) -> dict[str, Any]:
    """Sizes before anything is read: name -> {"path", "bytes"}, or "error" instead of bytes where it cannot be had.

    The names are "tokenizer" and "model", or "model FILE" for each of several files of a model.
    """
    found: dict[str, Any] = {}
    if tokenizer not in ("auto", "world", "bytes"):  # those come with the program, whose files are compared anyway
        found["tokenizer"] = _size(Path(tokenizer))
    if model is None:
        return found
    try:
        files = model_files(model)
    except (UserError, OSError) as error:
        found["model"] = {"path": model, "error": str(error)}
        return found
    for path in files:
        found["model" if len(files) == 1 else f"model {path.name}"] = _size(path)
    return found


def model_files(model: str) -> list[Path]:
    """The files of a model, in the order of their names. UserError where it is none."""
    from rwkvmpi.models.checkpoint import bundled_path, open_checkpoint

    path = bundled_path() if model == "bundled" else Path(model)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise UserError(f"{path}: not a file")  # a pipe would be waited for without end
    with open_checkpoint(path) as checkpoint:
        return sorted(checkpoint.files)


def digests(found: dict[str, Any]) -> dict[str, str]:
    """name -> SHA-256 of every file in `found` (what `sizes` gave). Hung when no byte comes for a minute."""
    return {name: digest(Path(file["path"])) for name, file in sorted(found.items()) if "error" not in file}


def digest(path: Path) -> str:
    """A file's SHA-256 in hex."""
    read = [0]

    def work() -> str:
        whole = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                whole.update(block)
                read[0] += len(block)
        return whole.hexdigest()

    return bounded(work, STALLED_S, lambda: read[0])


def _size(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            return {"path": str(path), "error": "not a file" if path.exists() else "there is no such file"}
        return {"path": str(path), "bytes": path.stat().st_size}
    except OSError as error:
        return {"path": str(path), "error": error.strerror or str(error)}
