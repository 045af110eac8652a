"""Writing input files of every kind for the tests."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zstandard


def compress(data: bytes, compression: str) -> bytes:
    if compression == "gz":
        return gzip.compress(data)
    if compression == "zst":
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return data


def write(path: Path, data: bytes) -> Path:
    """Write the bytes, compressed as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix[1:]
    path.write_bytes(compress(data, suffix if suffix in ("gz", "zst") else ""))
    return path


def jsonl(records: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def parquet(columns: dict[str, Any], row_group_size: int = 7) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, row_group_size=row_group_size)
    return sink.getvalue().to_pybytes()
