"""Reading prompts: formats, chat templates, and an order that needs no saved state."""

import copy
import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opdlm.config.sections import DataSection, SourceSection
from opdlm.data.prompts import (
    PromptStream,
    count_prompts,
    draw_sources,
    load_prompts,
    load_tasks,
    weighted_sources,
)
from opdlm.data.rows import evenly_spaced
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


def test_without_weights_an_epoch_has_the_order_that_torch_draws_for_seed_and_epoch() -> None:
    items, order = list(range(7)), []
    for epoch in range(5):
        order += torch.randperm(7, generator=torch.Generator().manual_seed(4 * 1_000_003 + epoch)).tolist()
    stream = PromptStream(items, per_step=5, seed=4)
    assert [item for step in range(7) for item in stream.at(step)] == order


@given(st.lists(st.floats(1e-4, 1e3) | st.integers(1, 5), min_size=1, max_size=9))
def test_at_any_time_every_source_had_its_share_of_the_draws_within_one(weights: list[float]) -> None:
    counts = [0] * len(weights)
    for n, (source, before) in enumerate(islice(draw_sources(weights), 300), 1):
        assert before == counts[source]
        counts[source] += 1
        for k, weight in enumerate(weights):
            assert abs(counts[k] - n * weight / sum(weights)) < 1 + 1e-9


def test_weighted_sources_have_epochs_of_their_own_in_steps_that_depend_on_their_number_alone() -> None:
    sources = [(3, ["a", "b", "c"]), (0.5, ["d", "e", "f", "g"]), (0.5, ["h"])]
    items = [item for _, group in sources for item in group]
    stream = PromptStream(items, per_step=4, seed=0, sources=sources)
    steps = [stream.at(step) for step in range(16)]
    assert [sum(item in "abc" for item in step) for step in steps] == [3] * 16
    drawn = [item for step in steps for item in step]
    for _, group in sources:
        own = [item for item in drawn if item in group]
        epochs = [own[i : i + len(group)] for i in range(0, len(own) - len(group) + 1, len(group))]
        assert all(sorted(epoch) == group for epoch in epochs) and len(epochs) > 1
    for step in (9, 3, 15):
        assert PromptStream(items, 4, 0, sources).at(step) == stream.at(step) == steps[step]
    assert [PromptStream(items, 4, 1, sources).at(step) for step in range(16)] != steps


def write_prompts(path: Path, *prompts: str, column: str = "prompt") -> str:
    path.write_text("".join(json.dumps({column: prompt}) + "\n" for prompt in prompts))
    return str(path)


def test_a_source_has_its_own_weight_column_split_and_limit_and_leaves_the_rest_to_the_section(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    folder = str(tmp_path / "set")
    write_prompts(tmp_path / "set" / "train.jsonl", "sort a b", "sort b a", "sort b b", column="question")
    a = write_prompts(tmp_path / "a.jsonl", "add 1 2", "add 3 4", "add 5 6")
    b = write_prompts(tmp_path / "b.jsonl", "close (", "close [")
    chosen = SourceSection(path=folder, weight=2, split="train[1:]", prompt_column="question", limit=1)
    section = DataSection(path=(a, chosen, b), limit=2)
    prompts = load_prompts(section, tokenizer, MASK)
    texts = [tokenizer.decode(list(p.ids)).removeprefix("<|user|>").split("<")[0] for p in prompts]
    assert texts == ["add 1 2", "add 3 4", "sort b a", "close (", "close ["]
    assert [p.index for p in prompts] == list(range(5))
    assert [p.source for p in prompts] == [0, 0, 1, 2, 2]
    assert [(weight, len(group)) for weight, group in weighted_sources(prompts, section)] == [
        (1, 2), (2, 1), (1, 2)
    ]  # fmt: skip
    counts = f"5 prompts (5 distinct): 2 of {a}, 1 of {folder} train[1:], 2 of {b}"
    assert count_prompts(prompts, section) == counts
    with pytest.raises(DataError, match=rf"{b}.* has a weight, but no prompts are left"):
        weighted_sources(prompts[:3], section)


def test_sources_without_weights_and_a_list_of_paths_are_the_same_prompts_in_the_same_order(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    a = write_prompts(tmp_path / "a.jsonl", "add 1 2", "add 3 4", "add 5 6")
    b = write_prompts(tmp_path / "b.jsonl", "close (", "close [")
    plain = DataSection(path=(a, b))
    mapped = DataSection(path=(SourceSection(path=a), b))
    prompts = [load_prompts(section, tokenizer, MASK) for section in (plain, mapped)]
    assert [[p.ids for p in ps] for ps in prompts] == [[p.ids for p in prompts[0]]] * 2
    assert weighted_sources(prompts[0], plain) == weighted_sources(prompts[1], mapped) == []
    assert Counter(p.source for p in prompts[1]) == {0: 3, 1: 2}
    assert len(load_prompts(replace(plain, limit=2), tokenizer, MASK)) == 2, "of the whole list"
    assert len(load_prompts(replace(mapped, limit=2), tokenizer, MASK)) == 4, "of each source"


def test_a_source_without_prompts_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    a = write_prompts(tmp_path / "a.jsonl", "add 1 2")
    empty, long = write_prompts(tmp_path / "b.jsonl"), write_prompts(tmp_path / "c.jsonl", "add 1 2" * 9)
    with pytest.raises(DataError, match=rf"data.path \({empty}\) holds no rows"):
        load_prompts(DataSection(path=(a, SourceSection(path=empty))), tokenizer, MASK)
    section = DataSection(path=(a, SourceSection(path=long)), max_prompt_tokens=20, drop_long_prompts=True)
    with pytest.raises(DataError, match=f"no prompt of {long} has at most 20 tokens"):
        load_prompts(section, tokenizer, MASK)


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
    with pytest.raises(DataError, match=r"no prompt of .*p.jsonl has at most 2 tokens"):
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


def test_prompts_are_evenly_spaced() -> None:
    assert evenly_spaced(range(40), 4) == [0, 10, 20, 30]
    assert evenly_spaced(range(24), 16) == [i * 3 // 2 for i in range(16)]
    assert evenly_spaced(range(3), 16) == [0, 1, 2] and evenly_spaced([], 4) == []
