"""Malformed requests to `opdlm serve`, drawn at random. Each must be refused: status 400 to 499, an error in
OpenAI's shape.

`draw(rng)` makes one; `wrong_http` makes bytes that are no HTTP/1.1 request, which end the connection.
"""

from __future__ import annotations

import json
import math
import random
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "add 1 2"}]
JSON = "application/json"
Case = tuple[str, bytes, str | None]
"""Path, body, content type."""

VALID: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO, "max_tokens": 2},
    TEXT: {"prompt": "add 1 2", "max_tokens": 2},
}
LONE_SURROGATE = "\ud800"
NO_NUMBER = ["1", "", [], [1], {"a": 1}, True, math.nan, math.inf, -math.inf, 10**400, -(10**400)]
NO_WHOLE_NUMBER = [*NO_NUMBER, 0.5, 1.0, 1e300, 2**62 + 1, 2**200]
NO_SWITCH = ["yes", "", 0, 1, 0.0, [], {}, [True], math.nan]
NO_TEXT = [0, 1, True, 0.5, ["x"], {"a": 1}, LONE_SURROGATE, math.nan]
WRONG: dict[str, list[Any]] = {
    "temperature": [*NO_NUMBER, -1, -1e-9, 101],
    "top_p": [*NO_NUMBER, 0, -1, 1.01],
    "top_k": [*NO_WHOLE_NUMBER, -2],
    "max_tokens": [*NO_WHOLE_NUMBER, 0, -1, 97, 2**62],
    "max_completion_tokens": [*NO_WHOLE_NUMBER, 0, -1, 97],
    "n": [*NO_WHOLE_NUMBER, 0, -1, 129],
    "seed": [*NO_WHOLE_NUMBER, -(2**62) - 1],
    "stream": NO_SWITCH,
    "stream_options": [1, "x", True, [], [1], {"include_usage": "x"}, {"include_usage": 1}, {"other": 1}],
    "stop": [0, 1, True, {}, [""], ["a", ""], ["a", 1], [["a"]], [None], LONE_SURROGATE, [LONE_SURROGATE]],
    "user": NO_TEXT,
    "model": [*NO_TEXT, "", "gpt"],
    "logprobs": [21, -1, 10**400, "0", 0.5, [0], {"a": 1}],
    "top_logprobs": [1, 20, "2", [1], True],
    "tools": [[{}], {"a": 1}, 1],
    "stop_token_ids": [1, "1", [-1], ["1"], [0.5], [10**400], [[1]], {}],
    "chat_template_kwargs": [
        *(1, "x", {"chat_template": "x"}, {"messages": []}, {"tokenize": True}, {"unknown": 1}),
        {LONE_SURROGATE: 1},
    ],
    "continue_final_message": [True, "yes", 1, [True]],
    "echo": ["yes", 1, [True]],
    "response_format": [{}, {"type": "json_schema"}, {"type": LONE_SURROGATE}, "text", 1],
    "repetition_penalty": [0, -1, 101, True, "1"],
    "skip_special_tokens": [False],
    "presence_penalty": [2.5, -3, "0", [0]],
    "frequency_penalty": [10**400, "x"],
    "min_tokens": [-1, 10**9, "1", 0.5],
    "ignore_eos": [1, "yes"],
    "guided_json": [{}],
    "best_of": [2],
    "suffix": ["x", 1, ["x"], LONE_SURROGATE],
    "metadata": [LONE_SURROGATE, {"a": math.nan}],
    "logit_bias": [{"5": -101}, {"x": 1}, {"-1": 1}, {"9" * 5000: 1}, {"5": "1"}, [5]],
    "min_p": [1.5, -0.1, "0"],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}, 1, True],
    "parallel_tool_calls": ["yes", 2, [True]],
    "k" * 5000: [1, "x", [[]], math.nan],
    "\x00": [1],
    LONE_SURROGATE: [0, 1],
}
WRONG_CONTENT = [
    *(
        None,
        0,
        1,
        True,
        {},
        "",
        " \n",
        LONE_SURROGATE,
        [],
        [1],
        [None],
        ["x"],
        [[]],
        [{}],
        [{"type": "text"}],
    ),
    [{"type": "text", "text": 1}],
    [{"type": "text", "text": LONE_SURROGATE}],
    [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}],
]
WRONG_MESSAGES: list[Any] = [
    *(None, "", "text", 0, 1, True, {}, {"a": 1}, [], [1], [None], ["x"], [[]], [{}], [HELLO]),
    *([{"role": "user", "content": content}] for content in WRONG_CONTENT),
    *([{"role": role, "content": "x"}] for role in (None, 0, 1, True, [], {}, ["user"], LONE_SURROGATE)),
    *([{"role": "user"}], [{"content": "x"}]),
    [{"role": "user", "content": "x", "name": LONE_SURROGATE}],
    [{"role": "user", "content": "x", LONE_SURROGATE: 1}],
    [{"role": "user", "content": "x" * 500}],
]
WRONG_PROMPTS: list[Any] = [
    *(None, "", 0, 1, True, 0.5, {}, {"a": 1}, [], [[]], [""], [None], [True], [1.0], [{}], [[["a"]]]),
    *([-1], [2**31], [2**70], [10**400], [1, "a"], ["a", 1], ["a", [True]], [["a"]], [[1], 1], [["a", 1]]),
    *(LONE_SURROGATE, [LONE_SURROGATE], "x" * 500, [5] * 500, ["a"] * 5000, ["a", ""], [[1], []]),
]


def wrong_field(rng: random.Random) -> Case:
    """A valid body but for one field, or several."""
    path = rng.choice((CHAT, TEXT))
    keys = rng.sample(list(WRONG), rng.choice((1, 1, 1, 3)))
    body = VALID[path] | {key: rng.choice(WRONG[key]) for key in keys}
    return path, json.dumps(body).encode(), JSON


def wrong_input(rng: random.Random) -> Case:
    """Messages or a prompt that cannot be read, or none."""
    path = rng.choice((CHAT, TEXT))
    key, wrong = ("messages", WRONG_MESSAGES) if path == CHAT else ("prompt", WRONG_PROMPTS)
    body = VALID[path] | {key: rng.choice(wrong)}
    if rng.random() < 0.1:
        del body[key]
    elif body.get("messages") and isinstance(body[key], list):
        body[key] = HELLO * rng.randrange(3) + body[key]
    return path, json.dumps(body).encode(), JSON


def wrong_json(rng: random.Random) -> Case:
    """Bytes that are no JSON object."""
    path = rng.choice((CHAT, TEXT))
    valid = json.dumps(VALID[path]).encode()
    cut, depth = rng.randrange(1, len(valid)), rng.choice((201, 1000, 5000, 200_000))
    bodies = [
        *(
            b"",
            b" ",
            b"\xff",
            b"null",
            b"true",
            b"1",
            b'"text"',
            b"[]",
            b"{}",
            b"NaN",
            b"{'a': 1}",
            b"\x00" * 50,
        ),
        *(valid[:cut], valid[cut:], valid + valid, valid + b"]", valid[:cut] + b"\xff" + valid[cut:]),
        *(b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth, rng.randbytes(200)),
        valid[:-1] + b', "a": ' + b"[" * depth + b"]" * depth + b"}",
        valid[:-1] + b', "seed": ' + b"9" * rng.choice((4300, 5000, 100_000)) + b"}",
        valid[:-1] + b', "temperature": 1e999}',
        valid[:-1] + b', "user": "\\ud800"}',
        valid[:-1] + b', "user": "\xed\xa0\x80"}',
        valid[:-1] + b', "user": "\n"}',
        valid.decode().encode("utf-16"),
    ]
    return path, rng.choice(bodies), JSON


def wrong_content_type(rng: random.Random) -> Case:
    """A body of another kind, or one whose header says so."""
    path = rng.choice((CHAT, TEXT))
    form = b"prompt=add+1+2&max_tokens=2"
    parts = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nadd 1 2\r\n--x--\r\n'
    kinds = ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", "json"]
    kinds += [
        "application/json/x",
        "application/jsonx",
        "application/octet-stream",
        ";",
        ",",
        "\xe9",
        "a" * 5000,
    ]
    if rng.random() < 0.4:
        return path, rng.choice((form, parts)), rng.choice([*kinds, JSON, None])
    return path, json.dumps(VALID[path]).encode(), rng.choice(kinds)


def random_value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, and what Python writes although it is none."""
    scalars = [
        None,
        True,
        False,
        0,
        1,
        -1,
        0.5,
        2**63,
        10**400,
        math.nan,
        "",
        "text",
        "user",
        "\0",
        LONE_SURROGATE,
    ]
    kind = rng.random()
    if depth > 4 or kind < 0.4:
        return rng.choice(scalars)
    size = rng.randrange(4)
    if kind < 0.7:
        return [random_value(rng, depth + 1) for _ in range(size)]
    keys = ["role", "content", "type", "text", "include_usage", "x", *WRONG]
    return {rng.choice(keys): random_value(rng, depth + 1) for _ in range(size)}


def random_body(rng: random.Random) -> Case:
    """Random values under every key; the prompt cannot be read in any case."""
    path = rng.choice((CHAT, TEXT))
    body = {key: random_value(rng) for key in rng.sample(list(WRONG), 4)}
    body |= {"messages" if path == CHAT else "prompt": {"x": random_value(rng)}}
    return path, json.dumps(body).encode(), JSON


def wrong_http(rng: random.Random) -> bytes:
    """A request that breaks HTTP itself: chunks, lengths, header lines."""
    path, body, _ = draw(rng)
    start = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\n".encode()
    chunked = start + b"Transfer-Encoding: chunked\r\n\r\n"
    cut = rng.randrange(len(start))
    return rng.choice(
        (
            chunked + b"zz\r\n" + body,
            chunked + b"-5\r\nhello\r\n",
            chunked + b"f" * 40 + b"\r\n" + body,
            chunked + b"5\r\nhelloXX\r\n0\r\n\r\n",
            chunked + b"5 \r\nhel",
            start + b"Content-Length: -1\r\n\r\n" + body,
            start + b"Content-Length: 1e3\r\n\r\n" + body,
            start + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + body,
            start + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + body,
            start + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
            start + b"Transfer-Encoding: gzip\r\n\r\n" + body,
            start + b"a b: c\r\n\r\n",
            start + b"a" * 100_000 + b"\r\n\r\n",
            start[:cut] + b"\x00\xff" + start[cut:] + b"\r\n",
            rng.randbytes(200) + b"\r\n\r\n",
            body + b"\r\n\r\n",
        )
    )


KINDS = (wrong_field, wrong_input, wrong_json, wrong_content_type, random_body)


def draw(rng: random.Random) -> Case:
    """A malformed request of any kind."""
    return rng.choice(KINDS)(rng)
