"""Conversions on rollouts that the student makes in vLLM, on a CPU through Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted_vllm import interpreter as interpreter
from tiny_checkpoints import write_checkpoint, write_data
from vllm_conversions import LLAMA, convert

GROWTH = ["format.block_size=4", "format.block_growth=[[0,2],[1,4]]"]


@pytest.mark.vllm
@pytest.mark.parametrize(
    "settings",
    [
        ["format.name=sdar", "rollout.decode.temperature=0.8", *GROWTH],
        ["format.name=preserve", "format.grid=response", "rollout.decode.temperature=0.8"],
    ],
    ids=["sdar, growing blocks", "preserve"],
)
def test_a_conversion_on_the_students_rollouts_is_the_same_with_either_engine(
    settings: list[str], tmp_path: Path, interpreter: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step decodes with the present weights; otherwise the losses would differ."""
    write_checkpoint(tmp_path / "model", **LLAMA)
    write_data(tmp_path)
    settings = ["train.num_steps=3", *settings]
    own, vllm = (convert(tmp_path, name, *settings, f"rollout.engine={name}") for name in ("own", "vllm"))
    assert len(own) == 3
    for ours, theirs in zip(own, vllm, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)
        assert theirs["rollout_tokens"] == ours["rollout_tokens"]
