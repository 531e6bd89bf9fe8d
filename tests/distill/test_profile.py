"""The profile: what `opdlm convert MODEL` chooses, what a user's settings change, what memory changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import write_checkpoint, write_data

from opdlm.api import convert_settings
from opdlm.cli.main import main
from opdlm.config.recipes import bundled_recipes
from opdlm.config.rules import load_config
from opdlm.distill import profile as profile_module
from opdlm.distill.profile import profile

METHOD = ("loss.objective", "format.block_size", "format.mask_init", "train.epochs_per_rollout")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("profile")
    write_data(root)
    return write_checkpoint(root / "model")


def values_of(model: Path, *overrides: str) -> dict[str, Any]:
    return {choice.key: choice.value for choice in profile(str(model), overrides)}


def test_all_weights_are_trained_at_a_smaller_rate_than_an_adapter(model: Path) -> None:
    lora, full = values_of(model), values_of(model, "lora.enabled=false")
    assert lora["optimizer.learning_rate"] > 5 * full["optimizer.learning_rate"] > 0


def test_what_a_user_gives_is_not_chosen_and_the_rest_follows_it(model: Path) -> None:
    overrides = ["optimizer.learning_rate=1e-4", "format.block_size=4", f"data.path={model}/prompts.jsonl"]
    assert not {"optimizer.learning_rate", "format.block_size"} & set(values_of(model, *overrides))
    config = convert_settings(str(model), overrides)
    assert (config.optimizer.learning_rate, config.format.block_size) == (1e-4, 4)
    assert config.format.mask_init == "noise"


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ("rollout.prompts_per_step=4", {"train.rows_per_update": 4}),
        ("rollout.prompts_per_step=12", {"train.rows_per_update": 4}),
        ("train.rows_per_update=24", {"rollout.prompts_per_step": 24}),
        ("train.rows_per_update=6", {"rollout.prompts_per_step": 18}),
    ],
)
def test_updates_divide_the_prompts_of_a_step(model: Path, given: str, chosen: dict[str, int]) -> None:
    overrides = [given, f"data.path={model.parent / 'prompts.jsonl'}"]
    assert chosen.items() <= values_of(model, *overrides).items()
    convert_settings(str(model), overrides)  # no ConfigError


def test_little_memory_gives_smaller_micro_batches_and_then_recomputed_activations(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for free in (1e12, 3e6, 1.0):
        monkeypatch.setattr(profile_module, "free_memory", lambda _, free=free: free)
        chosen = values_of(model)
        rows.append((chosen["train.micro_batch_rows"], chosen["train.gradient_checkpointing"]))
    assert rows[0] == (8, False) and rows[-1] == (1, True)
    assert rows[1][0] < 8


def test_memory_is_estimated_for_what_the_user_gave(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "free_memory", lambda _: 1.0)
    micro, recomputes = "train.micro_batch_rows", "train.gradient_checkpointing"
    assert values_of(model, f"{micro}=8")[recomputes] is True
    assert values_of(model, f"{recomputes}=false")[micro] == 1
    monkeypatch.setattr(profile_module, "free_memory", lambda _: 1e12)
    assert values_of(model, f"{recomputes}=true")[micro] == 8
    assert not {micro, recomputes} & set(values_of(model, f"{recomputes}=true", f"{micro}=2"))


def test_the_recipe_for_real_models_learns_as_the_profile_does(model: Path) -> None:
    chosen, recipe = values_of(model), load_config(bundled_recipes()["preserve_lora"]).flat()
    assert {key: recipe[key] for key in METHOD} == {key: chosen[key] for key in METHOD}


def test_the_choices_are_printed_with_a_reason(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"data.path={model.parent / 'prompts.jsonl'}"
    assert main(["convert", str(model), data, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    chosen = [line for line in lines[1:] if line.startswith("  ") and "=" in line]
    assert "chosen for this model and machine" in lines[0]
    assert len(chosen) >= 8 and all(len(line.split(maxsplit=1)) == 2 for line in chosen)
    assert main(["convert", str(model), data, "--print-config"]) == 0
    assert "mask_init: noise" in capsys.readouterr().out


def test_the_objective_follows_the_format_and_no_choice_is_without_effect(model: Path) -> None:
    assert values_of(model)["loss.objective"] == "draft"
    assert values_of(model)["format.draft_head"] > 0
    assert values_of(model, "masking.windows=[[1, 1]]")["loss.objective"] == "off_policy"
    assert "format.draft_head" not in values_of(model, "loss.objective=off_policy")
    assert "states.selection" not in values_of(model)
    assert "loss.objective" not in values_of(model, "format.name=sdar")
    assert values_of(model, "loss.objective=opd")["states.selection"] == "one_per_block"


def test_an_old_name_counts_as_given(model: Path) -> None:
    chosen = values_of(model, "rollout.max_new_tokens=7", "train.passes_per_rollout=3")
    assert not {"rollout.decode.max_new_tokens", "train.epochs_per_rollout"} & set(chosen)


def test_a_larger_model_makes_fewer_steps_on_a_cpu(model: Path, tmp_path: Path) -> None:
    assert values_of(model)["train.num_steps"] == profile_module.CPU_MOST_STEPS
    shape = {"num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864, "vocab_size": 150_000}
    config = json.loads((model / "config.json").read_text()) | shape
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert 5 < values_of(tmp_path)["train.num_steps"] < profile_module.CPU_STEPS
