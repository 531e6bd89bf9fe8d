"""Token ids of prompts, through the chat template of the tokenizer or, without one, of plain text.

A template is a program of the checkpoint: whatever goes wrong in it is a DataError with the place of the
prompt, and so is a message that it does not show.
"""

from __future__ import annotations

import copy
import datetime
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from opdlm.data.messages import Conversation
from opdlm.errors import ConfigError, DataError
from opdlm.limits import limited_code

DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, variables: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids up to the start of the response; `variables` are for the chat template."""
    if tokenizer.chat_template:
        return token_ids(tokenizer, render(tokenizer, conversation, variables), is_rendered=True)
    if isinstance(conversation.prompt, str) and not conversation.tools:
        return token_ids(tokenizer, conversation.prompt)
    raise DataError(
        f"{conversation.place}: messages, tools and data.system_prompt need a chat template, and this "
        "tokenizer has none: take an instruction-tuned checkpoint, or give each prompt as text."
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, is_rendered: bool = False) -> list[int]:
    """Token ids of a text, with the special tokens around it unless a chat template has written them. BOS is
    not doubled where the text starts with it.
    """
    ids = list(tokenizer(text, add_special_tokens=not is_rendered)["input_ids"])
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def render(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, variables: Mapping[str, Any] | None = None
) -> str:
    """The text that the chat template makes of a conversation. DataError if the template fails, or leaves out
    the content of a message: it is rendered once more with a mark at the end of each.
    """
    options: dict[str, Any] = {**(variables or {}), "tools": conversation.tools, "tokenize": False}
    messages, place = conversation.messages, conversation.place
    marks = [f"MESSAGE{i}MARK" if m["content"].strip() else "" for i, m in enumerate(messages)]
    marked = [{**m, "content": m["content"] + mark} for m, mark in zip(messages, marks, strict=True)]
    is_continued = messages[-1]["role"] == "assistant"
    try:
        with limited_code():
            with_marks = str(tokenizer.apply_chat_template(marked, **options))
            options |= {"add_generation_prompt": not is_continued, "continue_final_message": is_continued}
            text = str(tokenizer.apply_chat_template(messages, **options))
    except Exception as error:  # the template is a program of the checkpoint: it may raise anything
        how = "refuses these messages" if type(error) is TemplateError else f"fails, {type(error).__name__}"
        reason = " ".join(str(error).split())
        raise DataError(
            f"{place}: the chat template {how} ({reason:.200}). Change the roles or their order "
            "(data.system_prompt adds one), or give a checkpoint with another template."
        ) from error
    for message, mark in zip(messages, marks, strict=True):
        if mark not in with_marks:
            raise DataError(
                f"{place}: the chat template does not show the message of role {message['role']} "
                f"({message['content']!r:.40}). Put its text into the user's message"
                f"{' and leave data.system_prompt out' if message['role'] == 'system' else ''}."
            )
    return text


def unread_keys(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, variables: Iterable[str] = ()
) -> set[str]:
    """Keys beside role and content, `tools` and variables that the chat template does not name."""
    keys = {key for message in conversation.messages for key in message if key not in ("role", "content")}
    keys |= {*variables}
    keys |= {"tools"} if conversation.tools else set()
    if not keys or not tokenizer.chat_template:
        return set()
    template = tokenizer.get_chat_template(tools=conversation.tools)
    return {key for key in keys if key not in template}


def with_date(tokenizer: PreTrainedTokenizerBase, day: str) -> PreTrainedTokenizerBase:
    """The tokenizer with a chat template that prints `day` (2026-11-29) instead of the day on which it is
    rendered. Empty: as it is.
    """
    if not day or not tokenizer.chat_template:
        return tokenizer
    try:
        date = datetime.date.fromisoformat(day)
    except ValueError as error:
        raise ConfigError(f"data.date ({day}) must be a date such as 2026-11-29.") from error

    def print_day(template: str) -> str:
        return DATE_CALL.sub(lambda call: repr(date.strftime(call[2])), template)

    dated, template = copy.copy(tokenizer), tokenizer.chat_template
    is_named = isinstance(template, dict)
    dated.chat_template = (
        {name: print_day(text) for name, text in template.items()} if is_named else print_day(template)
    )
    return dated
