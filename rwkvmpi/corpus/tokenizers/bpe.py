"""Byte-level BPE from a Hugging Face tokenizer JSON, such as the 20B tokenizer of the Pile models.

The text is cut before white space that follows something else: no token of such a tokenizer reaches over that place.
Where a window holds no such place it is cut at its last character; tokens may then differ from those of the text
in one piece, but are always the same. If the file asks for NFC, as 20B does, the tokens stand for the normalised text.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from rwkvmpi.corpus.tokenizers.base import Tokenizer, incomplete_tail
from rwkvmpi.errors import DocumentError, UserError

_MAX_FILE_BYTES = 64 << 20
_MAX_SPARE_IDS = 1024  # models pad their vocabulary to round numbers
_SPACE = re.compile(rb"[ \t\n\r]")
_INVALID = re.compile("([\udc80-\udcff])")


class BpeTokenizer(Tokenizer):
    """A tokenizer JSON: model BPE, pre-tokenizer ByteLevel without prefix space, normaliser NFC or none."""

    def __init__(self, path: str, vocab_size: int) -> None:
        """UserError when the file cannot be used, or its ids do not fit a model of `vocab_size`."""
        import tokenizers

        text, settings = _read(path)
        _check_settings(path, settings)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text.decode("utf-8"))
        except Exception as error:  # the library has no class of its own
            raise UserError(f"{path} is not a tokenizer file that can be read: {error}") from error
        # A file may ask to cut texts off or to fill them up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        highest = max(vocabulary.values(), default=-1)
        if not highest < vocab_size <= highest + 1 + _MAX_SPARE_IDS:
            raise UserError(
                f"the tokenizer {path} has ids up to {highest} and does not fit the model, which knows {vocab_size} "
                "tokens; use the tokenizer that the model was trained with"
            )
        self.name = Path(path).name
        self.sha256 = hashlib.sha256(text).hexdigest()
        self.vocab_size = vocab_size
        characters = _byte_characters()
        self._byte_ids = {byte: vocabulary[char] for char, byte in characters.items() if char in vocabulary}
        added = {int(token["id"]): str(token["content"]) for token in settings.get("added_tokens") or []}
        self._bytes_of = {number: content.encode() for number, content in added.items()}
        for content, number in vocabulary.items():
            if number not in self._bytes_of:
                self._bytes_of[number] = bytes(characters[char] for char in content if char in characters)

    def decode(self, ids: np.ndarray) -> bytes:
        try:
            return b"".join([self._bytes_of[number] for number in np.asarray(ids).tolist()])
        except KeyError as error:
            raise ValueError(f"token {error.args[0]} is not in {self.name}") from None

    def _take(self, window: bytes, final: bool) -> tuple[np.ndarray, int]:
        if not final:
            window = window[: _cut(window)]
        parts: list[int] = []
        # Invalid bytes become lone surrogates, one each, which valid text cannot hold.
        for part in _INVALID.split(window.decode("utf-8", "surrogateescape")):
            if _INVALID.fullmatch(part):
                parts.append(self._id_of_byte(ord(part) - 0xDC00))
            elif part:
                parts += self._tokenizer.encode(part, add_special_tokens=False).ids
        return np.array(parts, dtype=np.int32), len(window)

    def _id_of_byte(self, byte: int) -> int:
        if byte not in self._byte_ids:
            raise DocumentError(f"the text is not UTF-8, and {self.name} has no token for its byte 0x{byte:02x}")
        return self._byte_ids[byte]


def _cut(window: bytes) -> int:
    """Where to cut the window: before the last white space behind something else, or at the end of its characters."""
    whole = len(window) - incomplete_tail(window)
    for match in reversed(list(_SPACE.finditer(window, 1, whole))):
        place = match.start()
        before = window[max(0, place - 4) : place].decode("utf-8", "ignore")[-1:]
        # An invalid byte is tokenised by itself, so a cut behind it is as good.
        if not before.isspace():
            return place
    return whole


def _read(path: str) -> tuple[bytes, dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"the tokenizer {path} cannot be read: {error.strerror}") from error
    if len(text) > _MAX_FILE_BYTES:
        raise UserError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB and no tokenizer file")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a tokenizer file: it is not JSON ({error})") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise UserError(f'{path} is not a tokenizer file: it has no object "model"')
    return text, settings


def _check_settings(path: str, settings: dict[str, Any]) -> None:
    """Refuse what would make the tokens depend on where a block is cut, or on chance."""
    model = settings["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{path} holds a {model.get('type')} tokenizer; only byte-level BPE can be used")
    if model.get("dropout"):
        raise UserError(f"{path} asks for BPE dropout, which draws tokens by chance; set it to null")
    before = settings.get("pre_tokenizer") or {}
    if before.get("type") != "ByteLevel" or before.get("add_prefix_space") or not before.get("use_regex", True):
        raise UserError(f"{path} has the pre-tokenizer {before}; only ByteLevel without prefix space can be used")
    normalizer = settings.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise UserError(f"{path} has the normaliser {normalizer.get('type')}; only NFC or none can be used")
    for token in settings.get("added_tokens") or []:
        content = str(token.get("content"))
        if token.get("rstrip") or token.get("single_word") or re.search(r"\S\s", content):
            raise UserError(f"{path} has the added token {content!r}, which reaches over white space")


def _byte_characters() -> dict[str, int]:
    """{character: byte}: byte-level BPE writes printable bytes as themselves, the others as characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
