"""Prompts and evaluation tasks from JSONL, Parquet or a `datasets` name, as token ids of the chat template.

Rows need `prompt` (text), another column that `data.prompt_column` names, or `messages` (a list of
role/content); `prompt_ids` (a list of token ids) beside the text replaces its encoding. Prompts are not
truncated; long prompts are an error, or are dropped and counted. Without a chat template the prompt is
encoded as it is. An invalid row raises a `DataError` that names file, line and fix before training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from opdlm.config.sections import DataSection, resolve_path
from opdlm.decoding.rollout import Prompt
from opdlm.errors import DataError
from opdlm.files import write_atomic

Row = dict[str, Any]
Scoring = Literal["exact", "gsm8k", "math", "choice", "code"]
"""How responses are scored: `eval.scoring`, implemented in `evaluation.scoring`."""
Item = TypeVar("Item")
Ids = tuple[int, ...]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One evaluation prompt with its expected answer."""

    prompt: Prompt
    text: str
    """The last message of the prompt."""
    answer: str | None
    skill: str
    held_out: bool
    scoring: Scoring = "exact"


def read_rows(path: str, split: str = "train", config: str = "") -> list[tuple[str, Row]]:
    """(place, row) pairs, where `place` names file and line; DataError if they cannot be read."""
    file = Path(resolve_path(path))
    if file.suffix == ".jsonl":
        return read_jsonl(file)
    if file.suffix == ".parquet":
        return read_parquet(file)
    if file.is_file() or (file.suffix and not file.is_dir()):
        raise DataError(f"data.path ({path}) must be a .jsonl or .parquet file, or the name of a dataset.")
    return read_dataset(path, split, config)


def read_jsonl(file: Path) -> list[tuple[str, Row]]:
    """The objects of a JSONL file; empty lines are skipped."""
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist. Give a JSONL file with one prompt per line.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}:{number} is not valid JSON ({error.msg}). Fix or remove the line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number} must be a JSON object, not {type(row).__name__}.")
        rows.append((f"{file}:{number}", row))
    return rows


def read_parquet(file: Path) -> list[tuple[str, Row]]:
    """The rows of a Parquet file."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error
    return [(f"{file} row {i}", row) for i, row in enumerate(table.to_pylist())]


def read_dataset(name: str, split: str, config: str) -> list[tuple[str, Row]]:
    """The rows of a data set that `datasets` loads."""
    import datasets

    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise DataError(
            f"data.path ({name}), split {split}, cannot be loaded by `datasets`: {first}"
        ) from error
    return [(f"{name} row {i}", row) for i, row in enumerate(loaded)]


def messages_of(place: str, row: Row, system_prompt: str, column: str = "") -> list[dict[str, str]]:
    """The messages before the response. `column`: the column with the prompt's text, instead of `messages` or
    `prompt`.

    DataError if the row is invalid.
    """
    if "messages" in row and not column:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(is_message(m) for m in messages):
            raise DataError(
                f"{place}: `messages` must be a list of objects with `role` and `content`, both text."
            )
        if messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]  # the response
    elif (name := column or "prompt") in row:
        if not isinstance(row[name], str):
            raise DataError(f"{place}: `{name}` must be text, not {type(row[name]).__name__}.")
        messages = [{"role": "user", "content": row[name]}]
    elif column:
        raise DataError(
            f"{place} has no column {column} (data.prompt_column), only {', '.join(row) or 'nothing'}."
        )
    else:
        raise DataError(
            f"{place} has neither `prompt` nor `messages` (found: {', '.join(row) or 'nothing'})."
        )
    if not messages or not str(messages[-1]["content"]).strip():
        raise DataError(f"{place} has an empty prompt. Remove the row.")
    return ([{"role": "system", "content": system_prompt}] if system_prompt else []) + messages


def is_message(value: Any) -> bool:
    """Whether a value is an object with `role` and `content`, both text."""
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], enable_thinking: bool | None = None
) -> list[int]:
    """Token ids up to the start of the response; `enable_thinking` is for the chat template."""
    if tokenizer.chat_template:
        options: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **options
        )
        return list(ids)
    return list(tokenizer(messages[-1]["content"])["input_ids"])


def encode_rows(
    rows: Sequence[tuple[str, Row]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    section: DataSection,
    mask_token_id: int,
) -> list[Prompt]:
    """Prompts of (place, row) pairs. DataError for an invalid or long prompt, or without any prompt."""
    prompts, num_long = [], 0
    for index, (place, row) in enumerate(rows):
        messages = messages_of(place, row, section.system_prompt, section.prompt_column)
        ids = row.get("prompt_ids") or encode_prompt(tokenizer, messages, section.enable_thinking)
        if len(ids) > section.max_prompt_tokens:
            if section.drop_long_prompts:
                num_long += 1
                continue
            raise DataError(
                f"{place} has {len(ids)} prompt tokens, more than data.max_prompt_tokens "
                f"({section.max_prompt_tokens}). Raise the limit (up to the model's context), remove the "
                "row, or set data.drop_long_prompts=true."
            )
        if not ids:
            raise DataError(f"{place} has a prompt without any token. Remove the row.")
        if mask_token_id in ids:
            raise DataError(f"{place} contains the mask token. Remove it or set another format.mask_token.")
        prompts.append(Prompt(ids=tuple(ids), index=index))
    if num_long:
        log.warning(
            f"dropped {num_long} of {len(rows)} prompts: longer than {section.max_prompt_tokens} tokens"
        )
    if not prompts:
        raise DataError(
            f"no prompt has at most {section.max_prompt_tokens} tokens: raise data.max_prompt_tokens."
        )
    return prompts


def load_prompts(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, mask_token_id: int
) -> list[Prompt]:
    """The prompts of `data.path`."""
    return encode_rows(load_rows(section), tokenizer, section=section, mask_token_id=mask_token_id)


def load_rows(section: DataSection) -> list[tuple[str, Row]]:
    """The (place, row) pairs of `data.path`; DataError if there are none."""
    paths = (section.path,) if isinstance(section.path, str) else section.path
    if not all(paths):
        raise DataError(
            "data.path is empty: conversion needs prompts. Give a .jsonl or .parquet file or a dataset, or "
            "let the model write them: data.self_prompts=4000."
        )
    rows = [row for path in paths for row in read_rows(path, section.split, section.config)]
    rows = rows[: section.limit]
    if not rows:
        raise DataError(f"data.path ({section.path}) holds no rows. Give at least one prompt.")
    return rows


def load_tasks(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    mask_token_id: int,
    *,
    limit: int | None = None,
    enable_thinking: bool | None = None,
    scoring: Scoring = "exact",
) -> list[Task]:
    """Evaluation tasks, at most `limit` of each skill. DataError for an invalid row."""
    rows = read_rows(path)
    if not rows:
        raise DataError(f"eval.path ({path}) holds no rows.")
    if scoring == "gsm8k":
        rows = [(place, gsm8k_row(place, row)) for place, row in rows]
    section = DataSection(max_prompt_tokens=10**9, enable_thinking=enable_thinking)
    prompts = encode_rows(rows, tokenizer, section=section, mask_token_id=mask_token_id)
    tasks, counts = [], dict[str, int]()
    for prompt, (place, row) in zip(prompts, rows, strict=True):
        skill = str(row.get("skill", "all"))
        counts[skill] = counts.get(skill, 0) + 1
        if limit is not None and counts[skill] > limit:
            continue
        answer = row.get("answer")
        tasks.append(
            Task(
                prompt=prompt,
                text=str(messages_of(place, row, "")[-1]["content"]),
                answer=None if answer is None else str(answer),
                skill=skill,
                held_out=bool(row.get("held_out", False)),
                scoring=scoring,
            )
        )
    return tasks


def gsm8k_row(place: str, row: Row) -> Row:
    """A row of GSM8K with the zero-shot prompt of lm-evaluation-harness."""
    if not isinstance(row.get("question"), str) or "#### " not in str(row.get("answer")):
        raise DataError(
            f"{place}: eval.scoring=gsm8k needs `question` and an `answer` that ends in `#### number`. "
            "Give a file of GSM8K, or set eval.scoring=exact."
        )
    return {"prompt": f"Question: {row['question']}\nAnswer:", "answer": row["answer"], "skill": "gsm8k"}


def hold_back(
    items: Sequence[Item], ids_of: Callable[[Item], Ids], number: int
) -> tuple[list[Item], list[Ids]]:
    """Items without those of `number` distinct prompts, evenly spaced, and these prompts. `ids_of`: the token
    ids of an item's prompt.

    At most an eighth of the prompts is held back. Of fewer than 8 none is: then the prompts are those of the
    items, and all items stay.
    """
    distinct = list(dict.fromkeys(map(ids_of, items)))
    count = min(number, len(distinct) // 8)
    chosen = [distinct[i * len(distinct) // count] for i in range(count)] if count else distinct[:number]
    held_back = set(chosen) if count else set()
    return [item for item in items if ids_of(item) not in held_back], chosen


def write_prompt_ids(path: Path, prompts: Sequence[Ids], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write prompts so that `load_tasks` reads the same ids."""
    lines = (
        json.dumps({"prompt": str(tokenizer.decode(list(ids), skip_special_tokens=True)), "prompt_ids": ids})
        for ids in prompts
    )
    write_atomic(path, "".join(f"{line}\n" for line in lines))


class PromptStream(Generic[Item]):
    """An endless sequence of shuffled epochs over prompts or recorded rollouts. The items of a step depend on
    (seed, step) alone, so resuming needs no state.
    """

    def __init__(self, prompts: Sequence[Item], per_step: int, seed: int) -> None:
        self.prompts, self.per_step, self.seed = prompts, per_step, seed
        self._epoch, self._permutation = -1, list[int]()

    def at(self, step: int) -> list[Item]:
        """The items of rollout step `step` (0-based)."""
        first = step * self.per_step
        return [self._item(i) for i in range(first, first + self.per_step)]

    def _item(self, index: int) -> Item:
        epoch, number = divmod(index, len(self.prompts))
        return self.prompts[self._order(epoch)[number]]

    def _order(self, epoch: int) -> list[int]:
        if self._epoch != epoch:
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(len(self.prompts), generator=rng).tolist()
        return self._permutation
