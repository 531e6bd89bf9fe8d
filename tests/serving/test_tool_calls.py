"""Tool calls of the known families become `tool_calls`; everything else remains text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loopback_server import CHAT, HELLO, Served, serve
from tiny_checkpoints import CHARACTERS, TEMPLATE, tiny_model, tiny_tokenizer

from opdlm.data.chat_template import encode_prompt
from opdlm.data.messages import Conversation
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.serving.tool_calls import FORMATS, ToolFormat, tool_format_of

HERMES, MISTRAL, LLAMA = FORMATS
QWEN_TEMPLATE = (
    'within <tool_call></tool_call>:\n<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
)
LLAMA_TEMPLATE = (
    'in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
)
ONE, TWO = ("add", {"a": 1, "b": [2]}), ("now", {})
ADD, NOW = '{"name": "add", "arguments": {"a": 1, "b": [2]}}', '{"arguments": {}, "name": "now"}'


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN_TEMPLATE, HERMES),
        ("{{ '[TOOL_CALLS]' + calls }}", MISTRAL),
        (LLAMA_TEMPLATE, LLAMA),
        (QWEN_TEMPLATE + "<function=example>", None),
        ("[TOOL_CALLS]name[ARGS]{}", None),
        ("{{ messages[0].content }}", None),
    ],
)
def test_the_chat_template_decides_the_format(template: str, expected: ToolFormat | None) -> None:
    assert tool_format_of(template) is expected


@pytest.mark.parametrize(
    ("one", "text", "head", "calls"),
    [
        (HERMES, f"<tool_call>\n{ADD}\n</tool_call>", "", [ONE]),
        (
            HERMES,
            f"Well.\n<tool_call>{ADD}</tool_call>\n<tool_call>\n{NOW}\n</tool_call>",
            "Well.",
            [ONE, TWO],
        ),
        (HERMES, f"<tool_call>{NOW}", "", [TWO]),
        (MISTRAL, f" [{ADD}, {NOW}]", "", [ONE, TWO]),
        (MISTRAL, f"[TOOL_CALLS][{NOW}]", "", [TWO]),
        (LLAMA, f"{ADD}; {NOW}".replace("arguments", "parameters"), "", [ONE, TWO]),
    ],
)
def test_calls_are_read(one: ToolFormat, text: str, head: str, calls: list[Any]) -> None:
    assert one.split(text) == (head, calls)
    parts = [one.text_before(text[:n]) for n in range(len(text) + 1)]
    assert all(head.startswith(part) for part in parts) and parts[-1] == head


@pytest.mark.parametrize("one", FORMATS, ids=("hermes", "mistral", "llama"))
@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello [1] {2}.",
        '{"name": "add"}',
        '[1, {"name": "add", "arguments": {}, "parameters": {}}]',
        '{"name": "add", "arguments": {}, "parameters": {}} and so on',
        '<tool_call>{"name": "add", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        "<tool_call>{'name': 'add'}</tool_call>",
        "<tool_call>" + "[" * 100_000,
        "[" * 100_000,
        '{"name": "add", "parameters": {"a": ' + "9" * 5000 + "}}",
        "5 <",
    ],
    ids=lambda text: str(text)[:30],
)
def test_what_is_no_call_remains_text(one: ToolFormat, text: str) -> None:
    assert one.split(text) == (text, [])
    assert text.startswith(one.text_before(text))


def test_text_is_held_back_only_where_a_call_may_begin() -> None:
    assert HERMES.text_before("Well, 1 <") == "Well, 1"
    assert HERMES.text_before("Well, 1 < 2") == "Well, 1 < 2"
    assert MISTRAL.text_before(" [") == "" and MISTRAL.text_before("x [") == "x ["


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "1"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of a tiny model that has learnt to answer with one tool call."""
    folder = tmp_path_factory.mktemp("calls")
    tokenizer = tiny_tokenizer(
        CHARACTERS + '<>{}[]":,_/', TEMPLATE + "{# <tool_call> arguments {{ tools }} #}"
    )
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    ids = encode_prompt(tokenizer, Conversation(prompt=HELLO))
    labels = [*tokenizer("yes\n" + CALL).input_ids, tokenizer.eos_token_id]
    batch = torch.tensor([[*ids, *labels]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    while (loss := model(input_ids=batch, labels=batch).loss) > 0.05:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    yield from serve(folder, DecodeConfig(mode="ar", max_new_tokens=90), max_length=160)


def test_a_call_is_answered_whole_and_as_a_stream(calling: Served) -> None:
    body = {"messages": HELLO, "tools": TOOLS}
    choice = calling.post(CHAT, body)[1]["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "yes"
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"] == {"name": "add", "arguments": '{"a": "1"}'}
    *pieces, last = [event["choices"][0] for event in calling.events(CHAT, body)]
    assert "".join(piece["delta"]["content"] for piece in pieces) == "yes" and len(pieces) >= 1
    assert last["finish_reason"] == "tool_calls" and not last["delta"]["content"]
    (streamed,) = last["delta"]["tool_calls"]
    assert streamed["index"] == 0 and streamed["function"] == call["function"]
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "content": "2", "tool_call_id": call["id"]}
    status, answered = calling.post(
        CHAT, {"messages": [*HELLO, turn, answer], "tools": TOOLS, "max_tokens": 2}
    )
    assert status == 200, answered


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_a_call_is_text(calling: Served, fields: dict[str, Any]) -> None:
    choice = calling.post(CHAT, {"messages": HELLO, **fields})[1]["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == "yes\n" + CALL
    assert "tool_calls" not in choice["message"]


def test_a_call_cannot_be_forced(calling: Served) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        status, answer = calling.post(CHAT, {"messages": HELLO, "tools": TOOLS, "tool_choice": choice})
        assert status == 400 and "cannot be forced" in answer["error"]["message"]
