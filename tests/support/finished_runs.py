"""Finished runs, read and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opdlm.training.metrics import read_metrics

TIMES = {
    *("rollout_tokens_per_second", "rollout_wait_seconds", "rollout_share_of_time", "seconds"),
    "cpu_seconds",
}


def metrics(output: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what a clock measured."""
    rows = read_metrics(output / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def weights_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*.safetensors")}


def assert_same_run(output: Path, whole: Path) -> None:
    assert metrics(output) == metrics(whole)
    written = [weights_in(folder / "model") for folder in (output, whole)]
    assert written[0].keys() == written[1].keys() >= {"adapter_model.safetensors", "model.safetensors"}
    assert all(written[0][name] == written[1][name] for name in written[1])
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        saved = [folder / "checkpoint-4" / name for folder in (output, whole)]
        assert saved[0].read_bytes() == saved[1].read_bytes(), name
    assert not [path for path in output.rglob("*") if "partial" in path.name or path.name.endswith(".old")]
