"""Fields beyond sampling: stop tokens, echo, variables of the template, continued answers, neutral values."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from loopback_server import CHAT, HELLO, TEXT, Served

from opdlm.serving.answers import ScoredToken, TokenChoice, chat_logprobs, text_logprobs

NEUTRAL: list[dict[str, Any]] = [
    {"response_format": {"type": "text"}},
    {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_p": 0},
    {"top_k": -1},
    {"logit_bias": {}},
    {"metadata": {"a": "b"}, "store": True, "service_tier": "auto", "user": "me"},
    {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "best_of": 1, "suffix": None},
    {"ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True, "modalities": ["text"]},
    {"chat_template_kwargs": {}, "continue_final_message": False},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda fields: json.dumps(fields)[:40])
def test_a_field_that_asks_for_nothing_changes_nothing(lossless: Served, fields: dict[str, Any]) -> None:
    body = {"messages": HELLO, "seed": 1}
    status, answer = lossless.post(CHAT, body | fields)
    assert status == 200, answer
    assert answer["choices"] == lossless.post(CHAT, body)[1]["choices"]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_response_ends_before_a_stop_token(lossless: Served, temperature: float) -> None:
    body = {"prompt": "add 1 2", "seed": 4, "temperature": temperature, "logprobs": 0}
    tokens = lossless.post(TEXT, body)[1]["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) > 5
    place = tokens.index(tokens[5])
    (stop,) = lossless.tokenizer(tokens[5])["input_ids"]
    stopped = lossless.post(TEXT, body | {"stop_token_ids": [0, stop]})[1]["choices"][0]
    assert stopped["logprobs"]["tokens"] == tokens[:place] and stopped["finish_reason"] == "stop"
    assert stopped["text"] == "".join(tokens[:place])
    events = lossless.events(TEXT, body | {"stop_token_ids": [0, stop]})
    assert "".join(event["choices"][0]["text"] for event in events) == stopped["text"]


def test_echo_repeats_the_prompts(lossless: Served) -> None:
    ids = lossless.tokenizer("copy ab")["input_ids"]
    body = {"prompt": ["add 1 2", "copy ab"], "n": 2, "seed": 4, "temperature": 1}
    plain, echoed = (lossless.post(TEXT, body | {"echo": echo})[1]["choices"] for echo in (False, True))
    prompts = ["add 1 2", "add 1 2", "copy ab", "copy ab"]
    texts = [prompt + choice["text"] for prompt, choice in zip(prompts, plain, strict=True)]
    assert [choice["text"] for choice in echoed] == texts
    events = lossless.events(TEXT, body | {"echo": True})
    for index, text in enumerate(texts):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in mine) == text
    by_ids = lossless.post(TEXT, {"prompt": ids, "echo": True, "max_tokens": 2})[1]["choices"][0]["text"]
    assert by_ids.startswith(lossless.tokenizer.decode(ids))
    status, answer = lossless.post(TEXT, body | {"echo": True, "logprobs": 0})
    assert status == 400 and "echo with logprobs" in answer["error"]["message"]


def test_variables_reach_the_template_or_are_refused(
    lossless: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"messages": HELLO, "max_tokens": 2}
    status, answer = lossless.post(CHAT, body | {"chat_template_kwargs": {"mood": "abc"}})
    assert status == 400 and "chat_template_kwargs (mood)" in answer["error"]["message"]
    monkeypatch.setattr(lossless.tokenizer, "chat_template", "{{ mood }}{{ messages[0].content }}")
    status, answer = lossless.post(CHAT, body | {"chat_template_kwargs": {"mood": "abc"}})
    assert status == 200 and answer["usage"]["prompt_tokens"] == len("abc" + HELLO[0]["content"])
    for hostile in ({"chat_template": "x"}, {"tokenize": True}, {"messages": []}):
        status, answer = lossless.post(CHAT, body | {"chat_template_kwargs": hostile})
        assert status == 400 and "an object of variables" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("turns", "value", "status"), [(1, True, 400), (1, False, 200), (2, True, 200), (2, False, 400)]
)
def test_only_a_final_message_of_the_assistant_is_continued(
    lossless: Served, turns: int, value: bool, status: int
) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "1 2"}][:turns]
    found, answer = lossless.post(
        CHAT, {"messages": messages, "continue_final_message": value, "max_tokens": 2}
    )
    assert found == status, answer
    assert status == 200 or f"continue_final_message ({value})" in answer["error"]["message"]


def test_log_probabilities_of_impossible_tokens_are_numbers(lossless: Served) -> None:
    """JSON has no infinity."""
    body = {"prompt": "add 1 2", "temperature": 100, "seed": 1, "logprobs": 0}
    values = lossless.post(TEXT, body)[1]["choices"][0]["logprobs"]["token_logprobs"]
    assert values and all(-9999 <= value <= 0 for value in values)


def test_the_most_likely_tokens_are_those_of_the_ar_model(lossless: Served) -> None:
    body = {
        "messages": HELLO,
        "seed": 2,
        "temperature": 1,
        "max_tokens": 9,
        "logprobs": True,
        "top_logprobs": 3,
    }
    ids = lossless.post("/tokenize", {"messages": HELLO})[1]["tokens"]
    entries = lossless.post(CHAT, body)[1]["choices"][0]["logprobs"]["content"]
    assert len(entries) > 3
    for entry in entries:
        with lossless.model.teacher_weights() as teacher, torch.no_grad():
            logits_V = teacher(torch.tensor([ids])).logits[0, -1]
        logits_V[list(lossless.model.spec.banned_token_ids)] = -torch.inf
        best = logits_V.log_softmax(-1).topk(3)
        (chosen,) = lossless.tokenizer(entry["token"])["input_ids"]
        assert entry["logprob"] == pytest.approx(float(logits_V.log_softmax(-1)[chosen]), abs=1e-4)
        top = entry["top_logprobs"]
        assert [one["token"] for one in top] == [lossless.tokenizer.decode([i]) for i in best.indices]
        assert [one["logprob"] for one in top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert all(one.keys() == {"token", "logprob", "bytes"} for one in top)
        ids = [*ids, chosen]
    text = {"prompt": "add 1 2", "logprobs": 2, "max_tokens": 5}
    found = lossless.post(TEXT, text)[1]["choices"][0]["logprobs"]
    for token, logprob, top in zip(
        *(found[key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert top[token] == logprob and 2 <= len(top) <= 3


def test_tokens_of_one_text_stand_beside_each_other() -> None:
    def scored(token: int, text: str, logprob: float) -> ScoredToken:
        return ScoredToken(token, text, None, logprob)

    part, other, a = scored(7, "\ufffd", -1.0), scored(8, "\ufffd", -0.5), scored(9, "a", -2.0)
    written = text_logprobs([TokenChoice(part, [other, part, a])])
    assert written["top_logprobs"] == [{"\ufffd": -1.0, "token_id:8": -0.5, "a": -2.0}]
    assert chat_logprobs([TokenChoice(a, [])])["content"][0]["bytes"] is None


def test_ignore_eos_decodes_to_the_limit(lossless: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "add 1 2", "max_tokens": 12, "logprobs": 0}
    token = lossless.post(TEXT, body | {"ignore_eos": True})[1]["choices"][0]["logprobs"]["tokens"][4]
    (stop,) = lossless.tokenizer(token)["input_ids"]
    monkeypatch.setattr(lossless.model, "spec", replace(lossless.model.spec, stop_token_ids=(stop,)))
    ended, ignored = (lossless.post(TEXT, body | {"ignore_eos": value})[1] for value in (False, True))
    assert ended["usage"]["completion_tokens"] <= 5 and ended["choices"][0]["finish_reason"] == "stop"
    assert ignored["usage"]["completion_tokens"] == 12 and ignored["choices"][0]["finish_reason"] == "length"
    assert len(ignored["choices"][0]["logprobs"]["tokens"]) == 12


def greedy(served: Served, **fields: Any) -> list[str]:
    """Tokens of a greedy response."""
    body = {"prompt": "add 1 2", "temperature": 0, "logprobs": 0, "max_tokens": 16, "ignore_eos": True}
    status, answer = served.post(TEXT, body | fields)
    assert status == 200, answer
    return answer["choices"][0]["logprobs"]["tokens"]


def test_a_banned_token_is_never_written_and_a_wanted_one_always(lossless: Served) -> None:
    plain = greedy(lossless)
    (banned,), (wanted,) = (lossless.tokenizer(token)["input_ids"] for token in (plain[0], plain[3]))
    assert plain[0] not in greedy(lossless, logit_bias={str(banned): -100})
    assert greedy(lossless, logit_bias={str(wanted): 100}) == [plain[3]] * 16


def test_penalties_are_subtracted_from_the_logits_of_written_tokens(lossless: Served) -> None:
    """Against a loop over the family's own forward."""
    fields = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "min_p": 0.5}
    model, ids = lossless.model, lossless.tokenizer("add 1 2")["input_ids"]
    num_prompt, banned = len(ids), list(model.spec.banned_token_ids)
    with torch.no_grad(), model.adapter_off():
        for _ in range(16):
            scores_V = model.student(torch.tensor([ids])).logits[0, -1].float()
            scores_V[banned] = -torch.inf
            for token in {*ids}:
                scores_V[token] *= 1 / 1.2 if scores_V[token] > 0 else 1.2
            for token in {*ids[num_prompt:]}:
                scores_V[token] -= 0.7 + 0.4 * ids[num_prompt:].count(token)
            ids.append(int(scores_V.argmax()))
    found = greedy(lossless, **fields)
    assert found == [lossless.tokenizer.decode([token]) for token in ids[num_prompt:]]
    assert found != greedy(lossless)


def test_min_p_leaves_likely_tokens_only(lossless: Served) -> None:
    body = {"prompt": "add 1 2", "temperature": 1.7, "max_tokens": 12, "ignore_eos": True, "seed": 3}
    texts = [lossless.post(TEXT, body | fields)[1]["choices"][0]["text"] for fields in ({}, {"min_p": 1.0})]
    greedy_text = lossless.post(TEXT, body | {"temperature": 0})[1]["choices"][0]["text"]
    assert texts[1] == greedy_text != texts[0]


def test_no_stop_token_comes_before_min_tokens(lossless: Served) -> None:
    (stop,) = lossless.tokenizer(greedy(lossless)[3])["input_ids"]
    body = {"prompt": "add 1 2", "temperature": 0, "stop_token_ids": [stop], "max_tokens": 16}
    lengths = [
        lossless.post(TEXT, body | fields)[1]["usage"]["completion_tokens"]
        for fields in ({}, {"min_tokens": 9})
    ]
    assert lengths[0] <= 4 and lengths[1] >= 9


def test_tools_beside_a_prompt_to_tokenise_are_not_ignored(lossless: Served) -> None:
    status, answer = lossless.post("/tokenize", {"prompt": "add 1 2", "tools": [{"type": "function"}]})
    assert status == 400 and "tools are shown with messages" in answer["error"]["message"]
