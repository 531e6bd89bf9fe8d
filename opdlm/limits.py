"""Limits on code that a checkpoint brings as text: its chat template may run, or write, without end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

MOST_LINES = 1_000_000
"""Lines of Python in one block: a second or two. A long conversation takes some ten thousand."""
MOST_CHARACTERS = 100_000_000
"""Length of one text, and of all that a template writes; a context of a million tokens is 5 million. An item
of a list counts as `POINTER`.
"""
POINTER = 8
LISTS = (list, tuple)
TEMPLATE = "<template>"
"""What Jinja gives as the file of compiled templates."""


class EndlessError(RuntimeError):
    """Code was stopped because it ran for too long, or made too long a text."""


@contextmanager
def limited_code(most_lines: int = MOST_LINES, most_characters: int = MOST_CHARACTERS) -> Iterator[None]:
    """Raise EndlessError in this thread after so many lines and calls of Python inside the block, or where a
    function returns, or a template keeps or writes, so long a text or list. It counts instead of reading a
    clock, so a slow machine changes nothing; it costs about 0.1 ms, and cannot stop a single operation that
    never returns.
    """
    left, characters = most_lines, most_characters

    def check(value: Any) -> int:
        length = POINTER * len(value) if isinstance(value, LISTS) else 0
        if isinstance(value, str):
            length = len(value)
        if length > characters:
            raise EndlessError(f"stopped at a text or list longer than {most_characters:,}")
        return length

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left, characters
        left -= 1
        if left < 0:
            raise EndlessError(f"stopped after {most_lines:,} lines of Python")
        is_template = frame.f_code.co_filename == TEMPLATE
        if event == "return":
            characters -= check(argument) * is_template
        elif is_template:
            for value in frame.f_locals.values():
                check(value)
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
