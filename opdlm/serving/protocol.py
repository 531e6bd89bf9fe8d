"""Requests of OpenAI's protocol as pydantic models: every field with its bounds.

A key that would change the answer and is not known here is refused, never ignored; an unknown key with a
neutral value (null, false, 0, empty, or one of `NEUTRAL`) is accepted, as some clients send every key they
know. The description of a field is the end of its error message.
https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import replace
from reprlib import Repr
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from opdlm.data.messages import MESSAGES_RULE, Conversation, Message, check_conversation
from opdlm.decoding.decode_config import LIMITS, MOST, DecodeConfig
from opdlm.errors import OpdlmError

LARGEST = 2**62
MOST_ALTERNATIVES = 20
MOST_BIASES = 1024
NEUTRAL: dict[str, Sequence[Any]] = {
    "length_penalty": [1],
    "best_of": [1],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "add_generation_prompt": [True],
    "modalities": [["text"]],
}
"""Values of unsupported keys that ask for what is done anyway; other values of these keys are refused."""
UNUSED = ("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Keys that concern the books of OpenAI's service and change no answer: any value is accepted."""
SAMPLING = "tokens are sampled with temperature, top_k, top_p and min_p"
GRAMMAR = "response_format takes a JSON schema, and no other grammar is known"
REASONS = {
    "typical_p": SAMPLING,
    "bad_words": "logit_bias of -100 bans tokens",
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice"), GRAMMAR),
    **dict.fromkeys(("guided_grammar", "structured_outputs"), GRAMMAR),
    **dict.fromkeys(("best_of", "use_beam_search", "length_penalty"), "choices are not ranked"),
    **dict.fromkeys(("audio", "modalities"), "the model writes text"),
    **dict.fromkeys(("functions", "function_call"), "tools and tool_choice have taken their place"),
}
"""Why a key is not supported."""
USER_TEXT = ("messages", "prompt", "stop", "suffix")
"""Fields whose values error messages do not repeat."""


class InvalidRequest(OpdlmError):
    """A request that cannot be answered. `status`: the HTTP status of the answer. `retry_after`: the seconds
    after which it is worth trying again.
    """

    def __init__(self, message: str, status: int = 400, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


TokenIds = Annotated[list[int], Field(fail_fast=True)]
"""A list that is refused at its first wrong entry: a long one would otherwise hold the server up."""


def number(low: float, high: float) -> Any:
    """A field for a number between bounds, both included."""
    return Field(None, ge=low, le=high, description=f"a number from {low:g} to {high:g}")


def whole_number(low: int, high: int) -> Any:
    """A field for a whole number between bounds, both included."""
    return Field(None, ge=low, le=high, description=f"a whole number from {low} to {high}")


class StrictModel(BaseModel):
    """JSON types are taken as they are (no `"1"` for 1), and unknown keys are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_neutral_keys(cls, values: Any) -> Any:
        """Leave out unknown keys that ask for nothing, and all but one of the others, which is refused."""
        if not isinstance(values, dict):
            return values
        keys = {field.alias or name for name, field in cls.model_fields.items()}
        known = {key: value for key, value in values.items() if key in keys}
        unknown = (key for key, value in values.items() if key not in known and not is_neutral(key, value))
        return known | {key: values[key] for key in itertools.islice(unknown, 1)}


def is_neutral(key: str, value: Any) -> bool:
    """Whether an unknown key with this value asks for nothing. An empty object may be a schema of JSON."""
    if value is None or key in UNUSED:
        return True
    if key not in NEUTRAL:
        return not value and not isinstance(value, dict)
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[key])


class CountPenalty(LogitsProcessor):
    """OpenAI's penalties of tokens by how often the response has them."""

    def __init__(self, num_prompt: int, presence: float, frequency: float) -> None:
        self.num_prompt, self.presence, self.frequency = num_prompt, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[1, L]` and `[1, V]` -> `[1, V]`."""
        ids, counts = input_ids[0, self.num_prompt :].unique(return_counts=True)
        penalty = self.frequency * counts.to(scores) + self.presence
        return scores.index_add(1, ids, -penalty[None])


class StreamOptions(StrictModel):
    """What a stream sends beside its text."""

    include_usage: bool | None = None
    include_drafts: bool | None = None


class JsonSchema(StrictModel):
    """The schema of a response. It is always followed, `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """What a response must be: any text, any JSON object, or JSON that a schema allows."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("a schema belongs to the type json_schema, and to no other")
        return self


class ModelRequest(StrictModel):
    """The field that all requests share."""

    model: str | None = Field(None, description="the name of the model as text")


class GenerationRequest(ModelRequest):
    """The fields that chats and completions share. None: as the server was started."""

    max_tokens: int | None = whole_number(1, LARGEST)
    max_completion_tokens: int | None = whole_number(1, LARGEST)
    temperature: float | None = number(0, LIMITS["temperature"])
    top_p: float | None = Field(None, gt=0, le=1, description="a number above 0 and at most 1")
    top_k: int | None = whole_number(-1, LARGEST)
    seed: int | None = whole_number(-LARGEST, LARGEST)
    stop: (
        str | Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(fail_fast=True)] | None
    ) = Field(None, description="a text or a list of texts, none of them empty")
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)] | None = Field(
        None, description="a list of token ids"
    )
    ignore_eos: bool | None = Field(None, description="true or false")
    min_tokens: int | None = whole_number(0, LARGEST)
    min_p: float | None = number(0, 1)
    presence_penalty: float | None = number(-2, 2)
    frequency_penalty: float | None = number(-2, 2)
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="a number above 0, at most 100")
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASES)] | None
    ) = Field(None, description=f"an object of at most {MOST_BIASES} token ids with numbers from -100 to 100")
    response_format: ResponseFormat | None = Field(
        None,
        description="an object whose type is text, json_object, or json_schema with an object json_schema of "
        "name and schema",
    )
    n: int | None = whole_number(1, 128)
    user: str | None = Field(None, description="text")
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description="an object whose keys, include_usage and include_drafts, are true or false"
    )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_drafts(self) -> bool:
        """Whether a stream tells after every step what became of each token."""
        return self.stream_options is not None and bool(self.stream_options.include_drafts)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return ((self.stop,) if self.stop else ()) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def schema_of_response(self) -> dict[str, Any] | None:
        """The JSON schema that the response must follow, if any."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        return wanted.json_schema.schema_ if wanted.json_schema is not None else {"type": "object"}

    def logits_processor(
        self, num_prompt: int, num_ids: int, stops: Sequence[int], temperature: float
    ) -> LogitsProcessorList:
        """What the request does to the AR model's logits; empty: nothing. `num_prompt`: tokens of the prompt,
        `num_ids`: size of the vocabulary, `stops`: tokens that end the response.
        """
        found = LogitsProcessorList()
        if self.repetition_penalty not in (None, 1):
            found.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty or 1)))
        if self.presence_penalty or self.frequency_penalty:
            found.append(CountPenalty(num_prompt, self.presence_penalty or 0, self.frequency_penalty or 0))
        if self.logit_bias:
            found.append(SequenceBiasLogitsProcessor(self.token_biases(num_ids)))
        if self.min_tokens and stops:
            found.append(MinNewTokensLengthLogitsProcessor(num_prompt, self.min_tokens, [*stops]))
        if self.min_p and temperature:  # before the logits are divided by the temperature
            found.append(MinPLogitsWarper(self.min_p**temperature))
        return found

    def token_biases(self, num_ids: int) -> list[list[list[int] | float]]:
        """`logit_bias` as transformers takes it. Raises InvalidRequest for a key that is no id."""
        biases: list[list[list[int] | float]] = []
        for key, bias in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < num_ids):
                raise InvalidRequest(
                    f"logit_bias has the key {key[:20]!r}: keys must be token ids from 0 to {num_ids - 1}."
                )
            biases.append([[int(key)], bias])
        return biases

    def length_limit(self, default: int) -> tuple[str, int]:
        """The response tokens asked for, and the key that says so."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", default if self.max_tokens is None else self.max_tokens

    def decode_config(self, default: DecodeConfig, *, logprobs: bool) -> DecodeConfig:
        """The server's settings with those of the request. top_k of 0 or -1 turns the filter off."""
        given = {"temperature": self.temperature, "top_p": self.top_p}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if self.top_k is not None:
            changes["top_k"] = min(self.top_k, MOST) if self.top_k > 0 else None
        return replace(default, logprobs=logprobs, **changes)


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, description=MESSAGES_RULE)
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = Field(
        None, description="a list of objects"
    )
    tool_choice: Literal["auto", "none"] | None = Field(
        None, description="auto or none, since a call cannot be forced"
    )
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: int | None = whole_number(0, MOST_ALTERNATIVES)
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="an object of variables of the chat template; its arguments are set by the server"
    )
    continue_final_message: bool | None = Field(None, description="true or false")

    @field_validator("chat_template_kwargs")
    @classmethod
    def check_variables(cls, variables: dict[str, Any] | None) -> dict[str, Any] | None:
        arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
        if not {"messages", *arguments}.isdisjoint(variables or {}):
            raise ValueError("an argument of the chat template")
        return variables

    def template_variables(self) -> dict[str, Any]:
        """What the chat template gets beside messages and tools."""
        return self.chat_template_kwargs or {}

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def num_alternatives(self) -> int:
        """How many of the most likely tokens stand beside each chosen one."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(f"top_logprobs ({self.top_logprobs}) needs logprobs: true.")
        return self.top_logprobs or 0

    def conversation(self) -> Conversation:
        """The messages and tools. DataError where they are no prompt."""
        messages = [message.for_template() for message in self.messages]
        is_continued = messages[-1]["role"] == "assistant"
        if self.continue_final_message not in (None, is_continued):
            raise InvalidRequest(
                f"continue_final_message ({self.continue_final_message}) must be {is_continued}: a final "
                "message of the assistant is continued, and no other."
            )
        tools = None if self.tool_choice == "none" else self.tools or None
        conversation = Conversation(prompt=messages, tools=tools, place="the request")
        check_conversation(conversation)
        return conversation


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(fail_fast=True)] = Field(
        description="text, token ids, or a list of texts or of token ids"
    )
    logprobs: bool | Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = Field(
        None, description=f"a whole number from 0 to {MOST_ALTERNATIVES}"
    )
    echo: bool | None = Field(None, description="true or false; not with logprobs")
    suffix: str | None = Field(None, description="text")

    @model_validator(mode="after")
    def check_combinations(self) -> CompletionRequest:
        if self.suffix and (self.stop_strings or self.stop_token_ids):
            raise InvalidRequest("suffix with stop or stop_token_ids: the gap before it is filled in full.")
        if self.echo and self.wants_logprobs:
            raise InvalidRequest(
                "echo with logprobs: those of a prompt are not computed. Leave one of them out."
            )
        return self

    @property
    def wants_logprobs(self) -> bool:
        """0 asks for those of the chosen tokens and for no alternatives."""
        return self.logprobs is not None and self.logprobs is not False

    @property
    def num_alternatives(self) -> int:
        """How many of the most likely tokens stand beside each chosen one."""
        return 0 if isinstance(self.logprobs, bool) else self.logprobs or 0

    def prompts(self) -> list[str | list[int]]:
        """One prompt, or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        if len(ids) == len(self.prompt):
            return [ids]
        return [item for item in self.prompt if not isinstance(item, int)]


class TokenizeRequest(ModelRequest):
    """The body of POST /tokenize: `prompt` as in completions, or `messages` as in chats."""

    prompt: str | None = Field(None, description="text")
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = Field(
        None, min_length=1, description=MESSAGES_RULE
    )
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = Field(
        None, description="a list of objects"
    )

    def request(self) -> ChatRequest | CompletionRequest:
        """The request whose prompt is to be tokenised."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages.")
        if self.prompt is not None and self.tools:
            raise InvalidRequest("tools are shown with messages, not with a prompt: leave one of them out.")
        if self.prompt is not None:
            return CompletionRequest.model_construct(prompt=self.prompt)
        assert self.messages is not None
        return ChatRequest.model_construct(messages=self.messages, tools=self.tools)


def explain(model: type[ModelRequest], body: Any, location: Sequence[str | int]) -> str:
    """Why pydantic refused what is at a location of the body, as a sentence: key, value, rule."""
    if not isinstance(body, dict) or not location:
        return "the body must be a JSON object."
    key, *inner = location
    field = model.model_fields.get(str(key))
    if field is None and key in REASONS:
        return f"{key} ({shorten(body[key])}) is not supported: {REASONS[str(key)]}. Leave it out."
    if field is None:
        return (
            f"{str(key)[:80]} is not supported: leave it out. Known: {', '.join(sorted(model.model_fields))}."
        )
    if key not in body:
        return f"{key} is missing: give {field.description}."
    value = "" if key in USER_TEXT else f" ({shorten(body[key])})"
    place = f" See {key}[{inner[0]}]." if inner and isinstance(inner[0], int) else ""
    return f"{key}{value} must be {field.description}.{place}"


def shorten(value: Any) -> str:
    """The value as text, cut to a readable length."""
    printer = Repr()
    printer.maxstring = printer.maxother = 80
    return printer.repr(value)
