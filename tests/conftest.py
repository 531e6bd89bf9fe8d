"""What every test shares: no network, two threads, the bundled teacher."""

import os
import sys
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as cli.main sets it, but before torch is imported

from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def teacher_folder() -> Path:
    """The tiny autoregressive model that is shipped with the package."""
    return Path(__file__).parent.parent / "opdlm" / "bundled" / "teacher"


@pytest.fixture
def own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code that checkpoints bring is copied to a folder of the test: names of checkpoints repeat."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    for name in names_of_remote_code():
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in names_of_remote_code():  # of this test; those before come back
        del sys.modules[name]


def names_of_remote_code() -> list[str]:
    return [name for name in sys.modules if name.startswith("transformers_modules")]
