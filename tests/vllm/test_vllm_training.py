"""Conversions whose teacher responses vLLM writes; `make test-vllm` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data
from vllm_conversions import LLAMA, convert

from opdlm.cli.main import main


@pytest.mark.vllm
def test_a_conversion_on_teacher_responses_is_the_same_with_either_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "model", **LLAMA)
    write_data(tmp_path)
    for objective in ("off_policy", "sft"):
        own, vllm = (
            convert(
                tmp_path, f"{objective}_{engine}", f"loss.objective={objective}", f"rollout.engine={engine}"
            )
            for engine in ("own", "vllm")
        )
        for ours, theirs in zip(own, vllm, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
            assert ours["rollout_tokens"] == theirs["rollout_tokens"]


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="students run in vLLM on a GPU")
def test_without_a_gpu_rollouts_of_the_student_are_refused_before_a_warm_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "model", **LLAMA)
    write_data(tmp_path)
    arguments = tiny_overrides(tmp_path / "model", tmp_path, tmp_path / "run")[1:]
    arguments += ["rollout.engine=vllm", "rollout.warm_start_steps=1"]
    assert main(["convert", str(tmp_path / "model"), *arguments]) == 2
    assert "on a GPU, and none is here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
