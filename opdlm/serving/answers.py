"""Answers of OpenAI's protocol as pydantic models, whole or as events of a stream.

Fields that are not set are left out of the JSON: `logprobs` where nobody asked for them, `role` after the
first piece of a stream. https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.rollout import FinishReason, Rollout


class AnswerHead(BaseModel):
    """What names an answer; the same in every event of a stream."""

    id: str
    created: int
    """Unix time in seconds."""
    model: str


class Usage(BaseModel):
    """Token counts of a request, summed over its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    num_forwards: int
    """Forward passes of the model, prefill included. OpenAI's protocol does not have this field."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> Usage:
        stats, num_prompt = DecodeStats.of(rollouts), sum(len(rollout.prompt_ids) for rollout in rollouts)
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
    bytes: list[int]
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the chosen tokens, at temperature 1 and unfiltered."""

    content: list[TokenLogprob]


class TextLogprobs(BaseModel):
    """Log-probabilities of the chosen tokens, at temperature 1 and unfiltered."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: None
    text_offset: list[int]
    """Where the text of each token starts in the text of all."""


class AssistantMessage(BaseModel):
    """The response to a chat."""

    role: Literal["assistant"]
    content: str


class MessageDelta(BaseModel):
    """The next piece of a streamed response to a chat."""

    role: Literal["assistant"] | None = None
    content: str


class ChatChoice(BaseModel):
    """One response to a chat."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


class ChatChunkChoice(BaseModel):
    """The next piece of one response to a chat."""

    index: int
    delta: MessageDelta
    finish_reason: FinishReason | None
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


class ChatChunk(AnswerHead):
    """One event of a streamed chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


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

    @classmethod
    def of(cls, message: str, *, status: int) -> ErrorAnswer:
        kind: Literal["invalid_request_error", "server_error"]
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return cls(error=ErrorDetail(message=message, type=kind, param=None, code=None))


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedChoice:
    """A complete response."""

    text: str
    finish_reason: FinishReason
    tokens: list[tuple[str, float]] | None
    """Text and log-probability of each token, where the request asks for them."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """Writes one answer. `is_chat`: for a chat, else for a completion."""

    head: dict[str, Any]
    """The fields of `AnswerHead`."""
    is_chat: bool

    @classmethod
    def new(cls, model: str, *, is_chat: bool) -> AnswerFormat:
        """With a new id."""
        head = {"id": f"opdlm-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        return cls(head, is_chat)

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> ChatCompletion | TextCompletion:
        """The answer with all of its choices."""
        if not self.is_chat:
            texts = [
                TextChoice(
                    index=index, text=choice.text, finish_reason=choice.finish_reason, **text_logprobs(choice)
                )
                for index, choice in enumerate(choices)
            ]
            return TextCompletion(**self.head, object="text_completion", choices=texts, usage=usage)
        messages = [
            ChatChoice(
                index=index,
                message=AssistantMessage(role="assistant", content=choice.text),
                finish_reason=choice.finish_reason,
                **chat_logprobs(choice),
            )
            for index, choice in enumerate(choices)
        ]
        return ChatCompletion(**self.head, object="chat.completion", choices=messages, usage=usage)

    def piece(
        self, index: int, text: str, *, is_first: bool, finished: FinishedChoice | None
    ) -> ChatChunk | TextCompletion:
        """The event with the next piece of choice `index`. The last piece brings what is known of the whole:
        pieces of text are not tokens, so log-probabilities cannot come with them.
        """
        reason = None if finished is None else finished.finish_reason
        if not self.is_chat:
            part = TextChoice(index=index, text=text, finish_reason=reason, **text_logprobs(finished))
            return TextCompletion(**self.head, object="text_completion", choices=[part])
        delta = MessageDelta(role="assistant", content=text) if is_first else MessageDelta(content=text)
        piece = ChatChunkChoice(index=index, delta=delta, finish_reason=reason, **chat_logprobs(finished))
        return ChatChunk(**self.head, object="chat.completion.chunk", choices=[piece])

    def usage(self, usage: Usage) -> ChatChunk | TextCompletion:
        """The event with the token counts."""
        if not self.is_chat:
            return TextCompletion(**self.head, object="text_completion", choices=[], usage=usage)
        return ChatChunk(**self.head, object="chat.completion.chunk", choices=[], usage=usage)


def chat_logprobs(choice: FinishedChoice | None) -> dict[str, Any]:
    """The field `logprobs` of a chat's choice, empty where there are none."""
    if choice is None or choice.tokens is None:
        return {}
    content = [
        TokenLogprob(token=text, logprob=logprob, bytes=list(text.encode()), top_logprobs=[])
        for text, logprob in choice.tokens
    ]
    return {"logprobs": ChatLogprobs(content=content)}


def text_logprobs(choice: FinishedChoice | None) -> dict[str, Any]:
    """The field `logprobs` of a completion's choice, empty where there are none."""
    if choice is None or choice.tokens is None:
        return {}
    texts, logprobs = [text for text, _ in choice.tokens], [logprob for _, logprob in choice.tokens]
    starts = itertools.accumulate(map(len, texts), initial=0)
    offsets = list(itertools.islice(starts, len(texts)))
    found = TextLogprobs(tokens=texts, token_logprobs=logprobs, top_logprobs=None, text_offset=offsets)
    return {"logprobs": found}


def sse(event: BaseModel) -> str:
    """A server-sent event."""
    return f"data: {event.model_dump_json(exclude_unset=True)}\n\n"
