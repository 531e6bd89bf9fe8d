"""A server under load: mixed settings share forwards, the queue is bounded, no client holds up the others."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loopback_server import CHAT, HELLO, MAX_WAITING, TEXT, Served, serve

from opdlm.data.chat_template import encode_prompt
from opdlm.data.messages import Conversation
from opdlm.decoding import generate as generate_module
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.rollout import Rollout
from opdlm.serving import http_limits
from opdlm.serving.decode_thread import DecodeThread, Job, QueueFull

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1},
    {"temperature": 0.4, "top_p": 0.9, "max_tokens": 12},
    {"temperature": 1.5, "top_k": 5, "stop": ["e", "1"]},
    {"temperature": 1e-320, "n": 2},
    {"temperature": 1, "n": 3, "stop_token_ids": [5, 6, 7]},
]


def post_after(served: Served, path: str, body: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read()), {k.lower(): v for k, v in response.getheaders()}


def get(served: Served, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


@contextmanager
def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[list[int]]:
    """The rows of every step; each step takes at least `seconds`."""
    step, rows = generate_module.Decoder.step, list[int]()

    def slow_step(self: generate_module.Decoder) -> dict[int, Rollout]:
        time.sleep(seconds)
        found = step(self)
        rows.append(len(self.state) + len(found))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(generate_module.Decoder, "step", slow_step)
        yield rows


def content(choice: dict[str, Any]) -> Any:
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return choice["message"]["content"], choice["finish_reason"], [entry["token"] for entry in tokens]


def test_mixed_requests_share_steps_and_are_answered_as_each_alone(
    lossless: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [
        {"messages": [{"role": "user", "content": f"add {i} {i + 1}"}], "seed": i, "logprobs": i % 3 == 0}
        | SETTINGS[i % len(SETTINGS)]
        for i in range(18)
    ]
    alone = [lossless.post(CHAT, body)[1] for body in bodies]
    with slow_steps(monkeypatch, 0.01) as rows, ThreadPoolExecutor(18) as pool:
        together = list(pool.map(lambda body: lossless.post(CHAT, body), bodies))
    for (status, answer), expected in zip(together, alone, strict=True):
        assert status == 200
        assert list(map(content, answer["choices"])) == list(map(content, expected["choices"]))
    assert sum(rows) / len(rows) > 2.2  # of 3


@pytest.fixture
def idle(folders: dict[str, Path]) -> Iterator[DecodeThread]:
    """A thread that was not started: what it would do is asked step by step."""
    for served in serve(folders["preserve"], DecodeConfig(mode="lossless", max_new_tokens=20)):
        yield DecodeThread(served.model, served.config, 4, 96, 10)


def jobs(count: int, config: DecodeConfig, found: list[Any]) -> list[Job]:
    cancelled = threading.Event()
    return [
        Job(ids=(5, 6, 7), seed=i, config=config, on_end=found.append, cancelled=cancelled)
        for i in range(count)
    ]


def arrive(thread: DecodeThread, *requests: list[Job]) -> None:
    for request in requests:
        thread.submit(request)
        thread.waiting.append(thread.arrivals.get())
    thread._admit()


def test_rows_go_to_the_request_that_holds_the_fewest_and_large_ones_leave_most(idle: DecodeThread) -> None:
    idle.num_rows, idle.max_waiting = 12, 500
    large, also_large, *small = (jobs(count, idle.config, []) for count in (7, 6, *[1] * 8))
    arrive(idle, large)
    arrive(idle, also_large)
    held = [*large[:4], also_large[0]]
    assert list(idle.running.values()) == held and idle.num_waiting == 8
    arrive(idle, *small)
    assert list(idle.running.values()) == [*held, *(job for (job,) in small[:7])] and idle.num_waiting == 9
    for ended, next_one in ((0, small[7][0]), (5, also_large[1]), (6, None), (1, large[4])):
        del idle.running[ended]
        before = list(idle.running.values())
        idle._admit()
        assert list(idle.running.values())[len(before) :] == [next_one] * (next_one is not None)
    also_large[0].cancelled.set()
    idle._admit()
    assert not {*idle.running.values()} & {*also_large} and also_large not in idle.waiting
    assert [*idle.running.values()][-2:] == large[4:6] and idle.num_waiting == 1


def test_a_short_request_joins_the_next_step_beside_any_number_of_large_ones(idle: DecodeThread) -> None:
    """Steps are counted, so that no clock decides: beside a row each, large ones hold less than a third."""
    idle.num_rows, idle.max_waiting = 12, 500
    long, short = (replace(idle.config, max_new_tokens=num) for num in (80, 4))
    for num_large in range(1, 5):
        idle.submit(jobs(100 // num_large, long, []))
        found: list[Any] = []
        for _ in range(6):
            idle._receive()
            idle._advance()
            assert len(idle.running) <= 3 + num_large
        for _ in range(3):  # one after the other
            idle.submit(jobs(1, short, found))
            num_before, num_steps = len(found), 0
            while len(found) == num_before:
                idle._receive()
                idle._advance()
                num_steps += 1
            assert found[-1].num_response == 4 and num_steps <= 4


def test_the_queue_is_bounded_and_what_leaves_it_makes_room(idle: DecodeThread) -> None:
    idle.submit(jobs(7, idle.config, []))
    with pytest.raises(QueueFull) as full:
        idle.submit(jobs(4, idle.config, []))
    assert 1 <= full.value.seconds <= 60
    idle._receive()
    idle._admit()
    idle.submit(jobs(4, idle.config, []))
    assert idle.num_waiting == 10


def test_a_full_queue_is_told_with_the_time_to_come_back(
    lossless: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": ["add 1 2"] * MAX_WAITING, "max_tokens": 4}
    with slow_steps(monkeypatch, 0.02), ThreadPoolExecutor(4) as pool:
        large = pool.submit(lossless.post, TEXT, body)
        deadline = time.monotonic() + 30
        while lossless.thread.num_waiting < MAX_WAITING - 3:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        for is_streamed in (False, True):
            status, answer, headers = post_after(lossless, TEXT, body | {"stream": is_streamed})
            assert status == 429 and f"the {MAX_WAITING} of the queue" in answer["error"]["message"]
            assert 1 <= int(headers["retry-after"]) <= 60
        small = pool.submit(lossless.post, CHAT, {"messages": HELLO, "max_tokens": 4})
        assert small.result()[0] == 200 and not large.done()  # it did not wait behind the large one
        assert large.result()[0] == 200
    status, answer = lossless.post(TEXT, body | {"n": 2})
    assert status == 400 and f"at most {MAX_WAITING} in a request" in answer["error"]["message"]


def test_a_long_prompt_is_refused_before_it_is_tokenised_and_off_the_event_loop(
    lossless: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, callers = type(lossless.tokenizer)._encode_plus, list[threading.Thread]()

    def slow_encode(*args: Any, **settings: Any) -> Any:
        callers.append(threading.current_thread())
        time.sleep(0.5)
        return encode(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(type(lossless.tokenizer), "_encode_plus", slow_encode)
        status, answer = lossless.post(TEXT, {"prompt": "a" * 2_000_000})
        assert status == 400 and "prompt of 2000000 characters" in answer["error"]["message"] and not callers
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(lossless.post, TEXT, {"prompt": "add 1 2", "max_tokens": 2})
            while not callers:
                time.sleep(0.001)
            started = time.monotonic()
            assert get(lossless, "/health")[0] == 200 and time.monotonic() - started < 0.4
            assert slow.result()[0] == 200


def answer_of(served: Served, sent: bytes) -> bytes:
    """What the server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(sent)
        parts = []
        while part := client.recv(4096):
            parts.append(part)
        return b"".join(parts)


HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_a_large_body_is_refused_unread(lossless: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "HEADER_SECONDS", 1.0)
    assert b" 413 " in answer_of(lossless, f"{HEAD}Content-Length: {3 * 10**8}\r\n\r\n{{".encode())[:30]
    monkeypatch.setattr(http_limits, "MAX_BODY_BYTES", 1000)
    chunk = b"1f4\r\n" + b" " * 500 + b"\r\n"
    chunked = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + 3 * chunk
    assert b" 413 " in answer_of(lossless, chunked)[:30]


def test_requests_that_never_end_are_closed(lossless: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(http_limits, "BODY_SECONDS", 0.3)
    assert answer_of(lossless, b"") == answer_of(lossless, HEAD.encode()) == b""
    assert b" 408 " in answer_of(lossless, f"{HEAD}Content-Length: 50\r\n\r\n{{".encode())[:30]
    body = json.dumps({"messages": HELLO, "max_tokens": 2}).encode()
    whole = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
    found = answer_of(lossless, whole + whole + HEAD.encode())  # a third that never ends
    assert found.count(b"HTTP/1.1 200") == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_is_told(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for served in serve(folders["preserve"], DecodeConfig(mode="lossless", max_new_tokens=20)):
        assert get(served, "/health")[0] == 200

        def end(self: Any) -> Any:
            raise SystemExit

        with monkeypatch.context() as patch:
            patch.setattr(generate_module.Decoder, "step", end)
            status, answer = served.post(CHAT, {"messages": HELLO})
            assert status == 500 and "the decoding thread has ended" in answer["error"]["message"]
        served.thread.join(10)
        assert get(served, "/health") == (503, '{"status":"stopped"}')
        for is_streamed in (False, True):
            status, answer = served.post(CHAT, {"messages": HELLO, "stream": is_streamed})
            assert status == 503 and "start the server again" in answer["error"]["message"]


def test_metrics_count_what_was_answered(lossless: Served) -> None:
    def read() -> dict[str, float]:
        status, text = get(lossless, "/metrics")
        assert status == 200
        lines = [line for line in text.splitlines() if not line.startswith("# TYPE opdlm_")]
        assert all(re.fullmatch(r'opdlm_\w+(\{(\w+="[^"]*",?)+\})? [0-9.e+-]+', line) for line in lines), text
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    ok = f'opdlm_requests_total{{path="{CHAT}",status="200"}}'
    before = read()
    _, answer = lossless.post(CHAT, {"messages": HELLO, "n": 2})
    assert lossless.post(CHAT, {"messages": []})[0] == 400
    after = read()
    assert after[ok] == before.get(ok, 0) + 1
    assert after[ok.replace("200", "400")] == before.get(ok.replace("200", "400"), 0) + 1
    usage = answer["usage"]
    for name, key in (
        ("generated_tokens", "completion_tokens"),
        ("prompt_tokens", "prompt_tokens"),
        ("row_forwards", "num_forwards"),
    ):
        rows = 2 if key == "prompt_tokens" else 1  # each row has its prompt, which usage counts once
        assert after[f"opdlm_{name}_total"] == before[f"opdlm_{name}_total"] + rows * usage[key]
    counts = [value for name, value in after.items() if name.startswith("opdlm_request_seconds_bucket")]
    assert counts == sorted(counts) and counts[-1] == after["opdlm_request_seconds_count"]
    assert after["opdlm_responses_waiting"] == after["opdlm_responses_running"] == 0


def test_the_next_turn_of_a_chat_computes_what_is_new(lossless: Served) -> None:
    def reused() -> list[int]:
        return [
            int(line.split()[1])
            for line in get(lossless, "/metrics")[1].splitlines()
            if line.startswith(("opdlm_prefix_hits_total", "opdlm_prefix_tokens_reused_total"))
        ]

    messages = [{"role": "user", "content": "what is the sum of 17 and 25"}]
    first = lossless.post(CHAT, {"messages": messages, "max_tokens": 8})[1]
    answer = first["choices"][0]["message"]
    before = reused()
    messages += [answer, {"role": "user", "content": "and of 3"}]
    second = lossless.post(CHAT, {"messages": messages, "max_tokens": 8})[1]
    hits, tokens = (after - one for after, one in zip(reused(), before, strict=True))
    assert hits == 1 and first["usage"]["prompt_tokens"] - 5 <= tokens < second["usage"]["prompt_tokens"]
    ids = encode_prompt(lossless.tokenizer, Conversation(prompt=messages))
    (alone,) = generate_module.generate(
        lossless.model, [ids], replace(lossless.config, max_new_tokens=8), [0]
    )
    text = lossless.tokenizer.decode(alone.text_ids, skip_special_tokens=True)
    assert second["choices"][0]["message"]["content"] == text


def test_requests_have_ids(lossless: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 2}
    assert post_after(lossless, CHAT, body, **{"X-Request-Id": "mine-1"})[2]["x-request-id"] == "mine-1"
    ids = {post_after(lossless, CHAT, body, **{"X-Request-Id": "a b" * n})[2]["x-request-id"] for n in (0, 1)}
    assert len(ids) == 2 and all(re.fullmatch(r"[0-9a-f]{32}", found) for found in ids)


def test_what_other_servers_answer(lossless: Served) -> None:
    assert json.loads(get(lossless, "/v1/models/tiny")[1])["max_model_len"] == 96
    assert get(lossless, "/v1/models/gpt")[0] == 404
    assert re.fullmatch(r'\{"version":"\d+\.\d+\.\d+"\}', get(lossless, "/version")[1])
    ids = lossless.tokenizer("add 1 2")["input_ids"]
    assert lossless.post("/tokenize", {"prompt": "add 1 2"})[1]["tokens"] == ids
    chat = lossless.post("/tokenize", {"messages": HELLO})[1]
    usage = lossless.post(CHAT, {"messages": HELLO, "max_tokens": 1})[1]["usage"]
    assert chat["count"] == usage["prompt_tokens"] == len(chat["tokens"])
    for body in (
        {},
        {"prompt": "a", "messages": HELLO},
        {"prompt": "\0"},
        {"prompt": 1},
        {"prompt": "a", "x": 1},
    ):
        assert lossless.post("/tokenize", body)[0] == 400
