"""What counts as right: the GSM8K rules on answers as models write them, and lm-evaluation-harness's own."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_checkpoints import tiny_tokenizer, write_rows

from opdlm.data.prompts import load_tasks
from opdlm.evaluation.evaluate import score_responses
from opdlm.evaluation.scoring import (
    NEXT_QUESTION,
    chosen_letter,
    is_right,
    is_right_flexibly,
    last_number,
    passes,
    strict_number,
    working_bwrap,
)

ANSWER = "He makes 2 * 9 = <<2*9=18>>18 dollars.\n#### 1,018"
RESPONSES = {
    "So he makes 1018 dollars.\n#### 1018": (True, True),
    "#### 1,018": (True, True),
    "The answer is $1,018.": (False, True),
    "#### 1018.": (True, True),
    "#### 1018 and 5 more": (True, False),
    "#### -1018": (False, False),
    "#### 10.18": (False, False),
    "1018\n\nQuestion: How much is 7?": (False, True),
    "no idea": (False, False),
    "": (False, False),
}


@pytest.mark.parametrize("response", RESPONSES)
def test_gsm8k_responses_are_scored_as_users_expect(response: str) -> None:
    assert (is_right(response, ANSWER, "gsm8k"), is_right_flexibly(response, ANSWER)) == RESPONSES[response]


@pytest.mark.parametrize("response", RESPONSES)
def test_gsm8k_scores_are_those_of_the_harness(response: str) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    import lm_eval
    import yaml
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    options = {k: v for k, v in task["metric_list"][0].items() if k.startswith(("ignore", "regexes"))}
    cut = response.split(NEXT_QUESTION)[0]
    scores = []
    for steps, ours in zip(task["filter_list"], (strict_number, last_number), strict=True):
        settings = {k: v for k, v in steps["filter"][0].items() if k != "function"}
        ((found,),) = RegexFilter(**settings).apply([[cut]], [{}])
        assert found == ours(response)
        score = exact_match_fn(references=[ANSWER], predictions=[found], **options)["exact_match"]
        scores.append(bool(score))
    assert tuple(scores) == RESPONSES[response]


def test_exact_match_ignores_the_space_around() -> None:
    assert is_right(" 42\n", "42", "exact") and not is_right("42.", "42", "exact")


def test_each_of_several_answers_is_accepted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": ["4", "four"]}, {"prompt": "a", "answer": 4}, {"prompt": "a"}]
    tasks = load_tasks(str(write_rows(tmp_path / "tasks.jsonl", rows)), tiny_tokenizer(), 63)
    assert score_responses(tasks, ["four"] * 3, ["six"] * 3) == [True, False, False]
    assert score_responses(tasks, ["4"] * 3, ["4"] * 3) == [True, True, True]


def test_a_gsm8k_file_becomes_tasks(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "test.jsonl", [{"question": "how much is 2+2", "answer": "2+2=4\n#### 4"}])
    (task,) = load_tasks(str(path), tiny_tokenizer(), 63, scoring="gsm8k")
    assert task.text == "Question: how much is 2+2\nAnswer:"
    assert (task.skill, task.scoring, task.held_out) == ("gsm8k", "gsm8k", False)
    assert is_right("so it is 4\n#### 4", *task.answers, task.scoring)


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"So $x = \frac{1}{2}$.", "0.5", True),
        ("The result is 1,018.", "1018", True),
        ("about 3.1", "3.2", False),
        (r"\boxed{2\sqrt{2}}", r"$\sqrt{8}$", True),
        ("no idea", "7", False),
    ],
)
def test_mathematics_is_compared_as_mathematics(response: str, answer: str, right: bool) -> None:
    pytest.importorskip("math_verify", reason="needs the extra `eval`")
    assert is_right(response, answer, "math") is right


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("The answer is (C), not A.", "C"),
        ("Answer: D", "D"),
        ("the answer is **B**", "B"),
        ("The answer is a prism, so C.", "C"),
        ("The answer I choose is B", "B"),
        ("I think A because B is wrong", "A"),
        ("none of them", ""),
    ],
)
def test_the_letter_that_a_response_names(response: str, letter: str) -> None:
    assert chosen_letter(response) == letter


TESTS = "assert add(2, 3) == 5"


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("def add(a, b):\n    return a + b", True),
        ("Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", True),
        ("def add(a, b):\n    return a - b", False),
        ("def add(a, b:", False),
        ("while True: pass", False),
        ("x = bytearray(2**31)\ndef add(a, b): return a + b", False),
        ("open('big', 'wb').write(bytes(2**21))\ndef add(a, b): return a + b", False),
        ("import os\nos.environ['HOME']\ndef add(a, b): return a + b", False),
        ("def add(a, b): return 0\nraise SystemExit", False),
        ("def add(a, b): return 0\nimport os\nos._exit(0)", False),
        ("def add(a, b): return a + b\nif __name__ == '__main__':\n    exit(input())", True),
        ("from __future__ import annotations\ndef add(a, b): return a + b", True),
    ],
)
def test_code_is_right_if_it_passes_the_tests_within_the_limits(response: str, right: bool) -> None:
    assert passes(response, TESTS, seconds=1) is right


def test_nothing_that_the_code_started_goes_on(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])"
    assert passes(code, "", seconds=5)
    time.sleep(2.5)
    assert not mark.exists()


REACHES_OUT = """
import pathlib, socket, sys
socket.create_connection(("127.0.0.1", {port}), 5).close()
"""
WRITES_OUT = "import pathlib\npathlib.Path({path!r}).write_text('x')"


@pytest.fixture
def fresh_sandbox() -> Iterator[None]:
    """`bwrap` is tried again in the test, and after it."""
    working_bwrap.cache_clear()
    yield
    working_bwrap.cache_clear()


@pytest.mark.skipif(not shutil.which("bwrap"), reason="needs bubblewrap")
@pytest.mark.usefixtures("fresh_sandbox")
def test_inside_bubblewrap_there_is_no_network_and_one_folder_to_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reaches_out = REACHES_OUT.format(port=listener.getsockname()[1])
        writes_out = WRITES_OUT.format(path=str(outside))
        assert passes("open('inside', 'w').write('x')", "assert open('inside').read() == 'x'")
        assert not passes(reaches_out, "") and not passes(writes_out, "") and not outside.exists()
        assert not passes("while True: pass", "", seconds=1)
        assert "runs inside bubblewrap, without network" in caplog.text
        monkeypatch.setenv("PATH", "")
        working_bwrap.cache_clear()
        assert passes(reaches_out, "") and passes(writes_out, "") and outside.exists()


@pytest.mark.usefixtures("fresh_sandbox")
def test_bubblewrap_that_does_not_work_is_not_used_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that forbids namespaces."""
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho bwrap: no permissions >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert passes("x = 1", "assert x == 1")
    assert "bubblewrap (bwrap) does not work here (bwrap: no permissions)" in caplog.text
    assert "can reach the network" in caplog.text
