"""Runs of `opdlm train` from the command line: result folders, interruptions, what `auto` becomes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import failing_after_a_save, write_checkpoint, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import opdlm
from opdlm.checkpoints.load import load
from opdlm.cli.main import main
from opdlm.config.text import build_text_config
from opdlm.text.pipeline import load_text_inputs

SHAPE = (
    "hidden_size=32",
    "intermediate_size=48",
    "num_hidden_layers=2",
    "num_key_value_heads=2",
    "head_dim=8",
)
SCRATCH = ["bundled:byte", "model.from_scratch=true", *(f"model.shape.{entry}" for entry in SHAPE)]
TEXT = [f"{a} and {b} make {a}{b}." for a in ("one", "two", "six") for b in ("ten", "ox", "a")]
TIMES = ("seconds", "tokens_per_second", "eval_seconds")
DUAL = ["objective.name=dual", "objective.prediction=next_position"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text.jsonl`, `held_out.jsonl`, a pretrained folder `plain` and a diffusion folder `masked`."""
    root = tmp_path_factory.mktemp("text")
    write_rows(root / "text.jsonl", [{"text": line} for line in TEXT])
    write_rows(root / "held_out.jsonl", [{"text": "two and six make a."}, {"text": "ten and one ox."}])
    assert main(command(root, root / "plain", SCRATCH, *DUAL)) == 0
    assert main(command(root, root / "masked", SCRATCH)) == 0
    return root


def command(root: Path, output: Path, target: Sequence[str], *overrides: str) -> list[str]:
    return [
        *("train", *target, f"data.path={root / 'text.jsonl'}", f"output_dir={output}"),
        *("data.sequence_length=16", "train.rows_per_update=2", "train.micro_batch_rows=2"),
        *("train.num_steps=4", "train.save_every=2", "optimizer.learning_rate=1e-2", *overrides),
    ]


def held_out(root: Path) -> list[str]:
    return [f"eval.path={root / 'held_out.jsonl'}", "eval.num_rates=4"]


def results_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "model" / "all_results.json").read_text())


def rows_of(output: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what a clock measured."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_a_masked_diffusion_folder_generates(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(text / "masked" / "model")
    assert model.spec.format == "sdar" and model.spec.mask_token_id == tokenizer.mask_token_id == 258
    capsys.readouterr()
    assert main(["generate", str(text / "masked" / "model"), "one and", "--max-new-tokens", "6"]) == 0
    assert "per forward" in capsys.readouterr().err


def test_a_next_position_folder_is_a_plain_checkpoint(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = text / "plain" / "model"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(plain).__name__ == "Qwen3ForCausalLM" and not hasattr(plain.config, "block_diffusion")
    ids = tokenizer("one and", return_tensors="pt")["input_ids"]
    expected = plain.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    capsys.readouterr()
    arguments = [str(folder), "one and", "--mode", "ar", "--max-new-tokens", "6", "--json"]
    assert main(["generate", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)["token_ids"]
    assert found and found == expected[: len(found)]


def test_neither_transformers_nor_we_write_the_mask_token(text: Path) -> None:
    """Its logit was never trained, so it may be the highest."""
    folder = text / "plain" / "model"
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.suppress_tokens == [258]
    decoder, tokenizer = opdlm.load(folder, mode="ar")
    assert tokenizer.mask_token_id == 258 and 258 in decoder.spec.banned_token_ids


def test_a_plain_folder_keeps_nothing_of_a_diffusion_folder(text: Path, tmp_path: Path) -> None:
    source = [str(text / "masked" / "model")]
    assert main(command(text, tmp_path / "run", source, *DUAL, "train.num_steps=1")) == 0
    folder = tmp_path / "run" / "model"
    values = json.loads((folder / "config.json").read_text())
    assert "block_diffusion" not in values and "auto_map" not in values
    assert main(["generate", str(folder), "one", "--mode", "ar", "--max-new-tokens", "2"]) == 0


MERGED = {
    "dual": DUAL,
    "autoregressive": ["objective.name=autoregressive"],
    "masked_diffusion": ["objective.name=masked_diffusion"],
}


@pytest.mark.parametrize("name", MERGED)
def test_an_adapter_is_merged_and_the_folder_is_the_model(text: Path, tmp_path: Path, name: str) -> None:
    """Measured in memory, and again from the folder after an update with learning rate 0."""
    write_checkpoint(tmp_path / "llama")
    path = write_rows(tmp_path / "lower.jsonl", [{"text": line.lower()} for line in TEXT])
    settings = [f"data.path={path}", f"eval.path={path}", "eval.num_rates=4", *MERGED[name]]
    adapter = ["lora.enabled=true", "lora.r=4"]
    assert main(command(text, tmp_path / "run", [str(tmp_path / "llama")], *settings, *adapter)) == 0
    folder = tmp_path / "run" / "model"
    assert not (folder / "adapter").exists()
    still = ["train.num_steps=1", "optimizer.warmup_steps=1"]
    assert main(command(text, tmp_path / "again", [str(folder)], *settings, *still)) == 0
    expected = results_of(tmp_path / "run")
    found = {key: n for key, n in results_of(tmp_path / "again").items() if key.startswith("heldout")}
    assert found and found == pytest.approx({key: expected[key] for key in found}, rel=1e-4)


def test_one_seed_is_one_model_whatever_was_drawn_before(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "llama")
    path = write_rows(tmp_path / "lower.jsonl", [{"text": "one and two"}, {"text": "two and one and two"}])
    values = {
        "model": {"path": str(tmp_path / "llama")},
        "data": {"path": str(path), "sequence_length": 8},
        "lora": {"enabled": True, "r": 4},
    }
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        inputs = load_text_inputs(build_text_config(values))
        found.append({name: p for name, p in inputs.model.named_parameters() if p.requires_grad})
    assert "mask_embedding" in found[0]
    assert not [name for name, weight in found[0].items() if not torch.equal(weight, found[1][name])]


def test_masked_inputs_of_an_adapter_have_an_embedding_that_learns(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "llama")
    path = write_rows(tmp_path / "lower.jsonl", [{"text": "one and two"}, {"text": "two and one and two"}])
    for input_masking in (None, [0.1, 0.5]):
        values = {
            "model": {"path": str(tmp_path / "llama")},
            "data": {"path": str(path), "sequence_length": 8},
            "lora": {"enabled": True, "r": 4},
            "objective": {"name": "autoregressive", "input_masking": input_masking},
        }
        inputs = load_text_inputs(build_text_config(values))
        assert (inputs.model.mask_embedding is None) == (input_masking is None)


INTERRUPTED = {
    "dual": [*DUAL, "objective.dropout=0.1", "train.ema_decay=0.9", "objective.distill_weight=0.3"],
    "blocks": ["objective.name=block_diffusion", "optimizer.warmup_steps=2"],
    "adapter": [*DUAL, "lora.enabled=true", "lora.dropout=0.1"],
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_run_continues_to_the_same_weights(
    text: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*INTERRUPTED[name], *held_out(text), "eval.every=1"]
    target = [str(text / "plain" / "model")]
    assert main(command(text, tmp_path / "whole", target, *settings)) == 0
    with failing_after_a_save(monkeypatch):
        assert main(command(text, tmp_path / "run", target, *settings)) == 2
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    capsys.readouterr()
    assert main(command(text, tmp_path / "run", target, *settings, "objective.ar_weight=2", *DUAL)) == 2
    assert "holds a run with other settings (objective." in capsys.readouterr().err
    data = text / "text.jsonl"
    before = data.read_text()
    data.write_text("".join(before.splitlines(keepends=True)[1:]))
    assert main(command(text, tmp_path / "run", target, *settings)) == 2
    assert "the training data are not those of" in capsys.readouterr().err
    data.write_text(before)
    assert main(command(text, tmp_path / "run", target, *settings)) == 0
    assert "resumed at step 2 of 4" in capsys.readouterr().out
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("run", "whole")]
    assert weights[0] == weights[1]


def test_the_average_is_written(text: Path, tmp_path: Path) -> None:
    target = [str(text / "plain" / "model")]
    for name, settings in {"last": [], "average": ["train.ema_decay=0.9"]}.items():
        assert main(command(text, tmp_path / name, target, *DUAL, *settings)) == 0
    folders = (text / "plain", tmp_path / "last", tmp_path / "average")
    models = [AutoModelForCausalLM.from_pretrained(folder / "model") for folder in folders]
    start, last, average = (model.lm_head.weight.detach() for model in models)
    assert rows_of(tmp_path / "last") == rows_of(tmp_path / "average")
    assert 0 < float((average - start).norm()) < float((last - start).norm())


def test_a_run_stops_when_the_held_out_loss_stalls(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*held_out(text), "eval.every=1", "eval.patience=2", "objective.name=autoregressive"]
    settings += ["train.num_steps=30", "optimizer.learning_rate=0.3"]
    assert main(command(text, tmp_path / "run", [str(text / "plain" / "model")], *settings)) == 0
    losses = [row["heldout_ar_nll"] for row in rows_of(tmp_path / "run")]
    assert len(losses) < 30 and losses.index(min(losses)) == len(losses) - 3
    assert "eval.patience" in capsys.readouterr().out
    assert results_of(tmp_path / "run")["heldout_ar_nll"] == pytest.approx(losses[-1], rel=1e-5)

    settings += ["eval.load_best_model_at_end=true"]
    assert main(command(text, tmp_path / "best", [str(text / "plain" / "model")], *settings)) == 0
    assert results_of(tmp_path / "best")["heldout_ar_nll"] == pytest.approx(min(losses), rel=1e-5)


def test_epochs_auto_share_and_auto_window_are_resolved_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "text.jsonl", [{"text": "one and two " * 8}] * 4)
    settings = ["data.epochs=40", "data.unique_tokens=81", "objective.ar_share=auto", "masking.windows=auto"]
    output = f"output_dir={tmp_path / 'run'}"
    rows = [f"data.path={path}", output, "data.sequence_length=16", "train.rows_per_update=50"]
    assert main(["train", *SCRATCH, *rows, *DUAL, *settings]) == 0
    printed = capsys.readouterr().out
    assert "40.00 epochs of 81 tokens" in printed and "objective.ar_share auto: 0.4" in printed
    assert "autoregressive rows see the data 16.0 times" in printed
    assert "masking.windows auto: t* = 0." in printed
    assert len(rows_of(tmp_path / "run")) == 4  # 40 x 5 rows / 50
    assert main(["train", str(tmp_path / "run" / "config.yaml")]) == 0  # what it became is a recipe
    assert "resumed at step 4 of 4" in capsys.readouterr().out


def test_from_an_empty_folder_to_an_evaluated_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From scratch, continued with both objectives, converted, evaluated: a command each."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "text.jsonl", [{"text": line} for line in TEXT])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": line[:7]} for line in TEXT])
    write_rows(tmp_path / "tasks.jsonl", [{"prompt": "one and", "answer": " ten", "skill": "sum"}])
    small = [
        "data.path=text.jsonl",
        "data.sequence_length=16",
        "train.rows_per_update=2",
        "train.num_steps=2",
    ]
    first = ["objective.name=autoregressive", "output_dir=first"]
    assert main(["train", *SCRATCH, *small, *first]) == 0
    assert main(["train", "first/model", *small, *DUAL, "output_dir=second"]) == 0
    convert = ["data.path=prompts.jsonl", "output_dir=third", "rollout.prompts_per_step=2", "lora.r=4"]
    convert += ["rollout.decode.max_new_tokens=8", "train.rows_per_update=2", "train.num_steps=1"]
    assert main(["convert", "second/model", *convert]) == 0
    capsys.readouterr()
    assert main(["eval", "third/model", "eval.path=tasks.jsonl", "eval.decode.max_new_tokens=8"]) == 0
    assert "Retention on 1 prompts" in capsys.readouterr().out


def test_settings_are_listed_and_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--list-keys"]) == 0
    listed = capsys.readouterr().out
    assert "objective.ar_share = 0.5" in listed and "format.name = 'sdar'" in listed
    assert "rollout." not in listed and "lora.enabled = False" in listed
    assert main(["train", "bundled:byte", "objective.name=dual", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "name: dual" in printed and "path: bundled:byte" in printed
    (tmp_path / "recipe.yaml").write_text(printed)
    assert main(["train", str(tmp_path / "recipe.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
