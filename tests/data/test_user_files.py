"""Data files as people have them: each is read with the expected prompts, or refused in one line."""

from __future__ import annotations

import copy
import gzip
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opdlm.config.sections import DataSection, resolve_path
from opdlm.config.text import TextSection
from opdlm.data.chat_template import encode_prompt
from opdlm.data.documents import load_documents
from opdlm.data.messages import Conversation
from opdlm.data.prompts import load_prompts, load_tasks
from opdlm.errors import DataError, OpdlmError

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
ASKED = "<user>hi</><assistant>"
TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
RESULT = {"role": "tool", "content": "3 C"}
CALLED = '{"name": "weather", "arguments": {"city": "Oslo"}}'
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}" + CHAT.removeprefix("{% for m in messages %}")
NO_TOOLS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
ENDLESS = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(a='a') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}"
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHAT


@cache
def bundled_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve_path("bundled:byte"))


def byte_tokenizer(template: str | None = CHAT) -> PreTrainedTokenizerBase:
    """One token per byte: text comes back from its ids as it was."""
    tokenizer = copy.copy(bundled_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def lines(*rows: Any, ensure_ascii: bool = True) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows).encode()


def table(*rows: dict[str, Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


def said(**columns: Any) -> bytes:
    return lines(columns)


HI = lines({"prompt": "hi"})
READ: dict[str, tuple[str, bytes, dict[str, Any], list[str]]] = {
    "text": ("a.jsonl", HI, {}, [ASKED]),
    "blank lines": ("a.jsonl", b"\n" + HI + b"\n  \n" + HI, {}, [ASKED, ASKED]),
    "no newline at the end": ("a.jsonl", HI.strip(), {}, [ASKED]),
    "lines of Windows": ("a.jsonl", HI.replace(b"\n", b"\r\n"), {}, [ASKED]),
    "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + HI, {}, [ASKED]),
    "line separators in a text": (
        "a.jsonl",
        lines({"prompt": "a\u2028b\u2029c\x85d\x0ce"}, ensure_ascii=False),
        {},
        ["<user>a\u2028b\u2029c\x85d\x0ce</><assistant>"],
    ),
    "escaped line feeds": ("a.jsonl", said(prompt="a\n\r\nb "), {}, ["<user>a\n\r\nb </><assistant>"]),
    "gzip": ("a.jsonl.gz", gzip.compress(HI) + gzip.compress(HI), {}, [ASKED, ASKED]),
    "zstandard": ("a.jsonl.zst", pyarrow.Codec("zstd").compress(HI, asbytes=True), {}, [ASKED]),
    "an array": ("a.json", json.dumps([{"prompt": "hi"}] * 2, indent=2).encode(), {}, [ASKED, ASKED]),
    "an array after a byte order mark": ("a.json", b"\xef\xbb\xbf\n[" + HI + b"]", {}, [ASKED]),
    "lines in a .json file": ("a.json", HI + HI, {}, [ASKED, ASKED]),
    "Parquet": ("a.parquet", table({"prompt": "hi"}), {}, [ASKED]),
    "Parquet with nulls": (
        "a.parquet",
        table({"prompt": "hi", "messages": None}, {"prompt": None, "messages": [USER, ANSWER]}),
        {},
        [ASKED, ASKED],
    ),
    "Parquet with tool calls": (
        "a.parquet",
        table({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT]}),
        {},
        [f"<user>hi</><assistant>{CALLED}</><tool>3 C</><assistant>"],
    ),
    "messages": ("a.jsonl", said(messages=[USER]), {}, [ASKED]),
    "messages with their response": ("a.jsonl", said(messages=[USER, ANSWER]), {}, [ASKED]),
    "messages as JSON": ("a.jsonl", said(messages=json.dumps([USER])), {}, [ASKED]),
    "several turns": (
        "a.jsonl",
        said(messages=[USER, ANSWER, USER, ANSWER]),
        {},
        ["<user>hi</><assistant>yes</><user>hi</><assistant>"],
    ),
    "parts": (
        "a.jsonl",
        said(messages=[{"role": "user", "content": [{"type": "text", "text": t} for t in ("h", "i")]}]),
        {},
        [ASKED],
    ),
    "a call without content": (
        "a.jsonl",
        said(messages=[USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT], tools=[TOOL]),
        {"template": WITH_TOOLS},
        [f"[{json.dumps(TOOL)}]<user>hi</><assistant>{CALLED}</><tool>3 C</><assistant>"],
    ),
    "a call as OpenAI writes it": (
        "a.jsonl",
        said(
            messages=[
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
                },
                RESULT,
            ],
            tools=json.dumps([TOOL]),
        ),
        {"template": WITH_TOOLS},
        [f"[{json.dumps(TOOL)}]<user>hi</><assistant>{CALLED}</><tool>3 C</><assistant>"],
    ),
    "a call whose template wants no content": (
        "a.jsonl",
        said(messages=[USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT]),
        {
            "template": "{% for m in messages if m.tool_calls and m.content %}{{ raise_exception('both') }}"
            "{% endfor %}" + CHAT
        },
        [f"<user>hi</><assistant>{CALLED}</><tool>3 C</><assistant>"],
    ),
    "a tool that says nothing": (
        "a.jsonl",
        said(messages=[USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": ""}]),
        {},
        [f"<user>hi</><assistant>{CALLED}</><tool></><assistant>"],
    ),
    "a prompt of messages": ("a.jsonl", said(prompt=[USER], completion=[ANSWER]), {}, [ASKED]),
    "a prompt that the model continues": ("a.jsonl", said(prompt=[USER, ANSWER]), {}, [ASKED + "yes"]),
    "a named column": ("a.jsonl", said(question="hi", messages=3), {"prompt_column": "question"}, [ASKED]),
    "a named column of messages": (
        "a.jsonl",
        said(chosen=[USER, ANSWER], rejected=[USER, ANSWER]),
        {"prompt_column": "chosen"},
        [ASKED],
    ),
    "ShareGPT": (
        "a.json",
        json.dumps(
            [
                {
                    "id": "1",
                    "system": "be brief",
                    "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
                }
            ]
        ).encode(),
        {},
        ["<system>be brief</>" + ASKED],
    ),
    "ShareGPT with roles": ("a.jsonl", said(conversations=[USER, ANSWER]), {}, [ASKED]),
    "Alpaca": ("a.jsonl", said(instruction="hi", input="", output="yes"), {}, [ASKED]),
    "Alpaca with an input": (
        "a.jsonl",
        said(instruction="add", input="1 2", output="3"),
        {},
        ["<user>add\n1 2</><assistant>"],
    ),
    "a system prompt": ("a.jsonl", HI, {"system_prompt": "be brief"}, ["<system>be brief</>" + ASKED]),
    "text for a base model": ("a.jsonl", HI, {"template": None}, ["hi"]),
    "a template that trims": (
        "a.jsonl",
        said(prompt=" hi "),
        {"template": "{{ messages[0].content | trim }}"},
        ["hi"],
    ),
    "a template that escapes": (
        "a.jsonl",
        said(prompt='"\n'),
        {"template": "{{ messages[0].content | tojson }}"},
        ['"\\"\\n"'],
    ),
    "other columns": ("a.jsonl", said(prompt="hi", id=10**40, score=float("nan")), {}, [ASKED]),
}
FIRST = r"a\.jsonl:1"
REFUSED: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "a lone surrogate": ("a.jsonl", b'{"prompt": "a\\ud800"}', {}, FIRST + ".*not valid JSON .*surrogate"),
    "bytes that are not UTF-8": ("a.jsonl", HI + b'{"prompt": "\xff"}', {}, r"a\.jsonl:2 .*UTF-8.*byte 12"),
    "UTF-16": ("a.jsonl", HI.decode().encode("utf-16"), {}, FIRST + ".*UTF-8"),
    "an escaped NUL": ("a.jsonl", said(prompt="a\0"), {}, FIRST + r": `prompt` has U\+0000 at character 1"),
    "a NUL in a message": (
        "a.jsonl",
        said(messages=[{"role": "user", "content": "\0"}]),
        {},
        FIRST + r" has U\+0000",
    ),
    "a NUL byte": ("a.jsonl", HI + b"\0\n", {}, r"a\.jsonl:2 has U\+0000"),
    "a surrogate in the system prompt": (
        "a.jsonl",
        HI,
        {"system_prompt": "\udcff"},
        r"data\.system_prompt has U\+DCFF",
    ),
    "deep nesting": ("a.jsonl", b"[" * 10**5, {}, r"a\.jsonl is not valid JSON \(recursion limit"),
    "deep nesting in a row": ("a.jsonl", b'{"a": ' + b"[" * 10**5, {}, FIRST + ".*recursion limit"),
    "a long integer": ("a.jsonl", b'{"prompt": ' + b"1" * 5000 + b"}", {}, FIRST + ".*number out of range"),
    "half a line": ("a.jsonl", HI + b'{"prompt": "h', {}, r"a\.jsonl:2 is not valid JSON .*Fix"),
    "half an archive": ("a.jsonl.gz", gzip.compress(HI * 99)[:-9], {}, r"a\.jsonl\.gz cannot be read"),
    "an archive in name": ("a.jsonl.gz", HI, {}, r"a\.jsonl\.gz cannot be read"),
    "a table in name": ("a.parquet", HI, {}, r"a\.parquet cannot be read as Parquet"),
    "a table of bytes": (
        "a.parquet",
        table({"prompt": b"\xff"}),
        {},
        r"a\.parquet row 0: `prompt` must be text, not bytes",
    ),
    "a spreadsheet": ("a.csv", b"prompt\nhi\n", {}, r"must be a \.jsonl, \.json .*convert it"),
    "a list of texts": ("a.json", b'["hi"]', {}, r"a\.json row 0 must be a JSON object, not str"),
    "a number as prompt": ("a.jsonl", said(prompt=3), {}, FIRST + ": `prompt` must be text, not int"),
    "no column": (
        "a.jsonl",
        said(question="hi"),
        {},
        FIRST + r" has neither .*question.*data\.prompt_column",
    ),
    "an empty prompt": ("a.jsonl", said(prompt=" \n"), {}, FIRST + " has an empty prompt"),
    "no messages": ("a.jsonl", said(messages=[]), {}, FIRST + " has an empty prompt"),
    "a response alone": ("a.jsonl", said(messages=[ANSWER]), {}, FIRST + " has an empty prompt"),
    "a picture": (
        "a.jsonl",
        said(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        {},
        FIRST + r": `messages` must be .*text only.* See messages\[0\]",
    ),
    "no content": ("a.jsonl", said(messages=[USER, {"role": "user"}]), {}, FIRST + r".* See messages\[1\]"),
    "a message as text": ("a.jsonl", said(messages=["hi"]), {}, FIRST + ": `messages` must be a list of obj"),
    "messages that are no JSON": (
        "a.jsonl",
        said(messages="hi"),
        {},
        FIRST + ": `messages` is not valid JSON",
    ),
    "tools that are no list": ("a.jsonl", said(prompt="hi", tools={"a": 1}), {}, FIRST + ": `tools` must be"),
    "Alpaca with a history": (
        "a.jsonl",
        said(instruction="hi", history=[["a", "b"]]),
        {},
        FIRST + " has a `history`.*messages",
    ),
    "a conversation for a base model": (
        "a.jsonl",
        said(messages=[USER]),
        {"template": None},
        FIRST + ": messages.* need a chat template.*instruction-tuned",
    ),
    "a system prompt for a base model": (
        "a.jsonl",
        HI,
        {"template": None, "system_prompt": "be brief"},
        r"data\.system_prompt need a chat template",
    ),
    "a system prompt that is not shown": (
        "a.jsonl",
        HI,
        {"template": NO_SYSTEM, "system_prompt": "be brief"},
        FIRST + r".* does not show .* system \('be brief'\)\..* leave data\.system_prompt out",
    ),
    "a role that is not shown": (
        "a.jsonl",
        said(messages=[USER, {"role": "critic", "content": "no"}, USER]),
        {"template": CHAT.replace("in messages", "in messages if m.role in ('user', 'assistant')")},
        FIRST + ".* does not show the message of role critic",
    ),
    "an order that the template refuses": (
        "a.jsonl",
        said(messages=[{"role": "system", "content": "s"}, USER]),
        {"template": STRICT},
        FIRST + r": the chat template refuses these messages \(user first\)\. Change",
    ),
} | {
    f"a template with {name}": (
        "a.jsonl",
        HI,
        {"template": template},
        FIRST + f": the chat template fails, {error} ",
    )
    for name, template, error in (
        ("a mistake", "{% for %}", "TemplateSyntaxError"),
        ("an unknown name", "{{ a.b.c }}", "UndefinedError"),
        ("endless recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("an endless loop", ENDLESS, "EndlessError"),
        ("a text that doubles", DOUBLING, "EndlessError"),
        (
            "a text that doubles line by line",
            "{% set x = 'ab' %}" + "{% set x = x + x %}" * 60,
            "EndlessError",
        ),
        ("a list that doubles", DOUBLING.replace("'a'", "[1]").replace("~", "+"), "EndlessError"),
        ("a text without end", "{% for i in range(9**5) %}{{ 'a' * 9**5 }}{% endfor %}", "EndlessError"),
        ("a division by zero", "{{ 1 / 0 }}", "ZeroDivisionError"),
        ("a number for a text", "{{ messages[0].content + 1 }}", "TypeError"),
        ("a way out", "{{ ''.__class__.__mro__ }}", "SecurityError"),
    )
}


def prompts_of(tmp_path: Path, file: str, content: bytes, settings: dict[str, Any]) -> list[str]:
    """The prompts of a file as text."""
    (tmp_path / file).write_bytes(content)
    options = dict(settings)
    tokenizer = byte_tokenizer(options.pop("template", CHAT))
    prompts = load_prompts(DataSection(path=str(tmp_path / file), **options), tokenizer, 10**9)
    return [str(tokenizer.decode(list(prompt.ids))) for prompt in prompts]


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_with_every_character(name: str, tmp_path: Path) -> None:
    file, content, options, expected = READ[name]
    assert prompts_of(tmp_path, file, content, options) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    file, content, options, expected = REFUSED[name]
    with pytest.raises(DataError, match=expected) as refusal:
        prompts_of(tmp_path, file, content, options)
    assert len(str(refusal.value).splitlines()) == 1 and len(str(refusal.value)) < 600


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    str.strip
)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), TEXT), min_size=1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=TURNS, form=st.sampled_from(["jsonl", "json", "gz", "parquet", "text"]), ascii=st.booleans())
def test_no_character_is_lost_between_file_and_ids(
    turns: list[tuple[str, str]], form: str, ascii: bool, tmp_path: Path
) -> None:
    turns = [*turns, ("user", turns[-1][1])]
    messages = [{"role": role, "content": text} for role, text in turns]
    row: dict[str, Any] = {"messages": messages}
    expected = "".join(f"<{role}>{text}</>" for role, text in turns)
    if form == "json":
        file, content = "a.json", json.dumps([row], ensure_ascii=ascii).encode()
    elif form == "parquet":
        file, content = "a.parquet", table(row)
    elif form == "text":
        file, content = "a.jsonl", lines({"prompt": turns[-1][1]}, ensure_ascii=ascii)
        expected = f"<user>{turns[-1][1]}</>"
    else:
        file, content = "a.jsonl", lines(row, ensure_ascii=ascii)
        if form == "gz":
            file, content = "a.jsonl.gz", gzip.compress(content)
    assert prompts_of(tmp_path, file, content, {"max_prompt_tokens": 10**6}) == [expected + "<assistant>"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lines))
def test_any_file_is_read_or_refused(content: bytes, tmp_path: Path) -> None:
    try:
        assert prompts_of(tmp_path, "a.jsonl", content, {})
    except OpdlmError as refusal:
        assert len(str(refusal).split("\n")) == 1


@pytest.mark.parametrize(
    ("row", "response"),
    [
        ({"prompt": "hi", "response": "yes"}, "yes"),
        ({"prompt": [USER], "completion": [ANSWER]}, "yes"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, "yes"),
        ({"instruction": "hi", "output": "yes"}, "yes"),
        ({"messages": [USER, ANSWER | {"content": [{"type": "text", "text": "yes"}]}]}, "yes"),
    ],
)
def test_every_form_of_a_pair_is_the_same_document(
    row: dict[str, Any], response: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(row))
    tokenizer = byte_tokenizer()
    (document,) = load_documents(TextSection(path=str(tmp_path / "a.jsonl")), tokenizer, 10**9)
    assert tokenizer.decode(document.ids[: document.num_prompt]) == ASKED
    assert tokenizer.decode(document.ids[document.num_prompt :]) == f"{response}<|end|>"


def test_a_response_with_more_than_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(said(messages=[USER, ANSWER | {"tool_calls": [CALL]}]))
    with pytest.raises(DataError, match=r"a\.jsonl:1: its response has tool_calls"):
        load_documents(TextSection(path=str(tmp_path / "a.jsonl")), byte_tokenizer(), 10**9)


def test_what_the_template_does_not_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = said(messages=[USER | {"mood": "good"}], tools=[TOOL])
    with caplog.at_level(logging.WARNING):
        prompts_of(tmp_path, "a.jsonl", content, {"template": NO_TOOLS})
    assert "the chat template does not read mood, tools" in caplog.text


@pytest.mark.parametrize("template", [None, "<|end|>{{ messages[0].content }}"])
def test_a_first_token_is_not_doubled(template: str | None) -> None:
    """A tokenizer that always puts BOS first, and a text or a template that does so too."""
    tokenizer = copy.deepcopy(byte_tokenizer(template))
    tokenizer.bos_token = "<|end|>"
    bos = tokenizer.bos_token_id
    call = type(tokenizer).__call__

    class AddsBos(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [bos, *call(self, text, **options)["input_ids"]]}

    tokenizer.__class__ = AddsBos
    text = "hi" if template else "<|end|>hi"
    ids = encode_prompt(tokenizer, Conversation(prompt=text))
    assert ids[0] == bos and tokenizer.decode(ids[1:]) == "hi"


DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHAT


def test_the_day_of_a_template_can_be_set(tmp_path: Path) -> None:
    found = [
        prompts_of(tmp_path, "a.jsonl", HI, {"template": DATED, "date": day})
        for day in ("2026-02-01", "2026-02-01", "1999-12-31")
    ]
    assert found == [["01 Feb 2026" + ASKED]] * 2 + [["31 Dec 1999" + ASKED]]
    with pytest.raises(OpdlmError, match=r"data\.date \(tomorrow\) must be a date such as 2026-11-29"):
        prompts_of(tmp_path, "a.jsonl", HI, {"template": DATED, "date": "tomorrow"})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("a", ("a",)), (3, ("3",)), (0, ("0",)), (None, ()), (["a", 3], ("a", "3"))],
)
def test_answers_are_one_or_several(answer: Any, expected: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(said(prompt="hi", answer=answer))
    (task,) = load_tasks(str(tmp_path / "a.jsonl"), byte_tokenizer(), 10**9)
    assert task.answers == expected


@pytest.mark.parametrize("answer", [[], {"text": "a"}, [["a"]], [None]])
def test_an_answer_of_another_kind_is_refused(answer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(said(prompt="hi", answer=answer))
    with pytest.raises(DataError, match=FIRST + ": `answer` must be a text, a number, or a list"):
        load_tasks(str(tmp_path / "a.jsonl"), byte_tokenizer(), 10**9)
