"""OpenAI's protocol: what a request may hold, and the shapes of answers.

A key that would change the answer and is not known here is refused, never ignored.
https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.rollout import Rollout
from opdlm.errors import OpdlmError

Body = dict[str, Any]
KNOWN = {
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"),
    *("seed", "stop", "n", "stream", "stream_options", "user", "logprobs", "top_logprobs"),
}


class InvalidRequest(OpdlmError):
    """A request that cannot be answered; the status goes to the client with the sentence."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def check_body(body: Any, model: str) -> Body:
    """A JSON object of known keys, for this model."""
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object.")
    unknown = sorted(key for key, value in body.items() if key not in KNOWN and value)
    if unknown:
        raise InvalidRequest(
            f"{unknown[0]} is not supported: leave it out. Known: {', '.join(sorted(KNOWN))}."
        )
    if body.get("model") not in (None, model):
        raise InvalidRequest(f"model ({body['model']}) is not served here; {model} is.", status=404)
    return body


def number(body: Body, key: str, default: float, low: float, high: float) -> float:
    value = default if body.get(key) is None else body[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(f"{key} ({value!r}) must be a number from {low:g} to {high:g}.")
    return float(value)


def whole(body: Body, key: str, default: int, low: int, high: int) -> int:
    value = default if body.get(key) is None else body[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"{key} ({value!r}) must be a whole number from {low} to {high}.")
    return value


def switch(body: Body, key: str) -> bool:
    value = body.get(key) or False
    if not isinstance(value, bool):
        raise InvalidRequest(f"{key} ({value!r}) must be true or false.")
    return value


def asks_for_usage(body: Body) -> bool:
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise InvalidRequest(f"stream_options ({options!r}) must be an object.")
    return switch(options, "include_usage")


def asks_for_logprobs(body: Body, *, is_chat: bool) -> bool:
    """Those of the chosen tokens: `true` in a chat, 0 alternatives in a completion. There are no others."""
    value = body.get("logprobs")
    if body.get("top_logprobs") or not (value is None or isinstance(value, bool) or value == 0):
        raise InvalidRequest(
            f"logprobs ({value!r}) and top_logprobs ({body.get('top_logprobs')!r}): only those of the chosen "
            "tokens are computed. Ask a chat for logprobs true, a completion for logprobs 0."
        )
    return bool(value) if is_chat else value is not None and value is not False


def strings(body: Body, key: str) -> tuple[str, ...]:
    value = body.get(key) or []
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise InvalidRequest(f"{key} must be a text or a list of texts, none of them empty.")
    return tuple(found)


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)


def with_plain_text(message: Any) -> Any:
    """A message whose content comes in parts of text, in one."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise InvalidRequest("messages may hold text only: other parts of a content are not supported.")
    return message | {"content": "".join(str(part.get("text", "")) for part in content)}


def head(kind: str, model: str) -> Body:
    return {"id": f"opdlm-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage_of(rollouts: Sequence[Rollout]) -> Body:
    stats, num_prompt = DecodeStats.of(rollouts), sum(len(rollout.prompt_ids) for rollout in rollouts)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": stats.num_tokens,
        "total_tokens": num_prompt + stats.num_tokens,
        "num_forwards": stats.num_forwards,
    }


def logprobs_of(rollout: Rollout, pieces: Sequence[str], *, is_chat: bool) -> Body:
    """Log-probabilities of the chosen tokens, at temperature 1 and unfiltered; `pieces`: text of each."""
    pairs = list(zip(pieces, rollout.logprobs, strict=False))
    if is_chat:
        content = [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
            for text, value in pairs
        ]
        return {"content": content}
    return {
        "tokens": [text for text, _ in pairs],
        "token_logprobs": [value for _, value in pairs],
        "top_logprobs": None,
        "text_offset": [0, *itertools.accumulate(len(text) for text, _ in pairs[:-1])][: len(pairs)],
    }


def error_body(message: str, kind: str = "invalid_request_error") -> Body:
    return {"error": {"message": message, "type": kind}}


def sse(event: Body) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
