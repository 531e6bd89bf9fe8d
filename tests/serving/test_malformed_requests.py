"""Every malformed request is refused before any decoding: a 4xx status and an error in OpenAI's shape."""

from __future__ import annotations

import http.client
import json
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest
from loopback_server import CHAT, TEXT, Served
from malformed_requests import JSON, KINDS, VALID, Case, wrong_http
from pydantic import ValidationError

from opdlm.serving.protocol import ChatRequest, CompletionRequest

NUM_CASES = 100
"""Of each kind."""


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_malformed_request_is_refused(lossless: Served, make: Callable[[random.Random], Case]) -> None:
    rng = random.Random(0)
    connection = http.client.HTTPConnection("127.0.0.1", lossless.port, timeout=60)
    for _ in range(NUM_CASES):
        path, body, content_type = make(rng)
        headers = {} if content_type is None else {"Content-Type": content_type}
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        answer, case = json.loads(response.read()), (path, body[:300], content_type)
        assert 400 <= response.status < 500, (response.status, answer, case)
        assert answer.keys() == {"error"}, (answer, case)
        error = answer["error"]
        assert error["type"] == "invalid_request_error" and error.keys() == {
            "message",
            "type",
            "param",
            "code",
        }
        assert isinstance(error["message"], str) and 10 < len(error["message"]) < 1000, (error, case)
    assert not lossless.thread.running and not lossless.thread.waiting
    assert lossless.post(CHAT, VALID[CHAT])[0] == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [None] * 10_000},
        {"prompt": [[]] * 10_000 + [None] * 10_000},
        {"prompt": [[None] * 10_000]},
        {"messages": [{"role": "user", "content": [1] * 10_000}]},
        {"messages": [1] * 10_000, "tools": [1] * 10_000, "stop": [1] * 10_000},
        {f"key{i}": i + 1 for i in range(10_000)},
    ],
)
def test_a_long_list_is_refused_at_its_first_wrong_entry(fields: dict[str, Any]) -> None:
    """Otherwise one body would keep all others waiting for seconds."""
    for model in (ChatRequest, CompletionRequest):
        with pytest.raises(ValidationError) as refused:
            model.model_validate(fields)
        assert refused.value.error_count() < 10


def test_bytes_that_are_no_request_are_refused_or_dropped(lossless: Served) -> None:
    def num_failures() -> list[str]:
        connection = http.client.HTTPConnection("127.0.0.1", lossless.port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return [line for line in lines if 'status="5' in line]

    rng, before = random.Random(0), num_failures()
    for _ in range(NUM_CASES):
        sent, received = wrong_http(rng), b""
        with socket.create_connection(("127.0.0.1", lossless.port), timeout=10) as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            while part := client.recv(4096):
                received += part
        assert received[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 431"), (
            received,
            sent[:300],
        )
    assert not lossless.thread.running and not lossless.thread.waiting
    assert lossless.post(CHAT, VALID[CHAT])[0] == 200 and num_failures() == before


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("DELETE", TEXT, 405), ("POST", "/v1/models", 405), ("POST", "/v1/embeddings", 404)],
)
def test_another_route_is_refused_in_the_same_shape(
    lossless: Served, method: str, path: str, status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", lossless.port, timeout=60)
    connection.request(method, path, b"{}", {"Content-Type": JSON})
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert response.status == status and f"{method} {path} is not served here" in error["message"]


EXTREME: list[dict[str, Any]] = [
    {"temperature": 5e-324},
    {"temperature": 1e-30},
    {"temperature": 100},
    {"temperature": 1, "top_p": 5e-324},
    {"temperature": 1, "top_k": 2**62},
    {"temperature": 1, "top_k": 0, "top_p": 1},
    {"temperature": 1, "seed": 2**62},
    {"temperature": 1, "seed": -(2**62)},
    {"stop": ["x" * 10_000] * 10},
    {"stop": ""},
    {"stop": []},
]


@pytest.mark.parametrize("settings", EXTREME, ids=lambda settings: json.dumps(settings)[:50])
def test_extreme_settings_are_answered(lossless: Served, settings: dict[str, Any]) -> None:
    body = VALID[CHAT] | settings
    status, answer = lossless.post(CHAT, body)
    assert status == 200, answer
    if 0 < settings.get("temperature", 1) < 1e-6:
        greedy = lossless.post(CHAT, body | {"temperature": 0})[1]
        assert answer["choices"] == greedy["choices"]


def test_the_schema_names_the_fields_and_no_default_error(lossless: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", lossless.port, timeout=60)
    connection.request("GET", "/openapi.json")
    schema = json.loads(connection.getresponse().read())
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["temperature"]["description"] == "a number from 0 to 100"
    assert "422" not in json.dumps(schema)
