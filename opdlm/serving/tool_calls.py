"""Tool calls in responses: each family writes them in a format of its own, which its chat template shows.

    Hermes, Qwen 2.5 and 3   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, after other text
    Mistral (to v3)          [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
    Llama 3                  <|python_tag|>{"name": ..., "parameters": {...}}; {...}

`[TOOL_CALLS]` and `<|python_tag|>` are special tokens, which the text of a response lacks: a response that is
nothing but calls is one there. What cannot be read as calls remains text, in full.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeAlias

ToolCall: TypeAlias = tuple[str, dict[str, Any]]
"""The name of a function and its arguments."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family writes calls."""

    signs: tuple[str, ...]
    """What its chat template contains, each of them."""
    not_signs: tuple[str, ...]
    """What the templates of other formats contain beside these."""
    start: str
    """Before each call; empty: only where the response is nothing but calls."""
    separators: tuple[str, ...]
    """What may stand between calls, and around them."""
    arguments: str
    """The key of the arguments."""

    def split(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text before the calls, and the calls; all of the text, and none, where they cannot be read."""
        head, start, rest = text.partition(self.start) if self.start else ("", "", text)
        calls = self._read(start + rest)
        return (head.rstrip(), calls) if calls else (text, [])

    def text_before(self, text: str) -> str:
        """The part of an unfinished text that belongs to no call, whatever follows."""
        if not self.start:
            return "" if text.lstrip()[:1] in ("", "{", "[") else text
        text = text.partition(self.start)[0]
        begun = next((n for n in range(len(self.start), 0, -1) if text.endswith(self.start[:n])), 0)
        return text[: len(text) - begun].rstrip()

    def _read(self, text: str) -> list[ToolCall]:
        """The calls that the whole text consists of; none if it holds anything else."""
        decoder, found, calls = json.JSONDecoder(), list[Any](), list[ToolCall]()
        while text := self._without_separators(text):
            try:
                value, end = decoder.raw_decode(text)
            except (ValueError, RecursionError):
                return []
            found += value if isinstance(value, list) else [value]
            text = text[end:]
        for one in found:
            name, arguments = (one.get("name"), one.get(self.arguments)) if isinstance(one, dict) else (0, 0)
            if not (isinstance(name, str) and isinstance(arguments, dict)):
                return []
            calls.append((name, arguments))
        return calls

    def _without_separators(self, text: str) -> str:
        text = text.lstrip()
        while found := next(filter(text.startswith, self.separators), ""):
            text = text[len(found) :].lstrip()
        return text


FORMATS = (
    ToolFormat(
        signs=("<tool_call>", "arguments"),
        not_signs=("<function=", "<arg_key>"),
        start="<tool_call>",
        separators=("<tool_call>", "</tool_call>"),
        arguments="arguments",
    ),
    ToolFormat(
        signs=("[TOOL_CALLS]",),
        not_signs=("[ARGS]",),
        start="",
        separators=("[TOOL_CALLS]",),
        arguments="arguments",
    ),
    ToolFormat(
        signs=('"parameters": dictionary',),
        not_signs=(),
        start="",
        separators=("<|python_tag|>", ";"),
        arguments="parameters",
    ),
)


def tool_format_of(template: str) -> ToolFormat | None:
    """The format that a chat template shows; None for an unknown one."""

    def is_shown(one: ToolFormat) -> bool:
        return all(sign in template for sign in one.signs) and not any(
            sign in template for sign in one.not_signs
        )

    return next(filter(is_shown, FORMATS), None)
