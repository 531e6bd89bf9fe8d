"""Reading prompts: formats, chat templates, and an order that needs no saved state."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opdlm.config import DataSection
from opdlm.data import PromptStream, load_prompts, load_tasks
from opdlm.records import Prompt

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
