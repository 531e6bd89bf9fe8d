"""Prompts that the model writes itself: where a turn ends, what is kept, and a run that has no others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny_checkpoints import tiny_overrides, write_data
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opdlm.checkpoints.convert import make_student
from opdlm.checkpoints.load import load_causal_lm
from opdlm.config.rules import load_config
from opdlm.config.sections import Config, DataSection
from opdlm.distill.pipeline import convert_checkpoint
from opdlm.distill.self_prompts import self_prompts, user_turn, write_prompts
from opdlm.modeling.diffusion_lm import DiffusionLM

NUM_PROMPTS = 40


@pytest.fixture(scope="module")
def tokenizer(teacher_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(teacher_folder)


@pytest.fixture(scope="module")
def config() -> Config:
    settings = [
        f"data.self_prompts={NUM_PROMPTS}",
        "data.max_prompt_tokens=48",
        "rollout.decode.batch_size=16",
    ]
    return load_config(None, ["model.path=bundled:teacher", *settings])


@pytest.fixture(scope="module")
def student(teacher_folder: Path, tokenizer: PreTrainedTokenizerBase, config: Config) -> DiffusionLM:
    return make_student(load_causal_lm(str(teacher_folder), "float32"), tokenizer, config)


def test_a_user_turn_is_what_the_template_writes_around_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    start, end = user_turn(tokenizer, DataSection())
    assert tokenizer.decode(start) == "<|user|>"
    assert tokenizer.decode([end]) == "<|assistant|>"


def test_the_teacher_asks_in_the_form_of_every_skill(
    student: DiffusionLM, tokenizer: PreTrainedTokenizerBase, config: Config, tmp_path: Path
) -> None:
    texts = write_prompts(student, tokenizer, config, (), tmp_path / "partial")
    assert len(texts) == NUM_PROMPTS
    assert not any("<|" in text or text != text.strip() for text in texts)
    forms = {text.split()[0] for text in texts}
    assert {"add", "sort", "close", "count", "reverse"} <= forms


def test_what_the_teacher_often_asks_is_kept_as_often(
    student: DiffusionLM, tokenizer: PreTrainedTokenizerBase, config: Config, tmp_path: Path
) -> None:
    """Few questions about days exist and very many sums: dropping repeats would lose the days."""
    data = replace(config.data, self_prompts=600)
    rollout = replace(config.rollout, decode=replace(config.rollout.decode, batch_size=100))
    texts = write_prompts(student, tokenizer, replace(config, data=data, rollout=rollout), (), tmp_path / "p")
    days = [text for text in texts if "day" in text]
    assert len(set(days)) < len(days)


def test_prompts_depend_on_the_seed_alone_and_leave_out_what_is_excluded(
    student: DiffusionLM, tokenizer: PreTrainedTokenizerBase, config: Config, tmp_path: Path
) -> None:
    texts = write_prompts(student, tokenizer, config, (), tmp_path / "first")
    assert write_prompts(student, tokenizer, config, (), tmp_path / "second") == texts
    others = write_prompts(student, tokenizer, config, set(texts[:5]), tmp_path / "first")
    assert not set(others) & set(texts[:5])
    assert others[: NUM_PROMPTS - 5] == texts[5:]


def test_an_interrupted_search_continues_after_its_last_batch(
    student: DiffusionLM, tokenizer: PreTrainedTokenizerBase, config: Config, tmp_path: Path
) -> None:
    partial = tmp_path / "partial"
    texts = write_prompts(student, tokenizer, config, (), partial)
    lines = partial.read_text().splitlines()
    assert len(lines) > 1
    marked = lines[0].replace(texts[0], "kept")
    partial.write_text(marked + "\n" + lines[1][:10])  # killed while the second batch was written
    assert write_prompts(student, tokenizer, config, (), partial) == ["kept", *texts[1:]]
    assert partial.read_text().splitlines() == [marked, *lines[1:]]


def test_an_interrupted_run_reads_the_prompts_it_wrote(
    student: DiffusionLM, tokenizer: PreTrainedTokenizerBase, config: Config, tmp_path: Path
) -> None:
    first = self_prompts(student, tokenizer, config, tmp_path, excluded=())
    file = tmp_path / "self_prompts.jsonl"
    kept = file.read_text()
    assert json.loads(kept.splitlines()[0])["prompt"] in tokenizer.decode(first[0].ids)
    file.write_text(kept.replace("add", "sort"))
    second = self_prompts(student, tokenizer, config, tmp_path, excluded=())
    assert len(second) == NUM_PROMPTS
    assert first != second, "the file was written again"


def test_a_conversion_needs_no_prompt_file(teacher_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = tiny_overrides(teacher_folder, tmp_path, output)
    write_data(tmp_path)
    overrides = [
        *settings,
        "data.path=",
        "data.self_prompts=8",
        "data.max_prompt_tokens=60",
        "train.num_steps=1",
    ]
    folder = convert_checkpoint(load_config(None, overrides), Console(quiet=True))
    assert (folder / "config.json").is_file()
    written = (output / "self_prompts.jsonl").read_text()
    assert len(written.splitlines()) == 8
    (output / "changes.jsonl").write_text("{}\n")
    anew = ["train.resume_from_checkpoint=false", "data.self_prompts=5", "train.seed=7"]
    convert_checkpoint(load_config(None, [*overrides, *anew]), Console(quiet=True))
    others = (output / "self_prompts.jsonl").read_text()
    assert len(others.splitlines()) == 5 and others.splitlines()[0] not in written
    assert not (output / "changes.jsonl").exists()
