"""What a feeder tells about a document while it is read: Begin, Block..., then End or Failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np


class TokenCursor(NamedTuple):
    """A block boundary of a document, from which tokenising can go on.

    byte_start: bytes of the document before the boundary; tokens_before: tokens before it.
    """

    byte_start: int
    tokens_before: int


class InFlight(NamedTuple):
    """Where a document stands that goes on in the next chunk.

    doc: its number in the index; position: its first position that no chunk holds yet (a multiple of 32, at least 32);
    cursor: the boundary of the block that holds the input of that position, token `position - 1`.
    """

    doc: int
    position: int
    cursor: TokenCursor


@dataclass(frozen=True, slots=True)
class Begin:
    """A document was opened. position: 0, or the position (multiple of 32) at which an interrupted one goes on."""

    doc: int
    position: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The next tokens of the document: int32 [n], n >= 1; the first is token number `first_token` of the document,
    and its text begins at byte `byte_start`."""

    doc: int
    byte_start: int
    first_token: int
    tokens: np.ndarray


@dataclass(frozen=True, slots=True)
class End:
    """The document is complete: its text has `nbytes` bytes and `ntokens` tokens, counted from its start."""

    doc: int
    nbytes: int
    ntokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The document cannot be read (any further); `error` is one sentence. May come without a Begin."""

    doc: int
    error: str


Event: TypeAlias = Begin | Block | End | Failed
