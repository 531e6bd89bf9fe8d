"""Prompts and evaluation tasks from JSONL, Parquet or a `datasets` name, as token ids of the chat template.

`messages` says which columns are read; `prompt_ids` (a list of token ids) beside them replaces the encoding
of the prompt. Prompts are not truncated; long prompts are an error, or are dropped and counted. An invalid
row raises a `DataError` that names file, line and fix before training.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, Generic, Literal

import torch
from transformers import PreTrainedTokenizerBase

from opdlm.config.sections import DataSection, SourceSection
from opdlm.data.chat_template import encode_prompt, unread_keys, with_date
from opdlm.data.messages import Conversation, conversation_of
from opdlm.data.rows import Item, Row, evenly_spaced, read_rows
from opdlm.decoding.rollout import Prompt
from opdlm.errors import DataError
from opdlm.files import write_atomic

Scoring = Literal["exact", "gsm8k", "math", "choice", "code"]
"""How responses are scored: `eval.scoring`, implemented in `evaluation.scoring`."""
Ids = tuple[int, ...]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One evaluation prompt with its expected answer."""

    prompt: Prompt
    text: str
    """The last message of the prompt."""
    answers: tuple[str, ...]
    """What counts as right, each of them; empty: what the teacher responds."""
    skill: str
    held_out: bool
    scoring: Scoring = "exact"

    @property
    def answer(self) -> str | tuple[str, ...] | None:
        """The answer for a report: None, one, or several."""
        return self.answers if len(self.answers) > 1 else next(iter(self.answers), None)


def encode_rows(
    rows: Sequence[tuple[str, Row]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    section: DataSection,
    mask_token_id: int,
) -> list[Prompt]:
    """Prompts of (place, row) pairs. DataError for an invalid or long prompt, or without any prompt."""
    tokenizer = with_date(tokenizer, section.date)
    prompts, num_long, num_unknown, unread = [], 0, 0, set[str]()
    for index, (place, row) in enumerate(rows):
        conversation = conversation_of(place, row, section.system_prompt, section.prompt_column)
        ids = row_ids(row, conversation, tokenizer, section.enable_thinking)
        variables = () if section.enable_thinking is None else ("enable_thinking",)
        unread |= unread_keys(tokenizer, conversation, variables)
        num_unknown += is_unknown(tokenizer, ids)
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
    if unread:
        log.warning(f"the chat template does not read {', '.join(sorted(unread))}: no prompt shows them")
    if num_unknown:
        log.warning(f"{num_unknown} of {len(rows)} prompts have characters that the tokenizer does not know")
    if num_long:
        log.warning(
            f"dropped {num_long} of {len(rows)} prompts: longer than {section.max_prompt_tokens} tokens "
            f"({section.path})"
        )
    if not prompts:
        raise DataError(
            f"no prompt of {section.path} has at most {section.max_prompt_tokens} tokens: raise "
            "data.max_prompt_tokens, or leave the source out."
        )
    return prompts


def row_ids(
    row: Row, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None
) -> list[int]:
    """`prompt_ids` of a row, else its conversation encoded."""
    ids, num_tokens = row.get("prompt_ids"), len(tokenizer)
    if not ids:
        variables = None if enable_thinking is None else {"enable_thinking": enable_thinking}
        return encode_prompt(tokenizer, conversation, variables)
    if isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < num_tokens for i in ids):
        return ids
    raise DataError(
        f"{conversation.place}: `prompt_ids` must be a list of token ids from 0 to {num_tokens - 1}."
    )


def is_unknown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether a token stands for characters that the vocabulary lacks. Some tokenizers name another special
    token `unk_token` and never need it.
    """
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return tokenizer.unk_token_id not in (None, *others) and tokenizer.unk_token_id in ids


def load_prompts(
    section: DataSection, tokenizer: PreTrainedTokenizerBase, mask_token_id: int
) -> list[Prompt]:
    """The prompts of `data.path`. DataError, which names it, for a source without any."""
    prompts, num_rows = list[Prompt](), 0
    for number, source in enumerate(sections_of_sources(section)):
        rows = load_rows(source)
        encoded = encode_rows(rows, tokenizer, section=source, mask_token_id=mask_token_id)
        prompts += [replace(p, index=num_rows + p.index, source=number) for p in encoded]
        num_rows += len(rows)
    return prompts


def sources_of(section: DataSection) -> list[SourceSection]:
    """The entries of `data.path` if one is a mapping, and the self-prompts; else none: all is one source."""
    if isinstance(section.path, str) or all(isinstance(entry, str) for entry in section.path):
        return []
    sources = [SourceSection(path=e) if isinstance(e, str) else e for e in section.path]
    return [*sources, SourceSection(path="data.self_prompts")] if section.self_prompts else sources


def sections_of_sources(section: DataSection) -> list[DataSection]:
    """The data section of each source of `data.path`: what a source leaves open is that of all."""
    sources = [asdict(source) for source in sources_of(replace(section, self_prompts=0))]
    given = [{k: v for k, v in s.items() if v is not None and k != "weight"} for s in sources]
    return [replace(section, **values) for values in given] or [section]


def weighted_sources(prompts: Sequence[Prompt], section: DataSection) -> list[tuple[float, list[Prompt]]]:
    """(weight, prompts) of each source if one has a weight, else none. DataError for one without prompts."""
    sources = sources_of(section)
    if all(source.weight is None for source in sources):
        return []
    groups = [[prompt for prompt in prompts if prompt.source == i] for i in range(len(sources))]
    for source, group in zip(sources, groups, strict=True):
        if not group:
            raise DataError(
                f"data.path ({source.path}) has a weight, but no prompts are left beside the held-back ones: "
                "give more, leave the source out, or set eval.held_back=0."
            )
    return [(source.weight or 1.0, group) for source, group in zip(sources, groups, strict=True)]


def count_prompts(prompts: Sequence[Prompt], section: DataSection) -> str:
    """How many prompts there are, and how many are from each of several sources."""
    sources, numbers = sources_of(section), Counter(prompt.source for prompt in prompts)
    names = [" ".join(filter(None, (source.path, source.config, source.split))) for source in sources]
    parts = [f"{numbers[i]} of {name}" for i, name in enumerate(names)]
    total = f"{len(prompts)} prompts ({len({prompt.ids for prompt in prompts})} distinct)"
    return f"{total}: {', '.join(parts)}" if parts else total


def load_rows(section: DataSection) -> list[tuple[str, Row]]:
    """The (place, row) pairs of `data.path`; DataError if there are none."""
    paths = (section.path,) if isinstance(section.path, str) else section.path
    if not all(paths):
        raise DataError(
            "data.path is empty: conversion needs prompts. Give a .jsonl or .parquet file or a dataset, or "
            "let the model write them: data.self_prompts=4000."
        )
    rows = [row for path in paths for row in read_rows(str(path), section.split, section.config)]
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
    date: str = "",
    scoring: Scoring = "exact",
) -> list[Task]:
    """Evaluation tasks, at most `limit` of each skill. DataError for an invalid row."""
    rows = read_rows(path)
    if not rows:
        raise DataError(f"eval.path ({path}) holds no rows.")
    if scoring == "gsm8k":
        rows = [(place, gsm8k_row(place, row)) for place, row in rows]
    section = DataSection(max_prompt_tokens=10**9, enable_thinking=enable_thinking, date=date)
    prompts = encode_rows(rows, tokenizer, section=section, mask_token_id=mask_token_id)
    tasks, counts = [], dict[str, int]()
    for prompt, (place, row) in zip(prompts, rows, strict=True):
        skill = str(row.get("skill", "all"))
        counts[skill] = counts.get(skill, 0) + 1
        if limit is not None and counts[skill] > limit:
            continue
        tasks.append(
            Task(
                prompt=prompt,
                text=conversation_of(place, row).last_text,
                answers=read_answers(place, row.get("answer"), scoring),
                skill=skill,
                held_out=bool(row.get("held_out", False)),
                scoring=scoring,
            )
        )
    return tasks


def read_answers(place: str, answer: Any, scoring: Scoring) -> tuple[str, ...]:
    """The accepted answers: none, one, or each of a list."""
    answers = answer if isinstance(answer, list) else [] if answer is None else [answer]
    if answer == [] or not all(isinstance(item, str | int | float) for item in answers):
        raise DataError(f"{place}: `answer` must be a text, a number, or a list of at least one of them.")
    if scoring == "code" and len(answers) > 1:
        raise DataError(f"{place}: `answer` must be one text with all tests (eval.scoring=code), not a list.")
    return tuple(map(str, answers))


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
    chosen = evenly_spaced(distinct, count) if count else distinct[:number]
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

    `sources`: (weight, items) of each source that has epochs of its own; none: all are one.
    """

    def __init__(
        self,
        prompts: Sequence[Item],
        per_step: int,
        seed: int,
        sources: Sequence[tuple[float, Sequence[Item]]] = (),
    ) -> None:
        self.prompts, self.per_step, self.seed = prompts, per_step, seed
        self.sources = sources or [(1.0, prompts)]
        self._orders = dict[int, tuple[int, list[int]]]()
        self._next_step = 0
        self._draws = self._all_draws()

    def at(self, step: int) -> list[Item]:
        """The items of rollout step `step` (0-based)."""
        if step < self._next_step:
            self._next_step, self._draws = 0, self._all_draws()
        first = (step - self._next_step) * self.per_step
        self._next_step = step + 1
        return [self._item(*draw) for draw in islice(self._draws, first, first + self.per_step)]

    def _all_draws(self) -> Iterator[tuple[int, int]]:
        return draw_sources([weight for weight, _ in self.sources])

    def _item(self, source: int, number: int) -> Item:
        items = self.sources[source][1]
        epoch, place = divmod(number, len(items))
        if self._orders.get(source, (-1, []))[0] != epoch:
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + source * 10**9)
            self._orders[source] = epoch, torch.randperm(len(items), generator=rng).tolist()
        return items[self._orders[source][1][place]]


def draw_sources(weights: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Endless pairs (source, how often it was drawn before): of the first n, source k has n w_k, less than 1
    more or less, where w are the weights divided by their sum.

    Draw j of a source is released at j / w and due before (j + 1) / w; the earliest deadline goes first (Liu
    and Layland 1973), which meets all of them.
    """
    shares, counts = [weight / sum(weights) for weight in weights], [0] * len(weights)
    for n in count(1):
        released = [k for k, share in enumerate(shares) if counts[k] < n * share]
        source = min(released, key=lambda k: (counts[k] + 1) / shares[k])
        yield source, counts[source]
        counts[source] += 1
