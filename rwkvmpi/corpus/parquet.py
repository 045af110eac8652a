"""The rows of a .parquet file: their sizes and ids in one pass, their texts from any row on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from rwkvmpi.corpus.containers import printable
from rwkvmpi.errors import DocumentError

# What is decoded at once; a row whose text is longer is held in memory whole.
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 4096
_READ_BYTES = 1 << 20
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


class ParquetRow(NamedTuple):
    """One row: bytes of its text (or None), the id's value (or None)."""

    nbytes: int | None
    identifier: Any


class ParquetText:
    """The text column of a parquet file; rows are counted through the whole file."""

    def __init__(self, file: BinaryIO, text_key: str, id_key: str | None = None) -> None:
        """Reads only the footer. DocumentError when it is no parquet file or the column is missing or holds no text."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _arrow_errors():
            self._file = pq.ParquetFile(file, pre_buffer=False, buffer_size=_READ_BYTES)
            schema = self._file.schema_arrow
        if text_key not in schema.names:
            columns = printable(", ".join(schema.names[:10]))
            raise DocumentError(f"the file has no column {text_key!r}; its columns are: {columns}")
        kind = schema.field(text_key).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if str(kind) not in _TEXT_TYPES:
            raise DocumentError(f"the column {text_key!r} holds {kind}, not text")
        self._text_key = text_key
        self._id_key = id_key if id_key in schema.names and id_key != text_key else None
        self._columns = [text_key] + ([self._id_key] if self._id_key else [])
        metadata = self._file.metadata
        self._group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    @property
    def rows(self) -> int:
        return sum(self._group_rows)

    def lengths_and_ids(self) -> Iterator[ParquetRow]:
        """Every row in order. DocumentError where the file turns out to be broken."""
        import pyarrow.compute as pc

        for group in range(len(self._group_rows)):
            for batch in self._batches(group, self._columns):
                lengths = pc.binary_length(self._plain(batch.column(0))).to_pylist()
                identifiers = batch.column(1).to_pylist() if self._id_key else [None] * len(lengths)
                yield from map(ParquetRow, lengths, identifiers)

    def texts(self, first_row: int) -> Iterator[bytes | None]:
        """The texts from row `first_row` on, as bytes; None for null. DocumentError where the file is broken."""
        for group, count in enumerate(self._group_rows):
            if first_row >= count:
                first_row -= count
                continue
            for batch in self._batches(group, [self._text_key]):
                if first_row >= batch.num_rows:
                    first_row -= batch.num_rows
                    continue
                column = self._plain(batch.column(0))
                for row in range(first_row, len(column)):
                    yield column[row].as_py()
                first_row = 0

    def _batches(self, group: int, columns: list[str]) -> Iterator[Any]:
        """Batches of a few MB: as many rows as that is on average."""
        metadata = self._file.metadata.row_group(group)
        leaves = (metadata.column(leaf) for leaf in range(metadata.num_columns))
        size = sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema == self._text_key)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * max(1, metadata.num_rows) // max(1, size)))
        with _arrow_errors():
            batches = self._file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
            yield from batches

    @staticmethod
    def _plain(column: Any) -> Any:
        import pyarrow as pa

        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        return column.cast(pa.large_binary())


class _arrow_errors:
    """Turn pyarrow's errors into DocumentError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow as pa

        if isinstance(error, (pa.ArrowException, OSError)):
            raise DocumentError(f"the parquet data cannot be read: {printable(str(error).splitlines()[0])}") from error
