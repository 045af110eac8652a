"""The index: every document of the input, in order, with its id, its place and its size; texts are not kept."""

from __future__ import annotations

import hashlib
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from rwkvmpi.corpus.containers import document_errors, open_decompressed, open_raw, printable, split_kind, spool
from rwkvmpi.corpus.inputs import Source, find_sources
from rwkvmpi.corpus.parquet import ParquetText
from rwkvmpi.corpus.records import identifier_of, lines_of, measure
from rwkvmpi.corpus.unique import rename_duplicates
from rwkvmpi.errors import DocumentError, UserError

_FINGERPRINT_BYTES = 64 << 10
Fingerprint = tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class DocumentRef:
    """One document. index: its number in input order; id: unique among the documents; source: path of its file; kind:
    "txt", "jsonl.gz", ...; locator: .jsonl: byte where its line begins in the decompressed file, .parquet: row, else 0;
    nbytes: bytes of its text, an estimate for .txt.gz and .txt.zst, 0 when unknown; error: why it cannot be read;
    handed_bytes, handed_sha256: so many bytes of it, with this SHA-256 (hex), were read by the run from which it is
    handed on; no SHA-256: it is read from its start."""

    index: int
    id: str
    source: str
    kind: str
    locator: int
    nbytes: int
    error: str | None
    handed_bytes: int = 0
    handed_sha256: str = ""


class CorpusIndex(Sequence[DocumentRef]):
    """All documents, in input order: files sorted by path, records in file order. Made by build_index().

    Some 30 bytes a document, besides the ids that the records bring along. It can be pickled.
    """

    def __init__(self, text_key: str, id_key: str | None) -> None:
        self.text_key = text_key
        self.id_key = id_key
        self.sources: list[Source] = []
        self._first = array("q")  # number of each source's first document
        self._locators = array("q")
        self._nbytes = array("q")
        self._id_ends = array("q")  # where each document's own id ends in _id_bytes; no bytes: the default id
        self._id_bytes = bytearray()
        self._renamed: dict[int, str] = {}
        self._errors: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._locators)

    def __getitem__(self, number):  # type: ignore[no-untyped-def]
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # IndexError, and negative numbers
        source = self.sources[self._source_of(number)]
        return DocumentRef(
            number,
            self.id(number),
            source.path,
            source.kind,
            self._locators[number],
            self._nbytes[number],
            self._errors.get(number),
        )

    def __iter__(self) -> Iterator[DocumentRef]:
        return (self[number] for number in range(len(self)))

    def id(self, number: int) -> str:
        """The document's unique id: the record's own, else "<file>" or "<file>#<record>", records counted from 1."""
        return self._renamed.get(number) or self._plain_id(number)

    @property
    def nbytes(self) -> np.ndarray:
        """int64 [documents]: bytes of each text as far as known (see DocumentRef). A copy."""
        return np.array(self._nbytes, dtype=np.int64)

    @property
    def errors(self) -> dict[int, str]:
        """Document number -> why it cannot be read, for those where that was seen already."""
        return dict(self._errors)

    def fingerprint(self) -> list[Fingerprint]:
        """(source, bytes, SHA-256 of its first and last 64 KiB) of each file; (source, -1, "") if unreadable."""
        return [_fingerprint(source.path) for source in self.sources]

    def _source_of(self, number: int) -> int:
        return int(np.searchsorted(np.frombuffer(self._first, dtype=np.int64), number, side="right")) - 1

    def _plain_id(self, number: int) -> str:
        start = self._id_ends[number - 1] if number else 0
        if own := self._id_bytes[start : self._id_ends[number]]:
            return own.decode()
        position = self._source_of(number)
        source = self.sources[position]
        if source.kind.startswith("txt"):
            return source.name
        return f"{source.name}#{number - self._first[position] + 1}"

    def _add(self, locator: int, nbytes: int, identifier: str | None = None, error: str | None = None) -> None:
        if error is not None:
            self._errors[len(self)] = sys.intern(error)  # a file may hold millions of records with the same mistake
        if identifier:
            self._id_bytes += identifier.encode()
        self._locators.append(locator)
        self._nbytes.append(nbytes)
        self._id_ends.append(len(self._id_bytes))

    def _add_source(self, source: Source) -> None:
        """Every document of one file; what cannot be read ends in one document with an error."""
        before = len(self)
        self.sources.append(source)
        self._first.append(before)
        if source.error is not None:
            self._add(0, 0, error=source.error)
            return
        form, compression = split_kind(source.kind)
        try:
            with document_errors(source.path):
                if form == "txt":
                    with open_raw(source.path) as file:
                        self._add(0, _text_size(file, compression))
                elif form == "jsonl":
                    self._add_lines(source.path, compression)
                else:
                    self._add_rows(source.path, compression)
        except DocumentError as error:
            self._add(0, 0, error=str(error))
        if len(self) == before:  # a file without a single record holds no document
            self.sources.pop()
            self._first.pop()

    def _add_lines(self, path: str, compression: str) -> None:
        with open_decompressed(path, compression) as stream:
            for line in lines_of(stream):
                try:
                    self._add(line.offset, *measure(line, self.text_key, self.id_key))
                except DocumentError as error:
                    self._add(line.offset, 0, error=str(error))

    def _add_rows(self, path: str, compression: str) -> None:
        with spool(path, compression) as file:
            for row, (nbytes, value) in enumerate(ParquetText(file, self.text_key, self.id_key).lengths_and_ids()):
                error = f"the value of {self.text_key!r} is null" if nbytes is None else None
                self._add(row, nbytes or 0, identifier_of(value), error)


def build_index(inputs: list[str], text_key: str = "text", id_key: str = "id") -> CorpusIndex:
    """Find every document of the inputs: files, folders (with subfolders) and globs; .txt, .jsonl and .parquet, each
    also .gz or .zst.

    Records are read once, and only their places, sizes and ids are kept. A file or record that cannot be read is one
    document with an error. UserError when an input does not exist or holds nothing to read.
    """
    index = CorpusIndex(text_key, id_key)
    for source in find_sources(inputs):
        index._add_source(source)
    if not len(index):
        raise UserError(f"the input holds no document: {', '.join(map(printable, inputs))} has no record")
    index._renamed = rename_duplicates(len(index), index._plain_id)
    return index


def order(nbytes: np.ndarray) -> np.ndarray:
    """int64 [documents]: the order in which documents of `nbytes` are queued: by floor(log2(bytes)) descending, input
    order within.

    Longest first, so that no rank is left with a long one at the end; in classes, so that a compressed file is read
    from front to back only once for each class.
    """
    _, classes = np.frexp(nbytes.astype(np.float64))  # 0 bytes: class 0; else floor(log2) + 1
    return np.argsort(-classes, kind="stable").astype(np.int64)


def compare_fingerprints(old: Sequence[Sequence], new: Sequence[Sequence]) -> str | None:
    """A sentence that names the first difference between two results of CorpusIndex.fingerprint(), or None."""
    before = {entry[0]: tuple(entry[1:]) for entry in old}
    after = {entry[0]: tuple(entry[1:]) for entry in new}
    for source in sorted(before.keys() | after.keys()):
        if source not in after:
            return f"the input file {source} is no longer there"
        if source not in before:
            return f"the input file {source} is new"
        if before[source] != after[source]:
            return f"the input file {source} has changed"
    return None


def _fingerprint(path: str) -> Fingerprint:
    try:
        with open_raw(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(file.read(_FINGERPRINT_BYTES))
            return path, size, digest.hexdigest()
    except OSError:
        return path, -1, ""


def _text_size(file: BinaryIO, compression: str) -> int:
    """Bytes of a .txt file's text; for a compressed one what its header or trailer says, which may be wrong."""
    size = os.fstat(file.fileno()).st_size
    if compression == "gz" and size >= 18:
        file.seek(-4, os.SEEK_END)
        # The length of the last member modulo 2^32; deflate never saves more than 1032 : 1.
        return min(max(int.from_bytes(file.read(4), "little"), size), 1032 * size)
    if compression == "zst":
        import zstandard

        try:
            said = zstandard.frame_content_size(file.read(18))
        except zstandard.ZstdError:
            said = 0
        return said if 0 < said < 1 << 50 else 3 * size
    return size
