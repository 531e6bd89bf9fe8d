"""Conversations, from the rows of data files and from requests to the server.

Columns, the first that a row has: `messages`, `prompt` (text or messages), `conversations` (ShareGPT's
`from`/`value`, or `role`/`content`), or `instruction` and `input` (Alpaca). The final message of the
assistant is the response, except in `prompt`, where the model continues it. Other keys of messages go to the
chat template.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from opdlm.data.rows import Row, check_text, check_texts, parse_json
from opdlm.errors import DataError

PROMPT_COLUMNS = ("messages", "prompt", "conversations", "instruction")
CHAT_COLUMNS = ("messages", "conversations")
RESPONSE_COLUMNS = {"prompt": ("response", "completion"), "instruction": ("output",)}
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""ShareGPT's roles; others keep their names."""
MESSAGES_RULE = (
    "a list of objects with `role` and `content`, both text; parts of content are text only, and only "
    "messages with `tool_calls` may have no content"
)


class TextPart(BaseModel):
    """One part of a message's content."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def check_content(self) -> Message:
        if self.content is None and not (self.model_extra or {}).get("tool_calls"):
            raise ValueError("no content")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: content in one piece, arguments of tool calls as objects,
        and no empty keys.
        """
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        others = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        if isinstance(others.get("tool_calls"), list):
            others["tool_calls"] = [with_parsed_arguments(call) for call in others["tool_calls"]]
        return {**others, "role": self.role, "content": text}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One prompt, before the chat template."""

    prompt: str | list[dict[str, Any]]
    """A user's text, or the messages. The model continues a final message of the assistant."""
    tools: list[dict[str, Any]] | None = None
    response: Any = None
    """What follows in the data: the assistant's message, or the value of a column of `RESPONSE_COLUMNS`."""
    place: str = "PROMPT"
    """What error messages name."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt

    @property
    def last_text(self) -> str:
        """The content of the last message."""
        return str(self.messages[-1]["content"])


def conversation_of(place: str, row: Row, system_prompt: str = "", column: str = "") -> Conversation:
    """The conversation of a row. `column`: the column with the prompt, as text or as messages, instead of the
    first of `PROMPT_COLUMNS`. DataError if the row is invalid.
    """
    row = {name: value for name, value in row.items() if value is not None}
    name = prompt_column(place, row, column)
    prompt, response = read_prompt(place, name, row), None
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant" and name != "prompt":
        response = prompt.pop()
    for key in filter(row.__contains__, RESPONSE_COLUMNS.get(name, ())):
        response = row[key]
    systems = [check_text("data.system_prompt", system_prompt)] if system_prompt else []
    if name in ("conversations", "instruction") and row.get("system"):
        systems.append(text_of(place, "system", row["system"]))
    tools = read_list(place, "tools", row["tools"]) if row.get("tools") else None
    conversation = Conversation(prompt=prompt, tools=tools, response=response, place=place)
    check_conversation(conversation)
    if not systems:
        return conversation
    messages = [{"role": "system", "content": text} for text in systems] + conversation.messages
    return replace(conversation, prompt=messages)


def check_conversation(conversation: Conversation) -> None:
    """DataError for an empty prompt, and for characters that are no text."""
    last = conversation.messages[-1] if conversation.prompt else None
    if last is None or not (last["content"].strip() or last["role"] == "tool"):
        raise DataError(f"{conversation.place} has an empty prompt. Remove it, or give it some text.")
    check_texts(conversation.place, [conversation.messages, conversation.tools])


def prompt_column(place: str, row: Row, column: str) -> str:
    """The column that holds the prompt."""
    found = ", ".join(row) or "nothing"
    if column and column not in row:
        raise DataError(f"{place} has no column {column} (data.prompt_column), only {found}.")
    name = column or next(filter(row.__contains__, PROMPT_COLUMNS), "")
    if not name:
        raise DataError(
            f"{place} has neither `prompt` nor `messages` (found: {found}). Name the column of the prompt in "
            "data.prompt_column."
        )
    return name


def read_prompt(place: str, name: str, row: Row) -> str | list[dict[str, Any]]:
    """The text or the messages of a column."""
    if isinstance(row[name], list) or name in CHAT_COLUMNS:
        return read_messages(place, name, row[name])
    text = text_of(place, name, row[name])
    if name == "instruction":
        if row.get("history"):
            raise DataError(f"{place} has a `history`, which is not read: give all turns as `messages`.")
        if row.get("input"):
            text += "\n" + text_of(place, "input", row["input"])
    return text


def read_messages(place: str, name: str, given: Any) -> list[dict[str, Any]]:
    """Messages as chat templates expect them."""
    messages = read_list(place, name, given)
    renamed = [from_sharegpt(message) if isinstance(message, dict) else message for message in messages]
    try:
        return [message.for_template() for message in TypeAdapter(list[Message]).validate_python(renamed)]
    except ValidationError as error:
        index = error.errors()[0]["loc"][0]
        raise DataError(f"{place}: `{name}` must be {MESSAGES_RULE}. See {name}[{index}].") from error


def read_list(place: str, name: str, given: Any) -> list[Any]:
    """A list, which may be written as JSON."""
    value = parse_json(f"{place}: `{name}`", given) if isinstance(given, str) else given
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        rule = MESSAGES_RULE if name in CHAT_COLUMNS else "a list of objects"
        raise DataError(f"{place}: `{name}` must be {rule}, not {type(value).__name__}.")
    return value


def from_sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    """`role` and `content` for `from` and `value`."""
    if "role" in message or "from" not in message:
        return message
    names = {"from": "role", "value": "content"}
    renamed = {names.get(name, name): value for name, value in message.items()}
    return {**renamed, "role": ROLES.get(str(renamed["role"]), renamed["role"])}


def text_of(place: str, name: str, value: Any) -> str:
    """The value of a column that must be text."""
    if not isinstance(value, str):
        raise DataError(f"{place}: `{name}` must be text, not {type(value).__name__}.")
    return check_text(f"{place}: `{name}`", value)


def with_parsed_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object, as chat templates expect; OpenAI's have JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments = parse_json("the arguments of a tool call", function["arguments"])
    return {**call, "function": {**function, "arguments": arguments}}
