"""Results for people who do not use HDF5: one record per document, as JSON lines or Parquet."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from rwkvmpi.errors import UserError
from rwkvmpi.store.files import TEMP_SUFFIX, publish
from rwkvmpi.store.results_file import BEFORE, DocumentRow, Results, open_results

FORMATS = ("jsonl", "parquet")
_TOKENS_PER_BLOCK = 1 << 16
_BATCH_RECORDS = 4096
_BATCH_VALUES = 1 << 20  # tokens or vector elements of a Parquet batch, if single documents are not larger


def export_run(run: str | Path, to: str, output: str | Path | None = None, tokens: bool = False) -> Path | None:
    """Write the results of a run folder (or a results.h5) as "jsonl" or "parquet"; the path written, None for stdout.

    output: default RUN/results.jsonl or .parquet; "-": stdout (jsonl only). tokens: with every token's id and
    log-probability (score). NaN becomes null. Failed documents are records with their error. States are not exported,
    only their shapes. UserError when there are no results, or nothing can be written.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: results are exported as {' or '.join(FORMATS)}")
    with open_results(run) as results:
        if tokens and results.task != "score":
            raise UserError(f"{results.path}: --tokens: the task {results.task} records no tokens; leave --tokens out")
        if str(output) == "-":
            if to != "jsonl":
                raise UserError("-o -: Parquet cannot be written to stdout; name a file")
            _write_jsonl(results, sys.stdout.buffer, tokens)
            sys.stdout.flush()
            return None
        path = Path(output) if output is not None else results.path.with_suffix(f".{to}")
        try:
            with _replacing(path) as file:
                (_write_jsonl if to == "jsonl" else _write_parquet)(results, file, tokens)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error}); name another with -o") from error
        return path


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes `path`'s place when it is complete, and leaves nothing behind when it never is."""
    temp = path.with_name(f"{path.name}{TEMP_SUFFIX}")
    try:
        with open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temp, path)
    except BaseException:
        with suppress(OSError):
            temp.unlink()
        raise


def _record(results: Results, row: DocumentRow) -> dict[str, Any]:
    """What both formats say about a document, without its vectors and tokens."""
    record: dict[str, Any] = {"id": row.id, "source": row.source, "bytes": row.bytes, "tokens": row.tokens}
    record.update((name, getattr(row, name)) for name in BEFORE if results.has(f"documents/{name}"))
    if results.task == "score":
        record.update(nll=_or_null(row.nll), bits_per_byte=_or_null(row.bits_per_byte))
    record.update(status=row.status, error=row.error)
    return record


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _windows(results: Results) -> Iterator[dict[str, np.ndarray]]:
    """The embedding rows of every document, in order, read once from front to back."""
    document = results.read("embeddings/document", 0, results.shapes()["embeddings/document"][0])
    ends = np.searchsorted(document, np.arange(len(results)), side="right").tolist()
    for low, high in zip([0, *ends], ends, strict=False):
        yield {name: results.read(f"embeddings/{name}", low, high) for name in ("first_token", "tokens", "vector")}


def _state_shapes(results: Results) -> dict[str, list[int]]:
    shapes = results.shapes()
    return {name: list(shapes[f"states/{name}"][1:]) for name in ("wkv", "shift")}


def _write_jsonl(results: Results, file: IO[bytes], tokens: bool) -> None:
    windows = _windows(results) if results.task == "embed" else None
    for row in results.documents:
        record = _record(results, row)
        if windows is not None:
            found = next(windows)
            places = zip(found["first_token"].tolist(), found["tokens"].tolist(), found["vector"], strict=True)
            record["windows"] = [
                {"first_token": first, "tokens": count, "vector": _shortest(vector)} for first, count, vector in places
            ]
        if results.task == "read":
            place = {"file": str(results.path), "row": row.index}
            record["state"] = {**_state_shapes(results), **place} if row.ok else None
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        if not tokens:
            file.write(f"{text}\n".encode())
            continue
        file.write(text[:-1].encode())  # a long document's tokens are written piece by piece
        for key, which in (("token_ids", 0), ("logprobs", 1)):
            file.write(f', "{key}": ['.encode())
            for start in range(0, row.tokens, _TOKENS_PER_BLOCK):
                values = results.tokens(row.index, start, start + _TOKENS_PER_BLOCK)[which]
                file.write((", " if start else "").encode() + json.dumps(_shortest(values))[1:-1].encode())
            file.write(b"]")
        file.write(b"}\n")


def _shortest(values: np.ndarray) -> list[Any]:
    """Numbers as short as they can be and still give the same float32 back."""
    return [float(str(value)) for value in values] if values.dtype.kind == "f" else values.tolist()


def _write_parquet(results: Results, file: IO[bytes], tokens: bool) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("--to parquet needs the package pyarrow; `pip install pyarrow`, or use --to jsonl") from None
    schema = _schema(pa, results, tokens)
    with pq.ParquetWriter(file, schema) as writer:
        batch: list[dict[str, Any]] = []
        size = 0
        windows = _windows(results) if results.task == "embed" else None
        for row in results.documents:
            record = _record(results, row)
            if tokens:
                record["token_ids"], record["logprobs"] = results.tokens(row.index)
                size += row.tokens
            if windows is not None:
                found = next(windows)
                record.update({"window_first_token": found["first_token"], "window_tokens": found["tokens"]})
                record["vectors"] = list(found["vector"])
                size += found["vector"].size
            if results.task == "read":
                record.update(_state_shapes(results) if row.ok else {"wkv": None, "shift": None}, row=row.index)
            batch.append(record)
            if len(batch) >= _BATCH_RECORDS or size >= _BATCH_VALUES:
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                batch, size = [], 0
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def _schema(pa: Any, results: Results, tokens: bool) -> Any:
    fields = [("id", pa.string()), ("source", pa.string()), ("bytes", pa.int64()), ("tokens", pa.int64())]
    fields += [(name, pa.int64()) for name in BEFORE if results.has(f"documents/{name}")]
    if results.task == "score":
        fields += [("nll", pa.float64()), ("bits_per_byte", pa.float64())]
    fields += [("status", pa.string()), ("error", pa.string())]
    if tokens:
        fields += [("token_ids", pa.list_(pa.int32())), ("logprobs", pa.list_(pa.float32()))]
    if results.task == "embed":
        width = results.shapes()["embeddings/vector"][1]
        fields += [("window_first_token", pa.list_(pa.int64())), ("window_tokens", pa.list_(pa.int64()))]
        fields += [("vectors", pa.list_(pa.list_(pa.float32(), width)))]
    if results.task == "read":
        fields += [("wkv", pa.list_(pa.int64())), ("shift", pa.list_(pa.int64())), ("row", pa.int64())]
    return pa.schema(fields)
