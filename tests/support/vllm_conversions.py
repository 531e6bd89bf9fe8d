"""Conversions of a model that vLLM can run."""

from __future__ import annotations

from pathlib import Path

from tiny_checkpoints import tiny_overrides

from opdlm.cli.main import main
from opdlm.training.metrics import read_metrics

LLAMA = {"head_dim": 32, "max_position_embeddings": 256}  # vLLM has no attention kernel for smaller heads


def convert(folder: Path, name: str, *overrides: str) -> list[dict[str, float]]:
    arguments = tiny_overrides(folder / "model", folder, folder / name)
    assert (
        main(["convert", str(folder / "model"), *arguments[1:], "rollout.decode.temperature=0", *overrides])
        == 0
    )
    return read_metrics(folder / name / "metrics.jsonl")
