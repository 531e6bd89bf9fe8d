"""Servers of tiny converted checkpoints."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_server import Served, serve
from tiny_checkpoints import convert_both

from opdlm.decoding.decode_config import DecodeConfig


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted tiny checkpoints of both formats."""
    return convert_both(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="session")
def lossless(folders: dict[str, Path]) -> Iterator[Served]:
    yield from serve(folders["preserve"], DecodeConfig(mode="lossless", max_new_tokens=20))
