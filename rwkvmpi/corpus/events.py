"""What a feeder tells about a document while it is read: Begin, Block..., then End or Failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np


class TokenCursor(NamedTuple):
    """A block boundary of a document, from which tokenising can go on.

    byte_start: bytes of the document before the boundary; tokens_before: tokens before it. In a document that was
    handed on (see Begin) both count from where the earlier run ended.
    """

    byte_start: int
    tokens_before: int


class InFlight(NamedTuple):
    """Where a document stands that goes on in the next chunk.

    doc: its number in the index; position: its first position that no chunk holds yet (a multiple of 32, at least 32;
    one more if it was handed on); cursor: the boundary of the block that holds the input of that position, token
    `position - 1`.
    """

    doc: int
    position: int
    cursor: TokenCursor


@dataclass(frozen=True, slots=True)
class Begin:
    """A document was opened. position: 0, or the position (multiple of 32) at which an interrupted one goes on.

    handed_on: an earlier run read the text up to here. Then bytes, tokens and positions count from where it ended:
    position 0 is the last one that it read, and the document begins at position 1, or goes on at 1 more than a multiple
    of 32.
    """

    doc: int
    position: int = 0
    handed_on: bool = False


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
    """The document is complete: its text has `nbytes` bytes and `ntokens` tokens, counted from its start (or from where
    it was handed on). sha256: of all bytes of its text, those before a hand-on too; b"" when nobody asked for it."""

    doc: int
    nbytes: int
    ntokens: int
    sha256: bytes = b""


@dataclass(frozen=True, slots=True)
class Failed:
    """The document cannot be read (any further); `error` is one sentence. May come without a Begin."""

    doc: int
    error: str


Event: TypeAlias = Begin | Block | End | Failed
