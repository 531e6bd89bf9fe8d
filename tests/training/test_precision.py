"""Conversions in bfloat16, under autocast, and with a tracker: the same run, other arithmetic."""

import json
from pathlib import Path

import pytest
import torch

from opdlm.checkpoints.load import load
from opdlm.cli.main import main
from opdlm.training.devices import deterministic_kernels

SMALL_RUN = [
    "train.num_steps=2",
    "rollout.prompts_per_step=8",
    "rollout.decode.max_new_tokens=16",
    "train.rows_per_update=8",
    "data.limit=16",
    "eval.limit=1",
    "eval.decode.max_new_tokens=24",
]


@pytest.mark.parametrize("recipe", ["tiny", pytest.param("tiny_sdar", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "setting",
    ["model.dtype=bfloat16", pytest.param("train.mixed_precision=bf16", marks=pytest.mark.slow)],
)
def test_a_recipe_converts_in_bfloat16(recipe: str, setting: str, tmp_path: Path) -> None:
    run = [*SMALL_RUN, "optimizer.warmup_steps=0", "train.num_steps=4"]
    run += [] if recipe == "tiny" else ["data.self_prompts=24"]
    assert main(["convert", recipe, f"output_dir={tmp_path}", setting, *run]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[3]["loss"] < rows[0]["loss"]
    model, _ = load(tmp_path / "model", dtype="bfloat16")
    assert model.student.dtype == torch.bfloat16


def test_a_tracker_receives_every_metric(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra `track`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = ["convert", "tiny", f"output_dir={tmp_path}", "train.report_to=tensorboard", *SMALL_RUN]
    assert main(run) == 0
    events = EventAccumulator(str(tmp_path / "opdlm"))
    events.Reload()
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    logged = events.Scalars("loss")[1]
    assert (logged.step, logged.value) == (2, pytest.approx(row["loss"], rel=1e-6))


def test_updates_on_cuda_ask_for_deterministic_kernels_and_leave_the_setting_as_it_was() -> None:
    with deterministic_kernels(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic_kernels(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
