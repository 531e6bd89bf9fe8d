"""The bytes of tokens, joined, are the text; also of tokens that are parts of characters."""

from __future__ import annotations

import pytest
from tiny_checkpoints import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opdlm.data.token_bytes import BYTE_OF, SPACE, TokenBytes

TEXT = "the cat 😀 é\n ended, the"


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_level() -> PreTrainedTokenizerFast:
    pieces = [*BYTE_OF, "Ġt", "he", "th", "the", "Ġthe"]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    merges = [("Ġ", "t"), ("h", "e"), ("t", "he"), ("Ġt", "he")]
    vocabulary.pop("th")
    tokenizer = Tokenizer(models.BPE(dict(zip(vocabulary, range(len(vocabulary)), strict=True)), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2: pieces of SentencePiece, bytes for what they do not have."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *"thecand,", f"{SPACE}t", "he"]
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
    merges = [(SPACE, "t"), ("h", "e")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(tokenizer)


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["byte-level", "byte-fallback"])
def test_joined_bytes_are_the_text_and_parts_of_characters_have_theirs(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids, bytes_of = tokenizer(TEXT)["input_ids"], TokenBytes(tokenizer)
    assert tokenizer.decode(ids) == TEXT
    found = [bytes_of.of(token, is_first=place == 0) for place, token in enumerate(ids)]
    assert [byte for part in found for byte in part or ()] == list(TEXT.encode()) and None not in found
    pairs = zip(ids, found, strict=True)
    parts = [part for token, part in pairs if "\ufffd" in str(tokenizer.decode([token]))]
    assert [byte for part in parts for byte in part or ()] == list("😀é".encode())
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert bytes_of.of(end, is_first=False) == list(b"<|end|>")
    assert bytes_of.of(10_000, is_first=False) == []  # a row of the embedding that no token has


def test_other_tokenizers_have_the_bytes_of_the_text_or_none() -> None:
    tokenizer = tiny_tokenizer(characters="ab\ufffd")
    a, unknown = tokenizer.convert_tokens_to_ids(["a", "\ufffd"])
    for is_first in (True, False):
        assert TokenBytes(tokenizer).of(a, is_first=is_first) == [97]
        assert TokenBytes(tokenizer).of(unknown, is_first=is_first) is None
