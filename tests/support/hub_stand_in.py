"""The part of the Hub's HTTP API that `huggingface_hub` calls to publish and to fetch, on the loopback
interface: create a repository, preupload, LFS batch, upload and verify, commit, model info, tree, resolve.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
COMMIT = "c" * 40


@dataclass
class StandIn:
    """What the server holds, and how it answers."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """(repository, kind `model` or `dataset`) by name, each with its files."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Uploaded LFS objects by SHA-256."""
    private: set[str] = field(default_factory=set)
    refuses: int | None = None
    """Status of every answer to a write; None: they are carried out."""

    def command(
        self, folder: Path, *arguments: str, token: str | None = TOKEN
    ) -> subprocess.CompletedProcess[str]:
        """Python in a process of its own that takes this server for the Hub. `folder` holds its cache."""
        environment = os.environ | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        environment.pop("HF_TOKEN", None)
        environment |= {"HF_TOKEN": token} if token else {}
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600
        )


@contextmanager
def hub() -> Iterator[StandIn]:
    """The server, while the block runs."""
    state = StandIn()
    handler = type("BoundHandler", (Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: StandIn

    def log_message(self, *_: Any) -> None:
        """Nothing: the test's output is not the place."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self.with_files(found[1], lambda files: self.info(found[1], files))
        elif found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/[^/]+(/.*)?", path):
            self.with_files(found[1], lambda files: [entry(*item) for item in sorted(files.items())])
        elif found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.resolve(found[1], found[2])
        else:
            self.answer(404, {"error": f"no such page: {path}"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refused():
            return
        if path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            files = [
                {"path": f["path"], "uploadMode": upload_mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer(
                200, {"transfer": "basic", "objects": [self.actions(o) for o in json.loads(body)["objects"]]}
            )
        elif path == "/verify":
            known = json.loads(body)["oid"] in self.state.blobs
            self.answer(200 if known else 404, {})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404, {"error": f"no such page: {path}"})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = hashlib.sha256(data).hexdigest()
        self.state.blobs[oid] = data
        self.answer(200 if self.path == f"/upload/{oid}" else 400, {})

    def refused(self) -> bool:
        """Answer for a token that is missing or unknown, and where the test wants no write."""
        status = self.state.refuses or (
            None if self.headers.get("Authorization") == f"Bearer {TOKEN}" else 401
        )
        if status is not None:
            self.answer(status, {"error": "refused"})
        return status is not None

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.state.repositories
        self.state.repositories.setdefault(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        if not known and (asked.get("private") or asked.get("visibility") == "private"):
            self.state.private.add(name)
        self.answer(409 if known else 200, {"url": f"{self.state.url}/{name}"})

    def actions(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.state.blobs:
            return wanted
        upload, verify = f"{self.state.url}/upload/{wanted['oid']}", f"{self.state.url}/verify"
        return wanted | {"actions": {"upload": {"href": upload}, "verify": {"href": verify}}}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.state.repositories[name]
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.state.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        self.answer(200, {"commitUrl": f"{self.state.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def with_files(self, name: str, values_of: Any) -> None:
        if name in self.state.repositories:
            self.answer(200, values_of(self.state.repositories[name]))
        else:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def info(self, name: str, files: dict[str, bytes]) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in sorted(files)]
        is_private = name in self.state.private
        return {"id": name, "sha": COMMIT, "private": is_private, "tags": [], "siblings": siblings}

    def resolve(self, name: str, path: str) -> None:
        files = self.state.repositories.get(name)
        if files is None or path not in files:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            self.answer(404, {"error": "not found"}, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            return
        data = files[path]
        self.answer(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def upload_mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file in the listing of a tree."""
    oid = hashlib.sha256(data).hexdigest()
    listed: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid[:40]}
    if upload_mode(path) == "lfs":
        listed["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
    return listed
