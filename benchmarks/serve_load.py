"""Whether `opdlm serve` holds load: requests of mixed settings at once, each compared to the same alone.

    python benchmarks/serve_load.py runs/tiny/model --mode lossless --requests 200 --concurrency 64

Prompts, lengths, temperatures, filters, stop strings, streaming and log-probabilities differ from request to
request. `lost`: not answered with status 200. `wrong`: another text, finish reason or tokens than alone.
`cost_ratio`: CPU seconds of the server per generated token, mixed, over the mean of the same requests with
each of the settings alone. `p50`, `p99`: seconds of a request. Linux only (/proc). Decodes in float32, where
near ties are not decided by the rounding that the batch size changes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request."""

    answer: Any
    """Text, finish reason and tokens with log-probabilities; None if it was not answered."""
    seconds: float


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
        started, answer = time.perf_counter(), None
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            sent = response.read().decode()
            if response.status == 200:
                answer = read_stream(sent) if body["stream"] else read_choice(json.loads(sent)["choices"][0])
        except (OSError, http.client.HTTPException):
            pass  # lost
        return Outcome(answer, time.perf_counter() - started)

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


def make_body(index: int, settings: dict[str, Any]) -> dict[str, Any]:
    topic = TOPICS[index % len(TOPICS)]
    text = f"add {index} {7 * index % 50}" if index % 2 else f"Tell me about {topic}."
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


def measure(server: ServedProcess, num_requests: int, concurrency: int) -> dict[str, Any]:
    mixed = [make_body(i, SETTINGS[i % len(SETTINGS)]) for i in range(num_requests)]
    server.ask_all(mixed[:concurrency], concurrency)  # warms up
    alone = [server.ask(body) for body in mixed]
    memory = [server.memory_mb()]
    outcomes, cost = server.ask_all(mixed, concurrency)
    memory.append(server.memory_mb())
    costs = []
    for settings in SETTINGS:
        costs.append(server.ask_all([make_body(i, settings) for i in range(num_requests)], concurrency)[1])
        memory.append(server.memory_mb())
    answered = [pair for pair in zip(outcomes, alone, strict=True) if pair[0].answer is not None]
    percentiles = statistics.quantiles([outcome.seconds for outcome in outcomes], n=100)
    return {
        "requests": num_requests,
        "concurrency": concurrency,
        "lost": num_requests - len(answered),
        "wrong": sum(not is_same(found.answer, expected.answer) for found, expected in answered),
        "p50": round(percentiles[49], 3),
        "p99": round(percentiles[98], 3),
        "cpu_seconds_per_1000_tokens": round(cost, 3),
        "of_one_setting": [round(one, 3) for one in costs],
        "cost_ratio": round(cost / statistics.mean(costs), 3),
        "memory_mb": [round(value) for value in memory],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder")
    parser.add_argument("--mode", default="lossless")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--json")
    options = parser.parse_args()
    server = ServedProcess.start(options.folder, ["--mode", options.mode, "--dtype", "float32"])
    try:
        result = measure(server, options.requests, options.concurrency)
    finally:
        server.process.terminate()
        server.process.wait(60)
    print(json.dumps(result, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
