"""A real server on the loopback interface, and a client for it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn

from opdlm.checkpoints.convert import load_decoder
from opdlm.data.chat_template import encode_prompt
from opdlm.data.messages import Conversation
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.streaming import StopStrings
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.seeds import seed_of
from opdlm.serving.app import make_app
from opdlm.serving.decode_thread import DecodeThread
from opdlm.serving.http_limits import timed_protocol
from opdlm.serving.server import Server, listen

MAX_LENGTH = 96
MAX_WAITING = 256
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "add 1 2"}]


@dataclass(frozen=True)
class Served:
    """A running server and what it serves."""

    model: DiffusionLM
    tokenizer: Any
    config: DecodeConfig
    port: int
    thread: DecodeThread

    def connect(self, path: str, body: Any) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        return connection.getresponse()

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        response = self.connect(path, body)
        return response.status, json.loads(response.read())

    def events(self, path: str, body: Any) -> list[Any]:
        """What a stream sends, up to [DONE]."""
        lines = self.connect(path, body | {"stream": True}).read().decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def expected(self, text: str, seed: int, stop: tuple[str, ...] = (), **settings: Any) -> tuple[str, str]:
        """Text and finish reason of the request alone, by `generate`."""
        ids = encode_prompt(self.tokenizer, Conversation(prompt=text))
        stops, config = StopStrings(self.tokenizer, stop), replace(self.config, **settings)
        find_end = stops.find_end if stop else None
        (rollout,) = generate(self.model, [ids], config, [seed_of(seed, 0)], find_end=find_end)
        return stops.cut(stops.text(rollout.text_ids)), rollout.finish_reason


def serve(folder: Path, config: DecodeConfig, max_length: int = MAX_LENGTH) -> Iterator[Served]:
    model, tokenizer = load_decoder(str(folder), "auto")
    thread = DecodeThread(model, config, 3, max_length, MAX_WAITING)
    thread.start()
    listener = listen("127.0.0.1", 0)
    app = make_app(Server(thread, tokenizer, "tiny", config))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", http=timed_protocol()))
    runner = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    runner.start()
    yield Served(model, tokenizer, config, listener.getsockname()[1], thread)
    server.should_exit = True
    runner.join()
