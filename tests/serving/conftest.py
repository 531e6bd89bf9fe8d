"""Servers of tiny converted checkpoints."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from loopback_server import Served, serve
from tiny_checkpoints import convert_both

from opdlm.decoding.decode_config import DecodeConfig

KEY = "secret"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted tiny checkpoints of both formats."""
    return convert_both(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="session")
def lossless(folders: dict[str, Path]) -> Iterator[Served]:
    yield from serve(folders["preserve"], DecodeConfig(mode="lossless", max_new_tokens=20))


@dataclass(frozen=True)
class ServedProcess:
    """`opdlm serve` in a process of its own."""

    url: str
    log: Path
    """Where it writes its request log."""


@pytest.fixture(scope="session")
def served_process(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedProcess]:
    log = tmp_path_factory.mktemp("log") / "requests.jsonl"
    cli = Path(__file__).parents[2] / "cli.py"
    command = [sys.executable, str(cli), "serve", str(folders["preserve"]), "--port", "0", "--name", "tiny"]
    flags = ["--mode", "lossless", "--max-new-tokens", "30", "--api-key", KEY, "--request-log", str(log)]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield ServedProcess(process.stdout.readline().split()[4].removesuffix("/v1,"), log)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
