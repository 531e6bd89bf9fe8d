"""`opdlm serve` answers as `generate` does, also concurrent requests; `opdlm chat` keeps the conversation."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loopback_server import CHAT, HELLO, TEXT, Served, serve

from opdlm.checkpoints.load import load
from opdlm.cli.main import main
from opdlm.data.chat_template import encode_prompt
from opdlm.data.messages import Conversation
from opdlm.decoding import generate as generate_module
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.streaming import StopStrings
from opdlm.seeds import seed_of
from opdlm.serving import server as server_module
from opdlm.serving.server import listen

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["preserve", "sdar"])
def served(folders: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Served]:
    mode = "lossless" if request.param == "preserve" else "threshold"
    yield from serve(folders[request.param], DecodeConfig(mode=mode, max_new_tokens=20))


SECRET = {"Authorization": "Bearer secret"}
REQUESTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("add 1 2", {}, {}),
    ("copy ab", {"max_tokens": 3}, {"max_new_tokens": 3}),
    ("add 3 4", {"temperature": 1}, {"temperature": 1.0}),
    ("add 5 6", {"temperature": 1, "top_k": 4, "top_p": 0.9}, {"temperature": 1.0, "top_k": 4, "top_p": 0.9}),
    ("copy cd", {"stop": ["e", "1"]}, {"stop": ("e", "1")}),
    ("copy ef", {"stop": "a", "temperature": 1}, {"stop": ("a",), "temperature": 1.0}),
]


def test_answers_of_concurrent_requests_are_those_of_generate(served: Served) -> None:
    def ask(place: int) -> tuple[int, Any]:
        text, sent, _ = REQUESTS[place % len(REQUESTS)]
        message = {"role": "user", "content": [{"type": "text", "text": text}] if place % 2 else text}
        return served.post(CHAT, {"model": "tiny", "messages": [message], "seed": place, **sent})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(3 * len(REQUESTS))))
    for place, (status, answer) in enumerate(answers):
        text, _, settings = REQUESTS[place % len(REQUESTS)]
        (choice,) = answer["choices"]
        found = choice["message"]["content"], choice["finish_reason"]
        assert status == 200 and found == served.expected(text, place, **settings)
        assert answer["usage"]["num_forwards"] > 0 and answer["object"] == "chat.completion"
    assert not served.thread.running and not served.thread.waiting


@pytest.mark.parametrize("place", range(len(REQUESTS)))
def test_a_stream_is_the_answer_in_pieces(served: Served, place: int) -> None:
    text, sent, settings = REQUESTS[place]
    body = {"messages": [{"role": "user", "content": text}], "seed": 7, **sent}
    events = served.events(CHAT, body | {"stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] > 0
    choices = [event["choices"][0] for event in events[:-1]]
    assert choices[0]["delta"]["role"] == "assistant"
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    whole = "".join(choice["delta"]["content"] for choice in choices)
    assert (whole, choices[-1]["finish_reason"]) == served.expected(text, 7, **settings)


def test_completions_take_texts_and_token_ids_and_several_choices(lossless: Served) -> None:
    ids = lossless.tokenizer("add 1 2")["input_ids"]
    body = {"prompt": ["add 1 2", "copy ab"], "n": 2, "temperature": 1, "seed": 3}
    status, answer = lossless.post(TEXT, body)
    assert status == 200 and [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == len(ids) + len(lossless.tokenizer("copy ab").input_ids)
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    assert lossless.post(TEXT, body)[1]["choices"] == answer["choices"]  # a seed repeats its draws
    by_ids = lossless.post(TEXT, {"prompt": ids, "seed": 3, "temperature": 1})[1]["choices"]
    assert by_ids == answer["choices"][:1]
    streamed = lossless.events(TEXT, body)
    for index, choice in enumerate(answer["choices"]):
        mine = [event["choices"][0] for event in streamed if event["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in mine) == choice["text"]


def test_logprobs_are_those_of_generate(served: Served) -> None:
    config = replace(served.config, logprobs=True)
    ids = served.tokenizer("add 1 2")["input_ids"]
    (rollout,) = generate(served.model, [ids], config, [seed_of(5, 0)])
    texts = [served.tokenizer.decode([token]) for token in rollout.text_ids]
    num = len(texts) - (rollout.finish_reason == "stop")
    status, answer = served.post(TEXT, {"prompt": "add 1 2", "seed": 5, "logprobs": 0})
    found = answer["choices"][0]["logprobs"]
    assert status == 200 and found["tokens"] == texts[:num] and found["top_logprobs"] is None
    assert found["token_logprobs"] == pytest.approx(rollout.logprobs[:num], abs=1e-5)
    for text, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert "".join(texts)[offset:].startswith(text)
    body = {"messages": [{"role": "user", "content": "add 1 2"}], "seed": 5, "logprobs": True}
    in_chat = served.post(CHAT, body)[1]["choices"][0]
    *others, last = served.events(CHAT, body)
    entries, streamed = (choice["logprobs"]["content"] for choice in (in_chat, last["choices"][0]))
    assert "".join(entry["token"] for entry in entries) == in_chat["message"]["content"]
    joined = bytes(byte for entry in entries for byte in entry["bytes"])
    assert joined.decode() == in_chat["message"]["content"]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in entries]
    values = [entry["logprob"] for entry in streamed]
    assert values == pytest.approx([entry["logprob"] for entry in entries], abs=1e-5)
    assert all("logprobs" not in event["choices"][0] for event in others)
    assert "logprobs" not in served.post(CHAT, body | {"logprobs": False})[1]["choices"][0]


REFUSED: dict[str, tuple[str, Any, int, str]] = {
    "not JSON": (CHAT, b"{", 400, "not JSON"),
    "not text": (CHAT, b"\xff", 400, "not JSON"),
    "a list": (CHAT, [1], 400, "JSON object"),
    "no messages": (CHAT, {}, 400, "messages"),
    "a wrong message": (CHAT, {"messages": [{"role": "user"}]}, 400, "role"),
    "a picture": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "text only",
    ),
    "another model": (CHAT, {"messages": HELLO, "model": "gpt"}, 404, "gpt"),
    "tools": (
        CHAT,
        {"messages": HELLO, "tools": [{}]},
        400,
        "tools are not shown by the model's chat template",
    ),
    "a hot temperature": (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "temperature ('hot')"),
    "top_p of 0": (CHAT, {"messages": HELLO, "top_p": 0}, 400, "top_p (0)"),
    "no tokens": (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens (0)"),
    "too many tokens": (
        CHAT,
        {"messages": HELLO, "max_completion_tokens": 999},
        400,
        "max_completion_tokens",
    ),
    "an empty stop": (CHAT, {"messages": HELLO, "stop": [""]}, 400, "stop"),
    "half a choice": (CHAT, {"messages": HELLO, "n": 0.5}, 400, "n (0.5)"),
    "too many choices": (CHAT, {"messages": HELLO, "n": 10**6}, 400, "n (1000000)"),
    "a large seed": (CHAT, {"messages": HELLO, "seed": 2**70}, 400, "seed"),
    "a wish to stream": (CHAT, {"messages": HELLO, "stream": "yes"}, 400, "stream ('yes')"),
    "a list of options": (CHAT, {"messages": HELLO, "stream_options": [1]}, 400, "stream_options ([1])"),
    "alternatives": (TEXT, {"prompt": "add 1 2", "logprobs": 21}, 400, "logprobs (21)"),
    "alternatives in a chat": (
        CHAT,
        {"messages": HELLO, "top_logprobs": 2},
        400,
        "top_logprobs (2) needs logprobs",
    ),
    "an empty prompt": (TEXT, {"prompt": ""}, 400, "empty"),
    "no prompt": (TEXT, {"prompt": {}}, 400, "prompt must be text"),
    "unknown ids": (TEXT, {"prompt": [10**6]}, 400, "token ids beyond"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_answered_is_refused_in_words(lossless: Served, name: str) -> None:
    path, body, status, words = REFUSED[name]
    found, answer = lossless.post(path, body)
    assert found == status and words in answer["error"]["message"], answer


def test_a_neutral_value_of_an_unknown_key_is_no_reason_to_refuse(lossless: Served) -> None:
    body = {"messages": HELLO, "presence_penalty": 0, "tools": None, "logprobs": False, "user": "me"}
    assert lossless.post(CHAT, body)[0] == 200


def test_a_template_that_fails_refuses_the_messages(
    lossless: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for template in (
        "{{ messages[0].content + 1 }}",
        "{{ raise_exception('no system role') }}",
        "{{ 1 / 0 }}",
    ):
        monkeypatch.setattr(lossless.tokenizer, "chat_template", template)
        status, answer = lossless.post(CHAT, {"messages": HELLO})
        assert status == 400 and "the request: the chat template" in answer["error"]["message"]


def test_other_keys_of_a_message_go_to_the_chat_template(
    lossless: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        lossless.tokenizer, "chat_template", "{{ messages[0].thought }}{{ messages[0].content }}"
    )
    message = {"role": "user", "content": "12", "thought": "345"}
    assert lossless.post(CHAT, {"messages": [message]})[1]["usage"]["prompt_tokens"] == 5


def test_messages_with_calls_or_an_unfinished_answer_become_the_whole_prompt(
    lossless: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{{ tools[0].name }}{% for m in messages %}{% for call in m.tool_calls or [] %}{{ call.id }}"
        "{% endfor %}{{ m.content }}\n{% endfor %}"
    )
    monkeypatch.setattr(lossless.tokenizer, "chat_template", template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "12"}]}
    messages = [*HELLO, call, {"role": "tool", "content": "34"}, {"role": "assistant", "content": "56 7"}]
    status, answer = lossless.post(CHAT, {"messages": messages, "tools": [{"name": "89"}], "max_tokens": 4})
    expected = f"89{HELLO[0]['content']}\n12\n34\n56 7"
    assert status == 200 and answer["usage"]["prompt_tokens"] == len(expected)


def test_a_text_that_is_none_is_refused(lossless: Served) -> None:
    for path, body in ((CHAT, {"messages": [{"role": "user", "content": "a\0"}]}), (TEXT, {"prompt": "a\0"})):
        status, answer = lossless.post(path, body)
        assert status == 400 and "U+0000 at character 1" in answer["error"]["message"]


def test_small_packets_leave_at_once() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:
        assert client.getpeername()[1] == listener.getsockname()[1]
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_models_and_health(lossless: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", lossless.port, timeout=60)
    connection.request("GET", "/v1/models")
    assert json.loads(connection.getresponse().read())["data"][0]["id"] == "tiny"
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok"}


@pytest.mark.parametrize("is_streamed", [True, False])
def test_the_jobs_of_a_client_that_leaves_are_cancelled(
    lossless: Served, is_streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = generate_module.Decoder.step
    entered = threading.Event()

    def slow_step(self: Any) -> Any:
        entered.set()
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(generate_module.Decoder, "step", slow_step)
    body = {"messages": HELLO, "temperature": 2, "n": 6, "stream": is_streamed, "max_tokens": 60}
    with socket.create_connection(("127.0.0.1", lossless.port)) as client:
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        assert entered.wait(30)
    deadline = time.monotonic() + 30
    while lossless.thread.running or lossless.thread.waiting:
        assert time.monotonic() < deadline, "jobs of a client that has left still run"
        time.sleep(0.01)
    assert lossless.post(CHAT, {"messages": HELLO})[0] == 200


@pytest.mark.parametrize("where", ["step", "__init__"])
def test_a_failure_is_told_and_survived(
    lossless: Served, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    lossless.thread._decoder = None
    with monkeypatch.context() as patch:
        patch.setattr(generate_module.Decoder, where, fail)
        status, answer = lossless.post(CHAT, {"messages": HELLO})
        assert status == 500 and "out of memory" in answer["error"]["message"]
        sent = lossless.connect(CHAT, {"messages": HELLO, "stream": True}).read().decode()
        assert "out of memory" in sent and "[DONE]" not in sent
    assert lossless.post(CHAT, {"messages": HELLO})[0] == 200


def test_the_command_serves_until_ctrl_c(folders: dict[str, Path]) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "serve", str(folders["preserve"]), "--port", "0"]
    process = subprocess.Popen(
        [
            *(*command, "--mode", "lossless", "--name", "tiny", "--max-new-tokens", "8"),
            *("--api-key", "other", "--api-key", "secret", "--cors-origin", "https://page.example"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    port = int(line.split("http://127.0.0.1:")[1].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    cases = (
        *(({}, 401), ({"Authorization": "Bearer sécret"}, 401), ({"Authorization": "Basic secret"}, 401)),
        *((SECRET, 200), ({"Authorization": "bearer other", "Origin": "https://page.example"}, 200)),
    )
    for header, status in cases:
        connection.request("POST", CHAT, json.dumps({"messages": HELLO}), header)
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == status and ("choices" in answer) == (status == 200)
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors, errors


HALF = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{".encode()
MANY = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1000
"""Their answers fill every buffer of a client that reads nothing."""


@pytest.mark.parametrize("sent", [HALF, MANY], ids=["a half-sent request", "a client that never reads"])
def test_a_stop_always_ends_and_a_public_host_without_a_key_is_warned_of(
    folders: dict[str, Path],
    sent: bytes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "STOP_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    received: list[bytes] = []

    stopped = threading.Event()

    def send_and_stop() -> None:
        while True:
            with suppress(ConnectionRefusedError):
                client = socket.create_connection(("127.0.0.1", port), timeout=60)
                break
            time.sleep(0.05)
        with client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            received.append(client.recv(100))
            client.sendall(sent)
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped.wait(60)

    sender = threading.Thread(target=send_and_stop)
    sender.start()
    started = time.monotonic()
    flags = ["--host", "0.0.0.0", "--port", str(port), "--max-new-tokens", "8"]
    assert main(["serve", str(folders["sdar"]), *flags]) == 0
    stopped.set()
    sender.join(10)
    assert b" 200 " in received[0] and not sender.is_alive() and time.monotonic() - started < 30
    assert "0.0.0.0 can be reached from other machines" in caplog.text


def test_an_empty_key_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPDLM_API_KEY", raising=False)
    assert server_module.accepted_keys([""]) == server_module.accepted_keys(()) == ()
    monkeypatch.setenv("OPDLM_API_KEY", "secret")
    assert server_module.accepted_keys([""]) == server_module.accepted_keys(()) == ("secret",)
    assert server_module.accepted_keys(["", "other"]) == ("other",)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-rows", "0"], "--max-rows (0)"),
        (["--max-rows", "1000000000", "--max-new-tokens", "8"], "GiB are free: lower one of the two"),
        (["--max-waiting", "0"], "--max-waiting (0)"),
        (["--max-length", "10", "--max-new-tokens", "20"], "--max-length (10)"),
        (["--max-length", "0", "--max-new-tokens", "8"], "--max-length (0)"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", "secret", "--api-key", ""], "--api-key is empty"),
        (["--max-length", "100000"], "--max-length (100000)"),
        (["--port", "70000", "--max-new-tokens", "8"], "--port (70000)"),
        (["--mode", "lossless"], "--mode lossless needs a preserve checkpoint"),
        (["--forward-overhead", "8"], "--forward-overhead (8) has no effect with --mode threshold"),
        (["--denoising-steps", "9"], "--denoising-steps (9)"),
    ],
)
def test_wrong_flags_are_one_sentence(
    folders: dict[str, Path], flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(folders["sdar"]), *flags]) == 2
    assert words in capsys.readouterr().err


def test_the_memory_of_the_rows_is_known_before_they_are_used(lossless: Served) -> None:
    thread = lossless.thread
    assert lossless.post(CHAT, {"model": "tiny", "messages": HELLO})[0] == 200
    assert thread._decoder is not None
    buffers = [buffer for pair in thread._decoder.cache.layers.values() for buffer in pair]
    of_token = sum(buffer[0, 0].nbytes for buffer in buffers)
    in_use = sum(buffer.nbytes for buffer in buffers)
    assert thread.cache_bytes() == in_use + thread.prefixes.max_tokens * of_token


def test_a_port_that_is_taken_is_one_sentence(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert main(["serve", str(folders["sdar"]), "--port", port, "--max-new-tokens", "8"]) == 2
    assert f"--port {port} cannot be listened on" in capsys.readouterr().err


def test_a_conversation_goes_on_with_what_was_said(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(folders["preserve"])
    stops, config = StopStrings(tokenizer), DecodeConfig(mode="lossless", max_new_tokens=8)

    def answer(messages: list[dict[str, str]], turn: int) -> str:
        ids = encode_prompt(tokenizer, Conversation(prompt=messages))
        return stops.text(generate(model, [ids], config, [seed_of(0, turn)])[0].text_ids)

    first = [{"role": "user", "content": "add 1 2"}]
    said = answer(first, 0)
    second = [*first, {"role": "assistant", "content": said}, {"role": "user", "content": "copy ab"}]
    texts = [said, answer(second, 1), answer(first, 2)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("add 1 2\n\ncopy ab\n/new\nadd 1 2\n" + "1 " * 5000 + "\n"))
    capsys.readouterr()
    assert main(["chat", str(folders["preserve"]), "--mode", "lossless", "--max-new-tokens", "8"]) == 0
    shown = capsys.readouterr().out
    place = 0
    for text in texts:
        place = shown.index(text, place) + len(text)
    assert "exceeds the model's context" in shown[place:].replace("\n", " ")
