"""Whether `opdlm serve` holds load: requests of mixed settings at once, each compared to the same alone.

    python benchmarks/serve_load.py runs/tiny/model --mode lossless --requests 200 --concurrency 64 --beside
    python benchmarks/serve_load.py MODEL --over-ar --prompts MODEL/held_back.jsonl

Prompts, lengths, temperatures, filters, stop strings, streaming and log-probabilities differ from request to
request. `lost`: not answered with status 200. `wrong`: another text, finish reason or tokens than alone.
`cost_ratio`: CPU seconds of the server per generated token, mixed, over the mean of requests with each of the
settings alone, as many in all. `p50`, `p99`: seconds of a request. `memory_mb`: of the server, before, after
each part of the mixed requests, and after the rest.

`--beside` adds `at_once`: what becomes of 2,000 requests sent in the same moment (the queue takes 1,024), and
`beside`: seconds of short requests one after the other, in turns alone and beside a client that asks too much
(ratios of the percentiles). `--over-ar` measures something else: generated tokens per second of a lossless
server and of one in mode ar, the same greedy requests, by concurrency. Linux only (/proc). Decodes in float32
where near ties are not decided by the rounding that the batch size changes.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "stop": ["\n\n"]},
    {"temperature": 0.2, "logprobs": True},
]
TOPICS = ("rivers", "chess and its history", "bread", "the moon", "maps, glass and tea")
PARTS = 10
"""In which the mixed requests are sent, to see the memory between; fewer where one would have too few."""
LEVELS = (1, 8, 32, 64)
"""Requests in flight of `--over-ar`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request."""

    answer: Any
    """Text, finish reason and tokens with log-probabilities; None if it was not answered."""
    seconds: float
    status: int
    """0: the connection broke."""


@dataclass(frozen=True, slots=True)
class ServedProcess:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    @classmethod
    def start(cls, folder: str, flags: Sequence[str]) -> ServedProcess:
        command = [
            sys.executable,
            str(Path(__file__).parent.parent / "cli.py"),
            "serve",
            folder,
            "--port",
            "0",
        ]
        process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        return cls(process, int(line.split("http://127.0.0.1:")[1].split("/")[0]))

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def num_tokens(self) -> float:
        """Tokens generated so far."""
        (line,) = (
            line
            for line in self.get("/metrics").splitlines()
            if line.startswith("opdlm_generated_tokens_total")
        )
        return float(line.split()[1])

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def ask(self, body: dict[str, Any]) -> Outcome:
        started, answer, status = time.perf_counter(), None, 0
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            sent, status = response.read().decode(), response.status
            if status == 200:
                answer = read_stream(sent) if body["stream"] else read_choice(json.loads(sent)["choices"][0])
        except (OSError, http.client.HTTPException):
            status = 0
        return Outcome(answer, time.perf_counter() - started, status)

    def ask_all(self, bodies: Sequence[dict[str, Any]], concurrency: int) -> tuple[list[Outcome], float]:
        """Every outcome, and CPU seconds of the server per 1,000 generated tokens."""
        cpu, tokens = self.cpu_seconds(), self.num_tokens()
        with ThreadPoolExecutor(concurrency) as pool:
            outcomes = list(pool.map(self.ask, bodies))
        return outcomes, 1000 * (self.cpu_seconds() - cpu) / (self.num_tokens() - tokens)


def read_choice(choice: dict[str, Any], text: str | None = None) -> Any:
    entries = (choice.get("logprobs") or {"content": []})["content"]
    tokens = [(entry["token"], round(entry["logprob"], 3)) for entry in entries]
    return choice["message"]["content"] if text is None else text, choice["finish_reason"], tokens


def read_stream(sent: str) -> Any:
    """The answer that the events add up to; None for a stream without its end."""
    events = sent.split("\n\n")
    if events[-2:] != ["data: [DONE]", ""]:
        return None
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    return read_choice(choices[-1], "".join(choice["delta"]["content"] for choice in choices))


def make_body(index: int, settings: dict[str, Any], prompts: Sequence[str] = ()) -> dict[str, Any]:
    topic = TOPICS[index % len(TOPICS)]
    text = f"add {index} {7 * index % 50}" if index % 2 else f"Tell me about {topic}."
    text = prompts[index % len(prompts)] if prompts else text
    messages = [{"role": "user", "content": text}]
    return {
        "messages": messages,
        "seed": index,
        "max_tokens": 8 + index % 41,
        "stream": index % 3 == 0,
        **settings,
    }


def is_same(one: Any, other: Any) -> bool:
    """Whether two answers are equal, log-probabilities up to rounding."""
    if one[:2] != other[:2] or len(one[2]) != len(other[2]):
        return False
    return all(a[0] == b[0] and abs(a[1] - b[1]) < 2e-3 for a, b in zip(one[2], other[2], strict=True))


def head(path: str, *lines: str) -> bytes:
    start = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines]
    return "\r\n".join([*start, "", ""]).encode()


def send(port: int, data: bytes, times: int = 1) -> socket.socket:
    """A connection on which the data was sent, and nothing is read."""
    client = socket.create_connection(("127.0.0.1", port), timeout=60)
    with suppress(OSError):  # the server has refused it
        for _ in range(times):
            client.sendall(data)
    return client


def request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return head(path, f"Content-Length: {len(data)}") + data


CHUNK = b"100000\r\n" + b" " * 2**20 + b"\r\n"
MANY = {"prompt": "Tell me about rivers.", "max_tokens": 400, "n": 64, "ignore_eos": True, "stream": True}
TEXT = "/v1/completions"
ABUSES: dict[str, Callable[[int], socket.socket]] = {
    "one request of 64 choices of 400 tokens, never read": lambda port: send(port, request(TEXT, MANY)),
    "a body of 300 MB in chunks": lambda port: send(
        port, head(TEXT, "Transfer-Encoding: chunked") + CHUNK, times=300
    ),
    "a body of 7 MB that is refused": lambda port: send(port, request(TEXT, {"prompt": [None] * 1_200_000})),
    "256,000 choices": lambda port: send(port, request(TEXT, MANY | {"prompt": ["a"] * 2000, "n": 128})),
    "one request of 64 prompts of 400 tokens": lambda port: send(
        port, request(TEXT, {"prompt": ["Tell me about rivers. " * 18] * 64, "max_tokens": 16})
    ),
    "half a request": lambda port: send(port, head(TEXT, "Content-Length: 99") + b"{"),
}


def beside(server: ServedProcess, abuse: Callable[[int], socket.socket], rounds: int = 8) -> dict[str, Any]:
    """Seconds of short requests beside a client that sends the same every 5 seconds, over those alone."""
    body = {"messages": [{"role": "user", "content": "add 4 7"}], "max_tokens": 16, "stream": False}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    num_lost, held = 0, list[socket.socket]()
    stopped = threading.Event()

    def repeat() -> None:
        held.append(abuse(server.port))
        while not stopped.wait(5):
            held.append(abuse(server.port))

    for _ in range(rounds):
        for is_beside in (False, True):
            stopped.clear()
            client = threading.Thread(target=repeat)
            if is_beside:
                client.start()
                time.sleep(1)
            outcomes = [server.ask(body) for _ in range(15)]
            seconds[is_beside] += [outcome.seconds for outcome in outcomes]
            num_lost += sum(outcome.answer is None for outcome in outcomes)
            if is_beside:
                stopped.set()
                client.join()
            while held:
                held.pop().close()
            server.ask(body)  # what was cancelled has left the batch
    alone, found = (statistics.quantiles(seconds[key], n=100) for key in (False, True))
    ratio = {f"p{p}_ratio": round(found[p - 1] / alone[p - 1], 2) for p in (50, 99)}
    return {**ratio, "lost": num_lost, "memory_mb": round(server.memory_mb())}


def measure(server: ServedProcess, num_requests: int, concurrency: int) -> dict[str, Any]:
    mixed = [make_body(i, SETTINGS[i % len(SETTINGS)]) for i in range(num_requests)]
    memory = [server.memory_mb()]
    server.ask_all(mixed[:concurrency], concurrency)  # warms up
    print(f"{num_requests} requests one by one", file=sys.stderr, flush=True)
    alone = [server.ask(body) for body in mixed]
    outcomes, spent = list[Outcome](), list[float]()
    for part in parts(mixed, min(PARTS, max(1, num_requests // concurrency))):
        print(f"{len(outcomes)} of {num_requests} requests", file=sys.stderr, flush=True)
        found, cost = server.ask_all(part, concurrency)
        outcomes += found
        spent.append(cost)
        memory.append(server.memory_mb())
    costs = []
    for settings in SETTINGS:
        print(f"{num_requests // len(SETTINGS)} requests with {settings}", file=sys.stderr, flush=True)
        bodies = [make_body(i, settings) for i in range(num_requests // len(SETTINGS))]
        costs.append(server.ask_all(bodies, concurrency)[1])
        memory.append(server.memory_mb())
    percentiles = statistics.quantiles([outcome.seconds for outcome in outcomes], n=100)
    pairs = [(one, other) for one, other in zip(outcomes, alone, strict=True) if one.answer and other.answer]
    return {
        "requests": num_requests,
        "concurrency": concurrency,
        "lost": sum(outcome.answer is None for outcome in (*outcomes, *alone)),
        "wrong": sum(not is_same(found.answer, expected.answer) for found, expected in pairs),
        "p50": round(percentiles[49], 3),
        "p99": round(percentiles[98], 3),
        "cpu_seconds_per_1000_tokens": round(statistics.mean(spent), 3),
        "of_one_setting": [round(one, 3) for one in costs],
        "cost_ratio": round(statistics.mean(spent) / statistics.mean(costs), 3),
        "memory_mb": [round(value) for value in memory],
    }


def at_once(server: ServedProcess, num_requests: int = 2000) -> dict[str, Any]:
    """Answers by status of requests that are all in flight together, and the longest seconds of any."""
    bodies = [make_body(i, SETTINGS[i % len(SETTINGS)]) for i in range(num_requests)]
    outcomes, _ = server.ask_all(bodies, num_requests)
    statuses = Counter(str(outcome.status) for outcome in outcomes)
    longest = max(outcome.seconds for outcome in outcomes)
    return {"requests": num_requests, "statuses": dict(statuses), "longest": round(longest, 1)}


def parts(bodies: Sequence[dict[str, Any]], num: int) -> list[Sequence[dict[str, Any]]]:
    """The bodies in `num` parts of about equal size."""
    bounds = [len(bodies) * i // num for i in range(num + 1)]
    return [bodies[first:last] for first, last in itertools.pairwise(bounds) if last > first]


def over_ar(servers: dict[str, ServedProcess], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """For each concurrency, tokens per second of every mode, by the clock and by CPU time of the server."""
    rows = []
    for concurrency in LEVELS:
        settings = {"temperature": 0, "max_tokens": 64, "stream": False}
        bodies = [make_body(i, settings, prompts) for i in range(max(8, 2 * concurrency))]
        row: dict[str, Any] = {"concurrency": concurrency, "requests": len(bodies)}
        answers = {}
        for mode, server in servers.items():
            server.ask_all(bodies[:concurrency], concurrency)  # warms up
            tokens, started = server.num_tokens(), time.perf_counter()
            outcomes, cost = server.ask_all(bodies, concurrency)
            seconds = time.perf_counter() - started
            answers[mode] = [outcome.answer for outcome in outcomes]
            row[mode] = round((server.num_tokens() - tokens) / seconds, 1)
            row[f"{mode}_by_cpu"] = round(1000 / cost, 1)
        row["ratio"] = round(row["lossless"] / row["ar"], 2)
        row["ratio_by_cpu"] = round(row["lossless_by_cpu"] / row["ar_by_cpu"], 2)
        row["lost"] = sum(one.count(None) for one in answers.values())
        row["different"] = sum(one != other for one, other in zip(*answers.values(), strict=True))
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder")
    parser.add_argument("--mode", default="lossless")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--beside", action="store_true", help="measure `at_once` and `beside` too")
    parser.add_argument("--over-ar", action="store_true", help="measure the speed over mode ar instead")
    parser.add_argument("--prompts", help="with --over-ar: JSON lines with a key `prompt`")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.over_ar and options.beside:
        parser.error("--beside and --over-ar measure different things: give one of them")
    modes = ("lossless", "ar") if options.over_ar else (options.mode,)
    flags = ["--dtype", "float32"]
    if options.over_ar:  # the memory of the keys and values is that of all rows at full length
        flags += ["--max-rows", str(max(LEVELS)), "--max-length", "448"]
    servers = {mode: ServedProcess.start(options.folder, ["--mode", mode, *flags]) for mode in modes}
    try:
        if options.over_ar:
            lines = Path(options.prompts).read_text().splitlines() if options.prompts else []
            result: Any = over_ar(servers, [json.loads(line)["prompt"] for line in lines])
        else:
            result = measure(servers[options.mode], options.requests, options.concurrency)
        if options.beside:
            result["at_once"] = at_once(servers[options.mode])
            result["beside"] = {}
            for name, abuse in ABUSES.items():
                print(f"beside {name}", file=sys.stderr, flush=True)
                result["beside"][name] = beside(servers[options.mode], abuse)
    finally:
        for server in servers.values():
            server.process.terminate()
            server.process.wait(60)
    print(json.dumps(result, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
