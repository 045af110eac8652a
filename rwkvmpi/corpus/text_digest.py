"""The SHA-256 of a document's text, taken while it is read: it tells whether a later text begins with this one."""

from __future__ import annotations

import hashlib

from rwkvmpi.corpus.containers import Readable, printable, skip
from rwkvmpi.corpus.index import DocumentRef
from rwkvmpi.corpus.readers import changed
from rwkvmpi.errors import DocumentError


class HashedText:
    """A stream whose bytes go into `sha256` as they are read."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def read(self, count: int, /) -> bytes:
        """As the stream's own."""
        data = self._stream.read(count)
        self.sha256.update(data)
        return data


def pass_beginning(text: HashedText, ref: DocumentRef) -> None:
    """Read past what an earlier run has read of the document. DocumentError unless it is the very same text."""
    found = skip(text, ref.handed_bytes)
    if found == ref.handed_bytes and text.sha256.hexdigest() == ref.handed_sha256:
        return
    what = f"it has {found:,} bytes now" if found < ref.handed_bytes else "they have another SHA-256 now"
    raise DocumentError(
        f"{printable(ref.source)}: the text does not begin with the {ref.handed_bytes:,} bytes that the run given with "
        f"--from has read of {printable(ref.id)!r} ({what}), and only a text that has grown at its end can be read on; "
        "give it another id, or leave --from out"
    )


def pass_bytes(text: Readable, count: int, ref: DocumentRef) -> None:
    """Read past `count` bytes. DocumentError when there are fewer."""
    if skip(text, count) < count:
        raise DocumentError(changed(ref.source))
