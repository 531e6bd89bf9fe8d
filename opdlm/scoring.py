"""Whether a response is right. `exact`: it equals the answer. `gsm8k`: strict-match (the number after ####)
and flexible-extract (the last number) exactly as lm-evaluation-harness 0.4 defines them for that task.

Numbers are compared as text without commas, dollar signs and a final full stop. Not here: running code,
algebraic equality.
"""

from __future__ import annotations

import re
from typing import Literal

Scoring = Literal["exact", "gsm8k"]

STRICT_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")
ANY_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
NO_NUMBER = "[invalid]"
NEXT_QUESTION = "Question:"
"""A model that goes on to ask itself the next question has answered before."""


def is_right(response: str, answer: str, scoring: Scoring) -> bool:
    """The score that accuracy counts."""
    if scoring == "exact":
        return response.strip() == answer.strip()
    return same_number(strict_number(response), answer)


def is_right_flexibly(response: str, answer: str) -> bool:
    """flexible-extract: the last thing in the response that looks like a number."""
    return same_number(last_number(response), answer)


def strict_number(response: str) -> str:
    found = STRICT_NUMBER.search(response.split(NEXT_QUESTION)[0])
    return found[1] if found else NO_NUMBER


def last_number(response: str) -> str:
    found = ANY_NUMBER.findall(response.split(NEXT_QUESTION)[0])
    return next(filter(None, found[-1])) if found else NO_NUMBER


def same_number(number: str, answer: str) -> bool:
    return plain_number(number) == plain_number(answer)


def plain_number(text: str) -> str:
    """The text after the last `#### `, without commas, dollar signs and a final full stop."""
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.strip().lower()
