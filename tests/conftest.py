"""What every test shares: no network, two threads, the bundled teacher."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")  # of this process: names may repeat
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as cli.main sets it, but before torch is imported

from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def teacher_folder() -> Path:
    """The tiny autoregressive model that is shipped with the package."""
    return Path(__file__).parent.parent / "opdlm" / "bundled" / "teacher"
