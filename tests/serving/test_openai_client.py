"""The `openai` package as the client of a server in a process of its own: every field that is supported."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from loopback_server import HELLO, serve

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import Request
from opdlm.decoding.generate import Decoder
from opdlm.seeds import seed_of

openai = pytest.importorskip("openai")
ASKED: Any = {"model": "tiny", "messages": HELLO, "seed": 3}


@pytest.fixture(scope="module")
def client(served_process: Any) -> Any:
    return openai.OpenAI(base_url=f"{served_process.url}/v1", api_key="secret", max_retries=0)


def text_of(events: Any) -> str:
    return "".join(event.choices[0].delta.content or "" for event in events if event.choices)


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(**ASKED)


def test_a_chat_is_answered_whole_and_as_a_stream(client: Any) -> None:
    whole = client.chat.completions.create(**ASKED)
    events = list(
        client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
    )
    assert text_of(events) == whole.choices[0].message.content != ""
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert events[-1].usage.num_forwards > 0
    assert whole.usage.completion_tokens > 0 and whole.choices[0].finish_reason in ("stop", "length")


SAMPLED = {"temperature": 1.0, "top_p": 0.95}


@pytest.mark.parametrize(
    "fields",
    [
        {**SAMPLED, "n": 3},
        {**SAMPLED, "stop": ["e", "1"], "max_completion_tokens": 12},
        {"logprobs": True, "top_logprobs": 2, "max_tokens": 5},
        {**SAMPLED, "extra_body": {"top_k": 5, "stop_token_ids": [5, 6], "ignore_eos": True}},
        {"extra_body": {"chat_template_kwargs": {}, "continue_final_message": False}},
        {
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "logit_bias": {},
            "response_format": {"type": "text"},
        },
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "tools": []},
        {"extra_body": {"min_p": 0, "min_tokens": 0, "repetition_penalty": 1.0, "best_of": 1, "top_k": -1}},
    ],
    ids=lambda fields: json.dumps(fields)[:50],
)
def test_a_seed_repeats_the_answer_of_every_supported_field(client: Any, fields: dict[str, Any]) -> None:
    one, other = (client.chat.completions.create(**ASKED, **fields) for _ in range(2))
    assert len(one.choices) == fields.get("n", 1)
    single = client.chat.completions.create(**ASKED, **fields | {"n": 1})
    assert one.usage.prompt_tokens == single.usage.prompt_tokens
    for first, second in zip(one.choices, other.choices, strict=True):
        assert (first.message.content, first.finish_reason) == (second.message.content, second.finish_reason)
    if fields.get("logprobs"):
        assert all(len(token.top_logprobs) == 2 for token in one.choices[0].logprobs.content)


def test_an_unfinished_answer_is_continued(client: Any) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "1 2"}]
    continued = client.chat.completions.create(**ASKED | {"messages": messages}, max_tokens=4)
    plain = client.chat.completions.create(**ASKED, max_tokens=4)
    assert continued.usage.prompt_tokens > plain.usage.prompt_tokens


def test_completions_echo_score_and_stream(client: Any) -> None:
    asked = {"model": "tiny", "prompt": ["add 1 2", "copy ab"], "seed": 1, "max_tokens": 6}
    plain = client.completions.create(**asked)
    echoed = client.completions.create(**asked, echo=True)
    for prompt, one, other in zip(asked["prompt"], plain.choices, echoed.choices, strict=True):
        assert other.text == prompt + one.text
    scored = client.completions.create(**asked, logprobs=2)
    assert len(scored.choices[0].logprobs.tokens) == len(scored.choices[0].logprobs.top_logprobs) > 0
    events = list(client.completions.create(**asked, stream=True))
    text = "".join(event.choices[0].text for event in events if event.choices[0].index == 0)
    assert text == plain.choices[0].text


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"presence_penalty": 2.5}, "a number from -2 to 2"),
    ({"logit_bias": {"x": -100}}, "keys must be token ids"),
    ({"logit_bias": {"5": -101}}, "from -100 to 100"),
    ({"extra_body": {"min_tokens": 10**6}}, "min_tokens .1000000. exceeds"),
    ({"extra_body": {"typical_p": 0.1}}, "temperature, top_k, top_p and min_p"),
    ({"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}}, "with ignore_eos"),
    ({"extra_body": {"guided_json": {}}}, "response_format takes a JSON schema"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "not shown by the model's chat template"),
    ({"tool_choice": "required"}, "cannot be forced"),
    ({"modalities": ["audio"]}, "writes text"),
    ({"top_logprobs": 2}, "needs logprobs"),
    ({"extra_body": {"unheard_of": 1}}, "unheard_of is not supported"),
]


@pytest.mark.parametrize(("fields", "reason"), UNSUPPORTED, ids=lambda value: json.dumps(value)[:40])
def test_what_is_not_supported_says_why(client: Any, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        client.chat.completions.create(**ASKED, **fields)
    assert refused.value.body["type"] == "invalid_request_error"


def test_a_suffix_needs_a_mode_that_fills_gaps(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="from left to right"):
        client.completions.create(model="tiny", prompt="add", suffix=" 2")


def test_a_gap_before_a_suffix_is_filled(folders: dict[str, Path]) -> None:
    config = DecodeConfig(mode="threshold", max_new_tokens=7, logprobs=True)
    for served in serve(folders["sdar"], config):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0)
        prompt, suffix = (served.tokenizer(text).input_ids for text in ("add 1", " 2 = 3"))
        decoder = Decoder(served.model, config, num_rows=1, max_length=64)
        ids = [*prompt, *[served.model.spec.mask_token_id] * 7, *suffix]
        decoder.waiting.append(Request(0, ids, seed_of(3, 0), config, ignore_eos=True))
        while not (done := decoder.step()):
            pass
        expected = served.tokenizer.decode(done[0].response_ids[:7], skip_special_tokens=True)

        asked: dict[str, Any] = {"model": "tiny", "prompt": "add 1", "suffix": " 2 = 3", "seed": 3}
        filled = client.completions.create(**asked, logprobs=0)
        assert filled.choices[0].text == expected
        assert filled.usage.completion_tokens == 7
        assert filled.usage.prompt_tokens == len(prompt) + len(suffix)
        streamed = client.completions.create(**asked, stream=True)
        assert "".join(event.choices[0].text for event in streamed) == expected
        assert client.completions.create(**asked, echo=True).choices[0].text == "add 1" + expected
        with pytest.raises(openai.BadRequestError, match="suffix with stop"):
            client.completions.create(**asked, stop="x")


def test_every_request_is_logged(client: Any, served_process: Any) -> None:
    answer = client.chat.completions.with_raw_response.create(
        **ASKED, n=2, extra_headers={"X-Request-Id": "mine-7"}
    )
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**ASKED, extra_headers={"X-Request-Id": "mine-8"}, n=0)
    usage = json.loads(answer.text)["usage"]
    lines: dict[str, Any] = {}
    deadline = time.monotonic() + 10  # a line is written after the answer has been sent
    while not {"mine-7", "mine-8"} <= lines.keys() and time.monotonic() < deadline:
        lines = {line["id"]: line for line in map(json.loads, served_process.log.read_text().splitlines())}
    good, bad = lines["mine-7"], lines["mine-8"]
    assert (good["status"], bad["status"]) == (200, 400) and "completion_tokens" not in bad
    assert good["completion_tokens"] == usage["completion_tokens"] == answer.parse().usage.completion_tokens
    assert good["prompt_tokens"] == usage["prompt_tokens"]
    assert good["tokens_per_forward"] == pytest.approx(
        usage["completion_tokens"] / usage["num_forwards"], abs=1e-3
    )
    assert 0 <= good["queue_seconds"] <= good["seconds"]
