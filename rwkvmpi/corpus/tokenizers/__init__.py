"""Tokenizers: text as bytes to tokens. Which one fits a model is decided by the model's vocabulary alone."""

from __future__ import annotations

from rwkvmpi.corpus.tokenizers.base import TokenBlock, Tokenizer
from rwkvmpi.errors import UserError

__all__ = ["TokenBlock", "Tokenizer", "load_tokenizer"]

_BYTES, _WORLD = 256, 65536


def load_tokenizer(spec: str, vocab_size: int) -> Tokenizer:
    """The tokenizer that `spec` names: "auto", "world", "bytes", or the path of a tokenizer JSON.

    UserError unless it fits a model of `vocab_size` tokens: a wrong tokenizer would give valid ids and garbage.
    """
    if spec == "auto":
        if vocab_size not in (_BYTES, _WORLD):
            raise UserError(
                f"no tokenizer is known for a model of {vocab_size} tokens (models of the Pile have 50277 or a few "
                "more and need 20B_tokenizer.json); name it with --tokenizer FILE.json"
            )
        spec = "bytes" if vocab_size == _BYTES else "world"
    if spec == "bytes":
        from rwkvmpi.corpus.tokenizers.bytes_ import BytesTokenizer

        _check(spec, _BYTES, vocab_size)
        return BytesTokenizer()
    if spec == "world":
        from rwkvmpi.corpus.tokenizers.world import WorldTokenizer

        _check(spec, _WORLD, vocab_size)
        return WorldTokenizer()
    from rwkvmpi.corpus.tokenizers.bpe import BpeTokenizer

    return BpeTokenizer(spec, vocab_size)


def _check(spec: str, fits: int, vocab_size: int) -> None:
    if vocab_size != fits:
        raise UserError(
            f"the tokenizer {spec!r} fits models of {fits} tokens and this model knows {vocab_size}; "
            "use the tokenizer that the model was trained with, or auto"
        )
