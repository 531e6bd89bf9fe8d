"""A limit on code that a checkpoint brings as text: its chat template may run for ever."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

MOST_LINES = 20_000_000
"""Lines of Python in one block: seconds. A long conversation takes some ten thousand."""


class EndlessError(RuntimeError):
    """Code was stopped because it ran for too long."""


@contextmanager
def limited_lines(most: int = MOST_LINES) -> Iterator[None]:
    """Raise EndlessError in this thread after so many lines and calls of Python inside the block. It counts
    instead of reading a clock, so a slow machine changes nothing; it costs about 0.1 ms, and cannot stop a
    single operation that never returns.
    """
    left = most

    def count(_frame: FrameType, _event: str, _argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise EndlessError(f"stopped after {most:,} lines of Python")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
