"""Whether a response is right. `exact`: it equals the answer. `gsm8k`: strict-match (the number after ####)
and flexible-extract (the last number) exactly as lm-evaluation-harness 0.4 defines them for that task; its
numbers are compared as text without commas, dollar signs and a final full stop. `math`: equal as mathematics
(math-verify: LaTeX, fractions, percent; numbers to six decimals). `choice`: names the right letter. `code`:
its code passes the tests that stand in `answer` (`code_tests`).
"""

from __future__ import annotations

import re
from typing import Literal

from opdlm.evaluation.code_tests import passes

Scoring = Literal["exact", "gsm8k", "math", "choice", "code"]

STATED_CHOICE = re.compile(r"answer(?: is|:)?\s*\(?\**([A-Z])\b", re.IGNORECASE)
ANY_CHOICE = re.compile(r"\b([A-HJ])\b")

STRICT_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")
ANY_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
NO_NUMBER = "[invalid]"
NEXT_QUESTION = "Question:"
"""A model that goes on to ask itself the next question has answered before."""


def is_right(response: str, answer: str, scoring: Scoring) -> bool:
    """The score that accuracy counts."""
    match scoring:
        case "exact":
            return response.strip() == answer.strip()
        case "gsm8k":
            return same_number(strict_number(response), answer)
        case "math":
            from math_verify import parse, verify

            return bool(verify(parse(answer), parse(response)))
        case "choice":
            return chosen_letter(response) == answer.strip().upper()
        case "code":
            return passes(response, answer)


def chosen_letter(response: str) -> str:
    """The letter after `answer is`, else the first of A to J (but I) that stands alone; empty without one."""
    found = STATED_CHOICE.findall(response) or ANY_CHOICE.findall(response)
    return found[0].upper() if found else ""


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
