"""A result folder's remote code is used as any model of transformers is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from everyday_calls import CALLS, run
from tiny_checkpoints import NUM_TOKENS, tiny_overrides, write_checkpoint, write_data

from opdlm.cli.main import main

KINDS = {
    "preserve": ("format.name=preserve",),
    "preserve-copy": ("format.name=preserve", "lora.enabled=false"),
    "sdar": ("format.name=sdar",),
    "sdar-apart": ("format.name=sdar", "lora.merge=false"),
}
outcomes: dict[str, dict[str, str]] = {}
"""By kind of folder: the outcome of each call. All calls of a kind share a process."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("everyday")
    write_data(root)
    write_checkpoint(root / "teacher", vocab_size=NUM_TOKENS)
    return root


def convert(root: Path, kind: str) -> Path:
    teacher, output_dir = root / "teacher", root / kind
    if not output_dir.exists():
        settings = tiny_overrides(teacher, root, output_dir)[1:]
        assert main(["convert", str(teacher), *settings, *KINDS[kind]]) == 0
    return output_dir / "model"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_everyday_call(kind: str, name: str, root: Path) -> None:
    if kind not in outcomes:
        outcomes[kind] = run(convert(root, kind), root / "teacher", root / f"modules-{kind}")
    assert not outcomes[kind][name], outcomes[kind][name]


class Hub(BaseHTTPRequestHandler):
    """The endpoints of the hub that an upload of small files calls."""

    committed: list[str]

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        url = f"http://{self.headers['Host']}/someone/small"
        answer: dict[str, Any] = {"url": url}
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {
                "files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            }
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.committed += [line["value"]["path"] for line in lines if line["key"] == "file"]
            answer = {"commitUrl": f"{url}/commit/0", "commitOid": "0" * 40}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of a hub, and the files that were committed to it."""
    Hub.committed = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Hub.committed
        server.shutdown()


PUSH = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.push_to_hub("someone/small", token="hf_none")
"""


@pytest.mark.parametrize("kind", ["preserve", "preserve-copy"])
def test_push_to_hub_uploads_the_whole_folder(kind: str, root: Path, hub: tuple[str, list[str]]) -> None:
    folder, (address, committed) = convert(root, kind), hub
    offline = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_MODULES_CACHE": str(root / "pushed")}
    environment = {**os.environ, **offline, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", PUSH, str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    beside = "student" if kind == "preserve-copy" else "adapter"
    wanted = [*folder.glob("*.safetensors"), *folder.glob("*.py"), *(folder / beside).iterdir()]
    names = {str(path.relative_to(folder)) for path in wanted} | {"config.json", "generation_config.json"}
    assert set(committed) >= names, names - set(committed)
