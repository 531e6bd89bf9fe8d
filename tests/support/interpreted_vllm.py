"""vLLM's GPU code on a CPU, through Triton's interpreter: slow, and exact."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from opdlm.vllm.engine import prepare_environment


class InterpretedDriver:
    """Lets vLLM find a Triton that can run on a CPU: its interpreter."""

    @staticmethod
    def is_active() -> bool:
        return True


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    if "vllm" in sys.modules:
        pytest.skip("vLLM was imported without the interpreter: run this file in a process of its own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        patch.setenv("TRITON_INTERPRET", "1")
        for name in [*sys.modules]:  # torch imported it, with functions that are not interpreted
            if name.partition(".")[0] == "triton" and not name.startswith("triton._C"):
                patch.delitem(sys.modules, name)
        import triton.backends

        backend = triton.backends.Backend(compiler=None, driver=InterpretedDriver)
        patch.setattr(triton.backends, "backends", {"cpu": backend})
        yield


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM's own class on the folder. It finds our plugin by itself; float32 has to be asked for."""
    prepare_environment()
    from vllm import LLM

    llm = LLM(
        str(folder), **{"dtype": "float32", "kv_cache_memory_bytes": 2**24, "max_num_seqs": 4} | options
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
