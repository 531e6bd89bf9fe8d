"""What ships in the wheel: the tiny teacher, its prompts, the recipes; and the examples."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import write_checkpoint, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdlm.checkpoints.convert import make_student
from opdlm.checkpoints.load import load_causal_lm, load_tokenizer
from opdlm.cli.main import main
from opdlm.config.recipes import bundled_recipes
from opdlm.config.rules import load_config
from opdlm.config.text import load_text_config
from opdlm.data.prompts import load_tasks
from opdlm.evaluation.evaluate import decode_tasks, report_mode

ROOT = Path(__file__).parents[2]
SMALL_RUN = [
    "train.num_steps=2",
    "rollout.prompts_per_step=8",
    "rollout.warm_start_steps=1",
    "rollout.decode.max_new_tokens=16",
    "train.rows_per_update=8",
    "data.limit=16",
    "eval.limit=1",
    "eval.decode.max_new_tokens=40",
]


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_teacher_fits_and_no_evaluation_prompt_is_a_conversion_prompt(teacher_folder: Path) -> None:
    assert (teacher_folder / "model.safetensors").stat().st_size <= 6e6
    prompts = read_lines(teacher_folder.parent / "prompts.jsonl")
    tasks = read_lines(teacher_folder.parent / "eval.jsonl")
    assert not {row["prompt"] for row in prompts} & {row["prompt"] for row in tasks}
    held_out = {row["skill"] for row in tasks if row["held_out"]}
    assert len(held_out) == 5
    assert not held_out & {row["skill"] for row in prompts}


def test_the_teacher_answers_at_least_95_percent_and_lossless_drafts_change_nothing(
    teacher_folder: Path,
) -> None:
    config = load_config(bundled_recipes()["tiny"], ["eval.limit=4"])
    tokenizer = load_tokenizer(config.model.path)
    student = make_student(load_causal_lm(config.model.path, "float32"), tokenizer, config)
    with torch.no_grad():  # an adapter that has learnt nonsense drafts badly; the output must not change
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    tasks = load_tasks(config.eval.path, tokenizer, student.spec.mask_token_id, limit=4)
    teacher = decode_tasks(student, tasks, "ar", config.eval)
    lossless = decode_tasks(student, tasks, "lossless", config.eval)
    assert report_mode("teacher", teacher, teacher, tasks, tokenizer).accuracy >= 0.95
    assert [r.text_ids for r in lossless.rollouts] == [r.text_ids for r in teacher.rollouts]


def test_ar_mode_equals_transformers_generate_on_the_teacher(teacher_folder: Path) -> None:
    config = load_config(bundled_recipes()["tiny"])
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    student = make_student(load_causal_lm(config.model.path, "float32"), tokenizer, config)
    tasks = load_tasks(config.eval.path, tokenizer, student.spec.mask_token_id, limit=1)
    reference = AutoModelForCausalLM.from_pretrained(teacher_folder)
    rollouts = decode_tasks(student, tasks, "ar", config.eval).rollouts
    for task, rollout in zip(tasks, rollouts, strict=True):
        ids = torch.tensor([task.prompt.ids])
        output = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=80
        )
        assert tuple(output[0, ids.shape[1] :].tolist()) == rollout.text_ids


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "tiny" else pytest.mark.slow)
        for name in bundled_recipes()
        if name.startswith("tiny")
    ],
)
def test_every_tiny_recipe_runs_two_steps(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = [] if name == "tiny" else ["data.self_prompts=24"]
    assert main(["convert", name, f"output_dir={tmp_path / 'run'}", *SMALL_RUN, *fewer]) == 0
    folder = tmp_path / "run" / "model"
    assert str(folder) in capsys.readouterr().out
    report = json.loads((folder / "retention.json").read_text())
    assert report["teacher"]["accuracy"] > 0.8
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_every_recipe_says_on_its_first_line_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(len(bundled_recipes(folder)) for folder in ("", "train", "accelerate"))
    assert all(len(line.split(maxsplit=2)[2]) > 20 for line in lines)


@pytest.mark.parametrize("name", bundled_recipes("train"))
def test_every_recipe_of_training_on_text_is_valid(name: str) -> None:
    assert load_text_config(bundled_recipes("train")[name]).train.num_steps > 0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a file of the repository with arguments; returns what it prints."""

    def run(*command: str) -> str:
        monkeypatch.setattr(sys, "argv", [*command])
        capsys.readouterr()
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_the_examples_of_the_bundled_model_run(tmp_path: Path, run: Callable[..., str]) -> None:
    assert "lossless: retention" in run("examples/train_in_python.py", str(tmp_path / "by_hand"))
    assert main(["convert", "tiny", f"output_dir={tmp_path / 'run'}", *SMALL_RUN]) == 0
    decoded = run("examples/decode_modes.py", str(tmp_path / "run" / "model"), "add 47 38")
    answers = {line.split()[0]: line.split("forwards")[1] for line in decoded.splitlines()}
    assert answers["lossless"] == answers["ar"]


def test_the_examples_of_a_drafter_and_a_dual_run(tmp_path: Path, run: Callable[..., str]) -> None:
    write_checkpoint(tmp_path / "model")
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"add {i} {i}"} for i in range(16)])
    where = [str(tmp_path / "model"), str(prompts), str(tmp_path / "draft")]
    small = ["train.num_steps=1", "train.rows_per_update=2", "rollout.decode.max_new_tokens=8", "lora.r=4"]
    shown = run("examples/drafter_for_sglang.py", *where, *small)
    assert f"--uno-lora-path {tmp_path / 'draft' / 'uno'}" in shown

    text = write_rows(tmp_path / "text.jsonl", [{"text": "one and two and three. " * 20}] * 8)
    where = [str(text), str(text), str(tmp_path / "bytes")]
    shown = run("examples/dual_from_scratch.py", *where, "train.num_steps=2", "data.sequence_length=32")
    found = re.search(r"autoregressive: ([\d.]+) nats.*\nmasked: at most ([\d.]+)", shown)
    assert found and all(0 < float(nats) < 8 for nats in found.groups())


@pytest.mark.slow
def test_the_example_of_four_objectives_runs(tmp_path: Path, run: Callable[..., str]) -> None:
    shown = run("examples/four_objectives.py", str(tmp_path / "four"), *SMALL_RUN, "train.num_steps=1")
    rows = [line.split() for line in shown.splitlines() if line.startswith(("opd", "off_policy", "sft"))]
    assert [row[0] for row in rows] == ["opd", "opd_random", "off_policy", "sft"]
    assert all(float(row[1]) >= 1 for row in rows)
