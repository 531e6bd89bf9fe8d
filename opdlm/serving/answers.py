"""Answers of OpenAI's protocol, whole or as events of a stream. The pydantic models are the schema of the
whole ones, which FastAPI checks.

Fields without a value are left out of the JSON: `logprobs` where nobody asked for them, `role` after the
first piece of a stream. https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import to_json

from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.rollout import FinishReason, Rollout
from opdlm.serving.tool_calls import ToolCall

Values = dict[str, Any]


class AnswerHead(BaseModel):
    """What names an answer; the same in every event of a stream."""

    id: str
    created: int
    """Unix time in seconds."""
    model: str


class Usage(BaseModel):
    """Token counts of a request, summed over its choices. A prompt counts once, however many it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    num_forwards: int
    """Forward passes of the model, prefill included. OpenAI's protocol does not have this field."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], n: int) -> Usage:
        """`n`: responses to each prompt, which follow each other."""
        stats = DecodeStats.of(rollouts)
        num_prompt = sum(len(rollout.prompt_ids) for rollout in rollouts[::n])
        return cls(
            prompt_tokens=num_prompt,
            completion_tokens=stats.num_tokens,
            total_tokens=num_prompt + stats.num_tokens,
            num_forwards=stats.num_forwards,
        )


class TokenLogprob(BaseModel):
    """The log-probability of one chosen token."""

    token: str
    logprob: float
    bytes: list[int] | None
    """Of the text, also where the token is a part of a character; null where that is not known."""
    top_logprobs: list[TokenLogprob] = []


class ChatLogprobs(BaseModel):
    """Log-probabilities of the chosen tokens, at temperature 1 and unfiltered."""

    content: list[TokenLogprob]


class TextLogprobs(BaseModel):
    """Log-probabilities of the chosen tokens, at temperature 1 and unfiltered."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    """The most likely tokens and the chosen one, where they are asked for. Of two with one text the second is
    named `token_id:` and its id.
    """
    text_offset: list[int]
    """Where the text of each token starts in the text of all."""


class CalledFunction(BaseModel):
    """A function that the model wants to have called."""

    name: str
    arguments: str
    """A JSON object."""


class MessageToolCall(BaseModel):
    """One tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    """The response to a chat."""

    role: Literal["assistant"]
    content: str | None
    """The text before tool calls, null if there is none."""
    tool_calls: list[MessageToolCall] | None = None


class ChatChoice(BaseModel):
    """One response to a chat."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason | Literal["tool_calls"]
    logprobs: ChatLogprobs | None = None


class TextChoice(BaseModel):
    """One response to a prompt, or the next piece of it."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None = None


class ChatCompletion(AnswerHead):
    """The answer to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class TextCompletion(AnswerHead):
    """The answer to a completion, or one event of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: None
    code: None


class ErrorAnswer(BaseModel):
    """The answer to a request that fails."""

    error: ErrorDetail


def error_answer(message: str, *, status: int) -> Values:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log-probability."""

    id: int
    text: str
    bytes: list[int] | None
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """A chosen token."""

    chosen: ScoredToken
    alternatives: list[ScoredToken]
    """The most likely tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedChoice:
    """A complete response."""

    text: str
    finish_reason: FinishReason | Literal["tool_calls"]
    tokens: list[TokenChoice] | None
    """Where the request asks for log-probabilities."""
    tool_calls: list[ToolCall] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """Writes one answer. `is_chat`: for a chat, else for a completion."""

    head: Values
    """The fields of `AnswerHead`."""
    is_chat: bool

    @classmethod
    def new(cls, model: str, *, is_chat: bool) -> AnswerFormat:
        """With a new id."""
        head = {"id": f"opdlm-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        return cls(head, is_chat)

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> Values:
        """The answer with all of its choices."""
        written = [
            self.choice(index, choice.text, choice, key="message") for index, choice in enumerate(choices)
        ]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": written, "usage": usage}

    def event(self, choices: Sequence[Values], **usage: Usage) -> Values:
        """An event of a stream: the next piece of a choice, or with `usage` the token counts."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, **usage}

    def choice(
        self,
        index: int,
        text: str,
        finished: FinishedChoice | None,
        *,
        key: str = "delta",
        names_role: bool = True,
    ) -> Values:
        """Choice `index` with its text, or with the next piece of it. The last piece brings what is known of
        the whole: pieces of text are not tokens, so log-probabilities cannot come with them. `key`: of the
        message, in chats.
        """
        role = {"role": "assistant"} if names_role else {}
        message: Values = {**role, "content": text}
        if finished is not None and finished.tool_calls:
            is_whole = key == "message"
            message["content"] = text or None
            message["tool_calls"] = [
                written_call(call, None if is_whole else place)
                for place, call in enumerate(finished.tool_calls)
            ]
        written = {key: message} if self.is_chat else {"text": text}
        choice = {"index": index, **written, "finish_reason": finished and finished.finish_reason}
        if finished is not None and finished.tokens is not None:
            choice["logprobs"] = (chat_logprobs if self.is_chat else text_logprobs)(finished.tokens)
        return choice


def written_call(call: ToolCall, place: int | None) -> Values:
    """An entry of `tool_calls`; in a stream it has its place."""
    name, arguments = call
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    index = {} if place is None else {"index": place}
    return {**index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def chat_logprobs(tokens: Sequence[TokenChoice]) -> Values:
    """The field `logprobs` of a chat's choice."""

    def written(token: ScoredToken) -> Values:
        return {"token": token.text, "logprob": token.logprob, "bytes": token.bytes}

    content = [
        {**written(token.chosen), "top_logprobs": [written(one) for one in token.alternatives]}
        for token in tokens
    ]
    return {"content": content}


def text_logprobs(tokens: Sequence[TokenChoice]) -> Values:
    """The field `logprobs` of a completion's choice."""
    top = [by_text(token) for token in tokens]
    texts = [token.chosen.text for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.chosen.logprob for token in tokens],
        "top_logprobs": top if any(token.alternatives for token in tokens) else None,
        "text_offset": [*itertools.accumulate(map(len, texts), initial=0)][:-1],
    }


def by_text(token: TokenChoice) -> dict[str, float]:
    """The chosen token and the most likely ones by their text, which several may share."""
    others = [one for one in token.alternatives if one.id != token.chosen.id]
    named = {token.chosen.text: token.chosen.logprob}
    for one in others:
        named[f"token_id:{one.id}" if one.text in named else one.text] = one.logprob
    return named


def sse(event: Values) -> str:
    """A server-sent event."""
    return f"data: {to_json(event).decode()}\n\n"
