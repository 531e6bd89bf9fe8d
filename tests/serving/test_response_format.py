"""`response_format`: what the model writes obeys a grammar, whatever is drafted and decoded beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from loopback_server import CHAT, HELLO, TEXT, Served, serve
from pydantic import BaseModel, Field
from tiny_checkpoints import CHARACTERS, tiny_model, tiny_overrides, tiny_tokenizer, write_data

from opdlm.cli.main import main
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.serving import grammar

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": 10, "maximum": 99},
        "word": {"type": "string", "pattern": "^[a-e]{1,4}$"},
        "tags": {"type": "array", "items": {"enum": ["x", "yy", True]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["sum", "word", "tags"],
    "additionalProperties": False,
}


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that can write JSON."""
    root = tmp_path_factory.mktemp("json")
    write_data(root)
    tiny_model("llama", max_position_embeddings=512).save_pretrained(root / "teacher")
    tiny_tokenizer('{}[]",:_.' + CHARACTERS).save_pretrained(root / "teacher")
    overrides = tiny_overrides(root / "teacher", root, root / "run")
    assert main(["convert", str(root / "teacher"), *overrides[1:], "format.name=preserve"]) == 0
    return root / "run" / "model"


@pytest.fixture(scope="module")
def by_mode(folder: Path) -> Iterator[dict[Mode, Served]]:
    modes: tuple[Mode, ...] = ("lossless", "ar", "threshold")
    config = DecodeConfig(max_new_tokens=400, forward_overhead=32.0, prompt_lookup_num_tokens=20)  # no clock
    servers = [serve(folder, replace(config, mode=mode), max_length=500) for mode in modes]
    yield {mode: next(server) for mode, server in zip(modes, servers, strict=True)}
    for server in servers:
        next(server, None)


def body_of(seed: int, temperature: float, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"add {seed} 2"}]
    return {"messages": messages, "seed": seed, "temperature": temperature, **schema_format(SCHEMA), **fields}


def text_of(served: Served, body: dict[str, Any]) -> str:
    status, answer = served.post(CHAT, body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"])


@pytest.mark.parametrize("temperature", [0, 1])
def test_random_text_follows_the_schema_and_ar_writes_the_same(
    by_mode: dict[Mode, Served], temperature: float
) -> None:
    for seed in range(6):
        lossless, ar = (text_of(by_mode[mode], body_of(seed, temperature)) for mode in ("lossless", "ar"))
        jsonschema.validate(json.loads(lossless), SCHEMA)
        assert lossless == ar
        plain = body_of(seed, temperature) | {"response_format": None, "max_tokens": 20}
        free = by_mode["lossless"].post(CHAT, plain)[1]["choices"][0]["message"]["content"]
        assert not free.startswith("{")


def test_drafts_are_accepted_under_a_grammar(by_mode: dict[Mode, Served]) -> None:
    """The text repeats itself, so that it can be copied."""
    items = {"type": "array", "items": {"const": "abcdefgh"}, "minItems": 8, "maxItems": 8}
    body = body_of(1, 0) | schema_format(items)
    answer = by_mode["lossless"].post(CHAT, body)[1]
    assert json.loads(answer["choices"][0]["message"]["content"]) == ["abcdefgh"] * 8
    assert answer["usage"]["num_forwards"] < 0.7 * answer["usage"]["completion_tokens"]


def test_formats_stream_and_share_steps_with_other_requests(by_mode: dict[Mode, Served]) -> None:
    served = by_mode["lossless"]
    other = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}
    small = schema_format(other | {"additionalProperties": False})
    bodies = [body_of(seed, 1) for seed in range(3)] + [body_of(seed, 1) | small for seed in range(3)]
    free = [{"messages": HELLO, "seed": seed, "temperature": 1, "max_tokens": 30} for seed in range(3)]
    alone = [served.post(CHAT, body)[1]["choices"] for body in (*bodies, *free)]
    with ThreadPoolExecutor(9) as pool:
        together = list(pool.map(lambda body: served.post(CHAT, body)[1]["choices"], (*bodies, *free)))
    assert together == alone
    for body, choices in zip(bodies, alone, strict=False):
        text = choices[0]["message"]["content"]
        jsonschema.validate(json.loads(text), body["response_format"]["json_schema"]["schema"])
        events = served.events(CHAT, body)
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == text
    several = served.post(TEXT, {"prompt": ["add", "copy"], "n": 2, "temperature": 1, **small})[1]
    assert {json.loads(choice["text"])["n"] for choice in several["choices"]} <= {1, 22}


def test_any_object_is_an_object(by_mode: dict[Mode, Served]) -> None:
    served = by_mode["lossless"]
    close = {str(token): 60 for token in served.tokenizer.convert_tokens_to_ids(["}", '"'])}
    body = body_of(2, 1) | {"response_format": {"type": "json_object"}, "logit_bias": close, "min_p": 0.2}
    assert isinstance(json.loads(text_of(served, body)), dict)


def test_a_text_that_cannot_go_on_is_an_error_of_its_request(by_mode: dict[Mode, Served]) -> None:
    served = by_mode["lossless"]
    schema = {"enum": ["aaé", "aaü"]}  # the vocabulary lacks their last characters
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(text_of, served, body_of(1, 1))
        status, answer = served.post(CHAT, body_of(0, 0) | schema_format(schema))
        assert status == 500 and "cannot be followed with this vocabulary" in answer["error"]["message"]
        jsonschema.validate(json.loads(good.result()), SCHEMA)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "an object whose type is text, json_object"),
    ({"response_format": {"type": "json_schema"}}, "json_schema with an object json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "x": 1}}},
        "must",
    ),
    (schema_format({"type": "obj"}), "Invalid type: obj"),
    (schema_format({"type": "string", "pattern": "("}), "unclosed group"),
    (schema_format({"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
    (schema_format({"not": {"type": "string"}, "x-guidance": {"lenient": True}}), "Unimplemented keys"),
    (schema_format({"const": "x" * 2**16}), "at most 65536"),
    (schema_format(SCHEMA) | {"ignore_eos": True}, "with ignore_eos"),
    (schema_format(SCHEMA) | {"min_tokens": 3}, "with min_tokens"),
    (schema_format(SCHEMA) | {"guided_json": {}}, "response_format takes a JSON schema"),
]


@pytest.mark.parametrize(("fields", "reason"), BAD, ids=lambda value: json.dumps(value)[:60])
def test_what_no_grammar_can_follow_is_refused(
    by_mode: dict[Mode, Served], fields: dict[str, Any], reason: str
) -> None:
    status, answer = by_mode["lossless"].post(CHAT, {"messages": HELLO, **fields})
    assert status == 400 and reason in answer["error"]["message"], answer


def test_a_vocabulary_without_braces_is_refused(lossless: Served) -> None:
    status, answer = lossless.post(CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}})
    assert status == 400 and "the vocabulary has no {" in answer["error"]["message"]


def test_modes_that_reveal_tokens_in_parallel_refuse_a_grammar(by_mode: dict[Mode, Served]) -> None:
    status, answer = by_mode["threshold"].post(CHAT, body_of(0, 0))
    assert status == 400 and "decodes in mode threshold" in answer["error"]["message"]


class Sum(BaseModel):
    """What the `openai` package makes a schema of."""

    sum: Annotated[int, Field(ge=10, le=99)]
    word: Literal["abc", "de"]


def test_the_openai_package_reads_its_own_models_back(by_mode: dict[Mode, Served]) -> None:
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{by_mode['lossless'].port}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 3, "temperature": 1}
    parsed = client.chat.completions.parse(**asked, response_format=Sum).choices[0].message.parsed
    assert isinstance(parsed, Sum)
    with client.chat.completions.stream(**asked, response_format=Sum) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed
    with pytest.raises(openai.BadRequestError, match="Invalid type: obj"):
        client.chat.completions.create(**asked, **schema_format({"type": "obj"}))


def test_without_the_library_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = grammar.require_package.__globals__["find_spec"]
    monkeypatch.setitem(
        grammar.require_package.__globals__,
        "find_spec",
        lambda name: None if name == "llguidance" else find(name),
    )
    for served in serve(folder, DecodeConfig(mode="ar", max_new_tokens=20)):
        status, answer = served.post(CHAT, body_of(0, 0))
        assert status == 400 and "pip install 'opdlm[serve]'" in answer["error"]["message"]
        assert served.post(CHAT, {"messages": HELLO})[0] == 200
