"""The bytes of the text that a token stands for, also where it is a part of a character."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE_OF: dict[str, int] = {character: byte for byte, character in bytes_to_unicode().items()}
"""By character of a byte-level vocabulary."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "▁"
"""How SentencePiece writes a space."""


class TokenBytes:
    """Reads the bytes of tokens from the vocabulary, as the tokenizer's decoder would."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def of(self, token: int, *, is_first: bool) -> list[int] | None:
        """The bytes of a token id; None for a part of a character whose bytes are not known. `is_first`: it
        starts a text, where the decoder may drop a space.
        """
        piece: str | None = self.tokenizer.convert_ids_to_tokens([token])[0]
        text = str(self.tokenizer.decode([token]))
        if piece is None or token in self.added_ids:
            return list(text.encode())
        if "ByteLevel" in self.decoders and BYTE_OF.keys() >= {*piece}:
            return [BYTE_OF[character] for character in piece]
        if "ByteFallback" in self.decoders and (found := BYTE_TOKEN.fullmatch(piece)):
            return [int(found[1], 16)]
        if SPACE in self.decoders and not is_first:
            return list(piece.replace(SPACE, " ").encode())
        return None if "\ufffd" in text else list(text.encode())

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Tokens that stand for themselves."""
        return frozenset(self.tokenizer.added_tokens_decoder)

    @cached_property
    def decoders(self) -> frozenset[str]:
        """Kinds of the steps of decoding, and SPACE where it becomes a space; empty if they are not known."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return frozenset(kinds_in(backend and json.loads(backend.to_str())["decoder"]))


def kinds_in(decoder: dict[str, Any] | None) -> Iterator[str]:
    """The kinds of a decoder of `tokenizers` and of its parts."""
    if decoder is None:
        return
    yield decoder["type"]
    if decoder["type"] == "Metaspace" or decoder.get("pattern") == {"String": SPACE}:
        yield SPACE
    for part in decoder.get("decoders", ()):
        yield from kinds_in(part)
