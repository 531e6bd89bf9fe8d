"""Reading prompts: formats, chat templates, and an order that needs no saved state."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opdlm.config.sections import DataSection
from opdlm.data.prompts import PromptStream, load_prompts, load_tasks
from opdlm.decoding.rollout import Prompt
from opdlm.errors import DataError

MASK = 101
ROWS = [
    {"prompt": "add 47 38"},
    {"messages": [{"role": "user", "content": "sort b a"}, {"role": "assistant", "content": "a b"}]},
]


@pytest.fixture(scope="module")
def tokenizer(teacher_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(teacher_folder)


def write_jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "\n")
    return path


def test_prompts_and_messages_become_chat_templated_ids(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "p.jsonl")
    prompts = load_prompts(DataSection(path=str(path)), tokenizer, MASK)
    texts = [tokenizer.decode(list(prompt.ids)) for prompt in prompts]
    assert texts == ["<|user|>add 47 38<|assistant|>", "<|user|>sort b a<|assistant|>"]


def test_parquet_and_a_datasets_folder_read_the_same_prompts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": "add 1 2"}, {"prompt": "close (["}]
    parquet = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [tuple(tokenizer.encode(f"<|user|>{row['prompt']}<|assistant|>")) for row in rows]
    for path in (parquet, folder):
        prompts = load_prompts(DataSection(path=str(path)), tokenizer, MASK)
        assert [prompt.ids for prompt in prompts] == expected
    sliced = load_prompts(DataSection(path=str(folder), split="train[:1]"), tokenizer, MASK)
    assert [prompt.ids for prompt in sliced] == expected[:1]


def test_a_limit_keeps_so_many_tasks_of_each_skill(
    tokenizer: PreTrainedTokenizerBase, teacher_folder: Path
) -> None:
    tasks = load_tasks(str(teacher_folder.parent / "eval.jsonl"), tokenizer, MASK, limit=3)
    assert len(tasks) == 30
    assert sum(task.held_out for task in tasks) == 15


def test_every_pass_over_the_prompts_is_a_permutation_and_a_step_is_a_function_of_its_number() -> None:
    prompts = [Prompt(ids=(i,), index=i) for i in range(12)]
    stream = PromptStream(prompts, per_step=4, seed=3)
    passes = [[p.index for step in range(3 * e, 3 * e + 3) for p in stream.at(step)] for e in range(2)]
    assert all(sorted(order) == list(range(12)) for order in passes)
    assert passes[0] != passes[1]
    assert PromptStream(prompts, per_step=4, seed=3).at(4) == stream.at(4)


def test_a_configuration_and_a_column_of_a_dataset_are_read_by_name(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A folder as `openai/gsm8k` is laid out: two configurations, and prompts under `question`."""
    for name, question in (("main", "add 1 2"), ("socratic", "sort b a")):
        (tmp_path / name).mkdir()
        row = {"question": question, "answer": "3", "messages": []}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name / "train.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: main/*\n"
        "- config_name: socratic\n  data_files: socratic/*\n---\n"
    )
    section = DataSection(path=str(tmp_path), config="socratic", prompt_column="question")
    prompts = load_prompts(section, tokenizer, MASK)
    assert [tokenizer.decode(list(prompt.ids)) for prompt in prompts] == ["<|user|>sort b a<|assistant|>"]
    with pytest.raises(DataError, match=r"no column text .*only question, answer, messages"):
        load_prompts(replace(section, prompt_column="text"), tokenizer, MASK)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_prompts(replace(section, config=""), tokenizer, MASK)


def test_long_prompts_are_refused_or_left_out_and_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "add 1 2"}\n{"prompt": "sort a b c d e f g h i j k l m n o p"}\n')
    section = DataSection(path=str(path), max_prompt_tokens=12)
    with pytest.raises(DataError, match=r"more than data.max_prompt_tokens"):
        load_prompts(section, tokenizer, MASK)
    prompts = load_prompts(replace(section, drop_long_prompts=True), tokenizer, MASK)
    assert [prompt.index for prompt in prompts] == [0]
    assert "dropped 1 of 2 prompts" in caplog.text
    with pytest.raises(DataError, match="no prompt has at most 2 tokens"):
        load_prompts(replace(section, drop_long_prompts=True, max_prompt_tokens=2), tokenizer, MASK)


def test_thinking_is_switched_through_the_chat_template(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "p.jsonl")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{{ messages[-1]['content'] }}"
        "{% if enable_thinking is defined and enable_thinking is false %}=>{% endif %}"
    )
    texts = {}
    for value in (None, True, False):
        prompts = load_prompts(DataSection(path=str(path), enable_thinking=value), tokenizer, MASK)
        texts[value] = tokenizer.decode(list(prompts[0].ids))
    assert texts == {None: "add 47 38", True: "add 47 38", False: "add 47 38=>"}
