"""Requests of OpenAI's protocol as pydantic models: every field with its bounds.

A key that would change the answer and is not known here is refused, never ignored; an unknown key with a
neutral value (null, false, 0, empty) is accepted, as some clients send every key they know. The description
of a field is the end of its error message. https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from reprlib import Repr
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from opdlm.data.messages import MESSAGES_RULE, Conversation, Message, check_conversation
from opdlm.decoding.decode_config import LIMITS, DecodeConfig
from opdlm.errors import OpdlmError

LARGEST = 2**62
SMALLEST_TEMPERATURE = 1e-5
"""Below it the arg-max is taken: the draw is the same, and logits over the temperature stay finite."""
SMALLEST_TOP_P = 1e-9
"""Below it only the most likely token is left, and float32 would round the bound to 0."""
CHOSEN_ONLY = "only the log-probabilities of the chosen tokens are computed"
USER_TEXT = ("messages", "prompt", "stop")
"""Fields whose values error messages do not repeat."""


class InvalidRequest(OpdlmError):
    """A request that cannot be answered. `status` is the HTTP status of the answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


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
        """Leave out unknown keys that ask for nothing."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if key in cls.model_fields or value}


class StreamOptions(StrictModel):
    """What a stream sends beside its text."""

    include_usage: bool | None = None


class GenerationRequest(StrictModel):
    """The fields that chats and completions share. None: as the server was started."""

    model: str | None = Field(None, description="the name of the model as text")
    max_tokens: int | None = whole_number(1, LARGEST)
    max_completion_tokens: int | None = whole_number(1, LARGEST)
    temperature: float | None = number(0, LIMITS["temperature"])
    top_p: float | None = Field(None, gt=0, le=1, description="a number above 0 and at most 1")
    top_k: int | None = whole_number(0, LARGEST)
    seed: int | None = whole_number(-LARGEST, LARGEST)
    stop: str | list[Annotated[str, StringConstraints(min_length=1)]] | None = Field(
        None, description="a text or a list of texts, none of them empty"
    )
    n: int | None = whole_number(1, 128)
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description="an object whose only key, include_usage, is true or false"
    )
    user: str | None = Field(None, description="text")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return ((self.stop,) if self.stop else ()) if isinstance(self.stop, str) else tuple(self.stop or ())

    def length_limit(self, default: int) -> tuple[str, int]:
        """The response tokens asked for, and the key that says so."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", default if self.max_tokens is None else self.max_tokens

    def decode_config(self, default: DecodeConfig, *, logprobs: bool) -> DecodeConfig:
        """The server's settings with those of the request. top_k=0 and top_p=1 turn a filter off: settings of
        one meaning must compare equal, as only requests with equal settings share forwards.
        """
        changes: dict[str, Any] = {"logprobs": logprobs}
        if self.temperature is not None:
            changes["temperature"] = self.temperature if self.temperature >= SMALLEST_TEMPERATURE else 0.0
        if self.top_k is not None:
            changes["top_k"] = self.top_k or None
        if self.top_p is not None:
            changes["top_p"] = max(self.top_p, SMALLEST_TOP_P) if self.top_p < 1 else None
        return replace(default, **changes)


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, description=MESSAGES_RULE)
    tools: list[dict[str, Any]] | None = Field(None, description="a list of objects")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: Literal[0] | None = Field(None, description=f"0: {CHOSEN_ONLY}")

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    def conversation(self) -> Conversation:
        """The messages and tools. DataError where they are no prompt."""
        messages = [message.for_template() for message in self.messages]
        conversation = Conversation(prompt=messages, tools=self.tools or None, place="the request")
        check_conversation(conversation)
        return conversation


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: str | list[int] | list[str | list[int]] = Field(
        description="text, token ids, or a list of texts or of token ids"
    )
    logprobs: bool | Literal[0] | None = Field(None, description=f"0: {CHOSEN_ONLY}")

    @property
    def wants_logprobs(self) -> bool:
        """0 asks for those of the chosen tokens and for no alternatives."""
        return self.logprobs is not None and self.logprobs is not False

    def prompts(self) -> list[str | list[int]]:
        """One prompt, or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        if len(ids) == len(self.prompt):
            return [ids]
        return [item for item in self.prompt if not isinstance(item, int)]


def explain(model: type[GenerationRequest], body: Any, location: Sequence[str | int]) -> str:
    """Why pydantic refused what is at a location of the body, as a sentence: key, value, rule."""
    if not isinstance(body, dict) or not location:
        return "the body must be a JSON object."
    key, *inner = location
    field = model.model_fields.get(str(key))
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
