"""Counting tokens without a model: what `plan` needs to know about an input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rwkvmpi.corpus.index import CorpusIndex
from rwkvmpi.corpus.part import CorpusPart
from rwkvmpi.corpus.readers import TextReader
from rwkvmpi.corpus.tokenizers import Tokenizer
from rwkvmpi.errors import DocumentError


class DocumentCount(NamedTuple):
    """doc: number in the index; nbytes, ntokens: of its text, as far as it could be read; error: why no further."""

    doc: int
    nbytes: int
    ntokens: int
    error: str | None


def count_tokens(index: CorpusIndex | CorpusPart, tokenizer: Tokenizer) -> Iterator[DocumentCount]:
    """Reads and tokenises every document, in input order, in this process; holds a few blocks at a time."""
    with TextReader(index.text_key) as reader:
        for ref in index:
            nbytes = ntokens = 0
            error = None
            try:
                with reader.open(ref) as stream:
                    for block in tokenizer.blocks(stream):
                        nbytes += block.nbytes
                        ntokens += len(block.tokens)
            except DocumentError as problem:
                error = str(problem)
            yield DocumentCount(ref.index, nbytes, ntokens, error)
