"""`response_format`: a grammar of JSON restricts what the AR model may write, by the library llguidance.

Every token is chosen among those with which the text can still become JSON that the schema allows; when it is
complete, only a stop token is left. A draft that breaks the grammar is rejected, since no token that the mask
leaves out is ever chosen. llguidance is an optional package, imported inside functions.

Shape suffixes: L tokens so far, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from opdlm.decoding.rollout import Rollout
from opdlm.errors import require_package
from opdlm.serving.protocol import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

MOST_SCHEMA = 2**16
"""Characters of a schema. The masks of a longer one would take the time of the other requests."""
OPTIONS: JsonCompileOptions = {"whitespace_pattern": r" |\n {0,16}", "lenient": False}
"""Between values stands a space, or a line break and the indentation: no model writes spaces for ever. No key
of a schema is ignored.
"""


class GrammarProcessor(LogitsProcessor):
    """Gives -inf to the tokens of one response that its grammar does not allow."""

    def __init__(self, matcher: LLMatcher, num_prompt: int, stop_token_ids: Sequence[int]) -> None:
        self.matcher, self.num_prompt, self.stop_token_ids = matcher, num_prompt, {*stop_token_ids}
        self.taken: list[int] = []
        """The tokens that the matcher has read."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[1, L]` and `[1, V]` -> `[1, V]`. The tokens may be those of a draft: they replace the ones of
        earlier calls. Scores behind a token that is not allowed, or that ends the text, do not matter.
        """
        ids = input_ids[0, self.num_prompt :].tolist()
        if not self.stop_token_ids.isdisjoint(ids) or not self.read(ids):
            return scores
        is_allowed_V = torch.zeros(scores.shape[1], dtype=torch.bool)
        if not self.matcher.is_stopped():
            bias_V = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
            is_allowed_V[: len(bias_V)] = bias_V[: len(is_allowed_V)] > 0
        allowed = scores.masked_fill(~is_allowed_V.to(scores.device), -torch.inf)
        if (allowed > -torch.inf).any():
            return allowed
        is_stop_V = torch.zeros_like(is_allowed_V).index_fill(0, torch.tensor([*self.stop_token_ids]), True)
        return scores.masked_fill(~is_stop_V.to(scores.device), -torch.inf)

    def read(self, ids: list[int]) -> bool:
        """Whether the grammar allows these tokens, which replace those that were read before."""
        pairs = enumerate(zip(self.taken, ids, strict=False))
        num_same = next((n for n, (one, other) in pairs if one != other), min(len(self.taken), len(ids)))
        self.matcher.rollback(len(self.taken) - num_same)
        self.taken = ids[: num_same + self.matcher.try_consume_tokens(ids[num_same:])]
        return len(self.taken) == len(ids)

    def checked(self, put: Callable[[Rollout | Exception], None]) -> Callable[[Rollout | Exception], None]:
        """Passes on a response; an error if the grammar does not allow it, because no token went on."""

        def end(result: Rollout | Exception) -> None:
            if isinstance(result, Rollout) and not self.is_followed(result.text_ids):
                reason = self.matcher.get_error().partition("\n")[0] or "no token goes on"
                result = RuntimeError(f"response_format cannot be followed with this vocabulary: {reason}")
            put(result)

        return end

    def is_followed(self, ids: Sequence[int]) -> bool:
        """Whether the grammar allows a response: before a stop token a whole one, else its beginning."""
        if ids[-1:] and ids[-1] in self.stop_token_ids:
            return self.read([*ids[:-1]]) and self.matcher.is_accepting()
        return self.read([*ids])


class VocabularyText:
    """A tokenizer as llguidance reads those whose decoder it does not know: the text of every token."""

    bos_token_id = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_id: int) -> None:
        self.tokenizer, self.eos_token_id = tokenizer, eos_token_id
        self.special_token_ids = tokenizer.all_special_ids
        texts = (str(tokenizer.decode([token])) for token in range(len(tokenizer)))
        self.tokens = [b"" if "\ufffd" in text else text.encode() for text in texts]  # no parts of characters

    def __call__(self, text: str) -> list[int]:
        """Token ids without those of unknown words, which no text may hold."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [token for token in ids if token not in self.special_token_ids]


def grammar_tokenizer(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> LLTokenizer:
    """The tokenizer as the grammars read it; seconds for a large vocabulary. InvalidRequest without
    llguidance.
    """
    require_package("llguidance", "serve", "response_format")
    from llguidance import LLTokenizer, TokenizerWrapper
    from llguidance.hf import from_tokenizer

    if not stop_token_ids:
        raise InvalidRequest("response_format: the model has no stop token, which must follow the JSON.")
    try:
        return from_tokenizer(tokenizer, eos_token=[*stop_token_ids])  # type: ignore[arg-type]
    except ValueError:
        vocabulary = VocabularyText(tokenizer, stop_token_ids[0])
    missing = [sign for sign in '{}[]",:' if sign.encode() not in vocabulary.tokens]
    if missing:
        raise InvalidRequest(
            f"response_format: the vocabulary has no {' '.join(missing)} to write JSON with."
        )
    return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=[*stop_token_ids])


def matcher_of(tokenizer: LLTokenizer, schema: Mapping[str, Any]) -> LLMatcher:
    """The grammar of a JSON schema. Raises InvalidRequest with the sentence of llguidance."""
    from llguidance import LLMatcher

    text = json.dumps(schema)
    if len(text) > MOST_SCHEMA:
        raise InvalidRequest(
            f"response_format has a schema of {len(text)} characters: at most {MOST_SCHEMA}."
        )
    grammar = LLMatcher.grammar_from_json_schema(text, overrides=OPTIONS)
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if matcher.is_error():
        reason = " ".join(matcher.get_error().split())
        raise InvalidRequest(f"response_format has a schema that is not supported: {reason[:400]}.")
    return matcher
