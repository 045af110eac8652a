"""A large HDF5 file written from front to back without harm from a full disk, and its digest on the way."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from rwkvmpi.store.digest import STRING, DatasetDigest, combine, dtype_word
from rwkvmpi.store.files import TEMP_SUFFIX, publish, write_error
from rwkvmpi.store.shard_file import CHECKED, chunk_shape


class _GuardedFile(io.RawIOBase):
    """A file whose writes never fail for its caller. HDF5 crashes the process when it cannot write while closing; here
    the first error is kept, later writes are dropped, and whoever closed the file asks for the error."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._position = 0
        self.error: OSError | None = None

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._descriptor, [buffer], self._position)
        self._position += count
        return count

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self.error is None:
            try:
                done += os.pwrite(self._descriptor, view[done:], self._position + done)
            except OSError as error:
                self.error = error
        self._position += len(view)
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (os.fstat(self._descriptor).st_size if base is None else base)
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None) -> int:
        wanted = self._position if size is None else size
        if self.error is None:
            try:
                os.ftruncate(self._descriptor, wanted)
            except OSError as error:
                self.error = error
        return wanted

    def sync(self) -> None:
        """Force everything to disk, unless a write failed already."""
        if self.error is None:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self.error = error

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class H5Output:
    """An HDF5 file under a temporary name, a context manager: `publish` gives it its name, anything else removes it.

    Datasets get chunks of about 64 KiB with Fletcher-32 checksums; HDF5 has none for text, which the digest covers like
    everything else. Token ids are packed with shuffle and gzip 1 (measured: to 9% for bytes, 27% for a vocabulary of
    65,536, at 140 to 370 MB/s), which halves a file of scores; nothing else is: log-probabilities and states would lose
    some 15% at 80 and 13 MB/s. lzf is faster, but other programs than h5py cannot read it.
    """

    def __init__(self, path: Path) -> None:
        import h5py

        self.path = path
        self._temp = path.with_name(path.name + TEMP_SUFFIX)
        try:
            self._guarded = _GuardedFile(self._temp)
        except OSError as error:
            raise write_error(path, 0, error) from error
        self._file = h5py.File(self._guarded, "w")
        self._digests: dict[str, DatasetDigest] = {}
        self._published = False

    def __enter__(self) -> H5Output:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._published:
            with suppress(Exception):
                self._file.close()
            self._guarded.close()
            with suppress(OSError):
                self._temp.unlink()

    def set_attributes(self, group: str, **attributes: Any) -> None:
        """Set attributes of a group, which is made if need be."""
        self._file.require_group(group).attrs.update(attributes)

    def create(
        self, path: str, shape: tuple[int, ...], dtype: Any, chunks: tuple[int, ...] | None = None, pack: bool = False
    ) -> None:
        """A dataset to be filled by `append`; dtype str: text; pack: compressed."""
        import h5py

        kind = h5py.string_dtype("utf-8") if dtype is str else np.dtype(dtype)
        options: dict[str, Any] = {"track_times": False}
        if dtype is not str and 0 not in shape:  # text and empty datasets cannot have checksums
            options = {"chunks": chunks or chunk_shape(shape, kind), **CHECKED}
            if pack:
                options.update(shuffle=True, compression="gzip", compression_opts=1)
        self._file.create_dataset(path, shape=shape, dtype=kind, **options)
        self._digests[f"/{path}"] = DatasetDigest(STRING if dtype is str else dtype_word(kind), shape)

    def append(self, path: str, start: int, values: np.ndarray | list[str]) -> None:
        """Rows start.. of a dataset; rows are given in order, each once. UserError as soon as the disk is full."""
        if len(values):
            try:
                self._file[path][start : start + len(values)] = values
            except OSError as error:  # HDF5 read back what could not be written
                raise self._refusal(error) from error
        digest = self._digests[f"/{path}"]
        if isinstance(values, list):
            digest.update_strings(values)
        else:
            digest.update(values)
        self.check()

    def check(self) -> None:
        """UserError when something could not be written."""
        if self._guarded.error is not None:
            raise self._refusal(self._guarded.error)

    def digest(self, attributes: dict[str, Any]) -> str:
        """The content digest of all that was appended (see digest.py)."""
        return combine(attributes, self._digests)

    def publish(self) -> None:
        """Complete the file and give it its name, durably. UserError when the disk is full."""
        try:
            self._file.close()
        except (OSError, RuntimeError) as error:
            raise self._refusal(self._guarded.error or OSError(str(error))) from error
        self._guarded.sync()
        self.check()
        self._guarded.close()
        try:
            publish(self._temp, self.path)
        except OSError as error:
            raise self._refusal(error) from error
        self._published = True

    def _refusal(self, error: OSError) -> Exception:
        size = self._temp.stat().st_size if self._temp.exists() else 0
        return write_error(self.path, size, self._guarded.error or error)
