"""Scoring of a response against the answer of a task.

exact     the response equals the answer
gsm8k     strict-match (the number after ####) and flexible-extract (the last number), as defined by
          lm-evaluation-harness 0.4: numbers are compared as text without commas, dollar signs and a final
          full stop
math      mathematically equal according to math-verify: LaTeX, fractions, percent; six decimals
choice    the response names the letter of the answer
code      the code of the response passes the tests in the answer
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache, lru_cache
from pathlib import Path

from opdlm.data.prompts import Scoring

STATED_CHOICE = re.compile(r"(?i:answer(?: is:?|:))\s*\(?\**([A-J])\b")
ANY_CHOICE = re.compile(r"\b([A-HJ])\b")

STRICT_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")
ANY_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
NO_NUMBER = "[invalid]"
NEXT_QUESTION = "Question:"
"""Text from here on is ignored: the model has started another question after its answer."""

RUN = "import runpy; runpy.run_path({program!r}, run_name='program'); raise SystemExit({code})"
"""As in the harness of HumanEval the program is not `__main__`; its own exit is no success."""
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
FIRST_CODE, NUM_CODES = 10, 100
"""Exit codes, one of which is drawn for the end of the tests, so that no program can name it."""
MAX_FILE_BYTES = 2**20
BWRAP = (
    *("--unshare-all", "--die-with-parent", "--new-session", "--ro-bind", "/", "/"),
    *("--dev", "/dev", "--proc", "/proc"),
)
log = logging.getLogger(__name__)


def is_right(response: str, answer: str, scoring: Scoring) -> bool:
    """Whether a response is correct; gsm8k counts strict-match."""
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
            return passes_once(response, answer)


def chosen_letter(response: str) -> str:
    """The capital after `answer is` or `answer:`, else the first lone one of A to J but I, else empty."""
    found = STATED_CHOICE.findall(response) or ANY_CHOICE.findall(response)
    return found[0] if found else ""


def is_right_flexibly(response: str, answer: str) -> bool:
    """Whether the last number of the response is correct (flexible-extract)."""
    return same_number(last_number(response), answer)


def strict_number(response: str) -> str:
    """The number after `#### `."""
    found = STRICT_NUMBER.search(response.split(NEXT_QUESTION)[0])
    return found[1] if found else NO_NUMBER


def last_number(response: str) -> str:
    """The last number of the response."""
    found = ANY_NUMBER.findall(response.split(NEXT_QUESTION)[0])
    return next(filter(None, found[-1])) if found else NO_NUMBER


def same_number(number: str, answer: str) -> bool:
    """Whether two numbers are equal as normalised text."""
    return plain_number(number) == plain_number(answer)


def plain_number(text: str) -> str:
    """The text after the last `#### `, without commas, dollar signs and a final full stop."""
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.strip().lower()


def code_of(response: str) -> str:
    """The last fenced code block of a response, else the whole response."""
    found = FENCE.findall(response)
    return found[-1] if found else response


@lru_cache(maxsize=100_000)
def passes_once(response: str, tests: str) -> bool:
    """`passes`, run once for the same texts: a report names a response several times."""
    return passes(response, tests)


def passes(response: str, tests: str, *, seconds: int = 10, megabytes: int = 512) -> bool:
    """Whether the response's code, followed by the tests, runs to the end of the tests without an error,
    within `seconds` of CPU time and of wall-clock time and `megabytes` of memory.

    The process is Python in isolated mode, in an empty folder, with an empty environment, inside `sandbox`.
    Without that this limits accidents, not malicious code: run unknown models in a container. It requires
    `eval.run_code` and a POSIX system.
    """

    import resource  # POSIX only

    end = FIRST_CODE + secrets.randbelow(NUM_CODES)

    def limit() -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text(f"{code_of(response)}\n\n{tests}\n", encoding="utf-8")
        process = subprocess.Popen(
            [*sandbox(folder), sys.executable, "-I", "-c", RUN.format(program=str(program), code=end)],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=limit,
        )
        try:
            return process.wait(seconds) == end
        except subprocess.TimeoutExpired:
            return False
        finally:
            end_group(process.pid)
            process.wait()


def sandbox(folder: str) -> list[str]:
    """How a command begins that runs inside bubblewrap: no network, no other processes, and nothing to write
    but `folder`. Empty where `bwrap` is not installed or does not work.
    """
    path = working_bwrap()
    return [path, *BWRAP, "--bind", folder, folder, "--chdir", folder] if path else []


@cache
def working_bwrap() -> str:
    """The path of `bwrap`, tried once, as containers often forbid what it needs; else empty. Tells which."""
    path = shutil.which("bwrap") or ""
    why = "is not installed"
    if path:
        tried = subprocess.run([path, *BWRAP, sys.executable, "-c", ""], capture_output=True, text=True)
        if tried.returncode == 0:
            log.warning("what the model writes runs inside bubblewrap, without network")
            return path
        why = f"does not work here ({tried.stderr.strip()})"
    log.warning(
        f"bubblewrap (bwrap) {why}: what the model writes runs with limits on time, memory and files, and "
        "can reach the network"
    )
    return ""


def end_group(pid: int) -> None:
    """Kill all processes of the program."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
