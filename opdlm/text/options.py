"""Questions with options: the option that a model finds likeliest, and the margin of the right one.

A `Score` is the negative log-likelihood of a continuation. All options of a question are scored with the same
random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import PreTrainedTokenizerBase

from opdlm.data.chat_template import encode_prompt
from opdlm.data.documents import PADDING, TextRow
from opdlm.data.messages import conversation_of
from opdlm.data.rows import Row
from opdlm.errors import DataError
from opdlm.evaluation.intervals import wilson
from opdlm.text.likelihood import Score


@dataclass(frozen=True, slots=True)
class Question:
    """Token ids of a prompt and of its options; `answer` is the index of the right one."""

    prompt_ids: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    answer: int

    def row(self, option: int) -> TextRow:
        """Prompt and option; one padding token follows, so that every token of the option is an input."""
        ids = torch.tensor([*self.prompt_ids, *self.options[option], 0])
        start = torch.zeros_like(ids)
        start[-1] = PADDING
        return TextRow(ids, start, torch.arange(len(ids)) < len(self.prompt_ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionReport:
    """How well options were ranked, over all questions."""

    accuracy: float
    """Share of questions whose right option has the fewest nats; a tie counts as 1 / n."""
    accuracy_interval: tuple[float, float]
    """95 %, Wilson, with the right answers rounded to a whole number."""
    accuracy_per_token: float
    """The same with nats per token of the option."""
    delta_nll: float
    """Mean of wrong minus right, in nats: positive if the right option is likelier."""
    delta_nll_per_token: float
    right_per_token: float
    """Nats per token of the right options."""
    num_questions: int


def rank_options(score: Score, questions: Sequence[Question]) -> OptionReport:
    """Score every option of every question."""
    hits, hits_per_token, deltas, deltas_per_token = [], [], [], []
    right_nats, right_tokens = 0.0, 0
    for seed, question in enumerate(questions):
        scores = [score([question.row(i)], seed) for i in range(len(question.options))]
        nats = [float(s.nats_B[0]) for s in scores]
        per_token = [s.per_token for s in scores]
        hits.append(share_of_best(nats, question.answer))
        hits_per_token.append(share_of_best(per_token, question.answer))
        deltas.append(wrong_minus_right(nats, question.answer))
        deltas_per_token.append(wrong_minus_right(per_token, question.answer))
        right_nats += nats[question.answer]
        right_tokens += len(question.options[question.answer])
    return OptionReport(
        accuracy=fmean(hits),
        accuracy_interval=wilson(round(sum(hits)), len(hits)),
        accuracy_per_token=fmean(hits_per_token),
        delta_nll=fmean(deltas),
        delta_nll_per_token=fmean(deltas_per_token),
        right_per_token=right_nats / right_tokens,
        num_questions=len(questions),
    )


def share_of_best(values: Sequence[float], answer: int) -> float:
    """1 if the answer alone has the lowest value, 1 / n if n options share it, else 0."""
    return (values[answer] == min(values)) / values.count(min(values))


def wrong_minus_right(values: Sequence[float], answer: int) -> float:
    return fmean(v for i, v in enumerate(values) if i != answer) - values[answer]


def read_questions(
    rows: Sequence[tuple[str, Row]],
    tokenizer: PreTrainedTokenizerBase,
    mask_token_id: int,
    context_length: float,
) -> list[Question]:
    """Rows with `prompt` (or `messages`), `options` (texts, with their leading space) and `answer`."""
    questions = []
    for place, row in rows:
        question = read_question(place, row, tokenizer)
        num_tokens = len(question.prompt_ids) + max(map(len, question.options))
        if num_tokens > context_length:
            raise DataError(
                f"{place} has {num_tokens} tokens of prompt and option, more than the model's context "
                f"({context_length}). Shorten or remove the row."
            )
        if any(mask_token_id in ids for ids in (question.prompt_ids, *question.options)):
            raise DataError(f"{place} contains the mask token. Remove the row.")
        questions.append(question)
    return questions


def read_question(place: str, row: Row, tokenizer: PreTrainedTokenizerBase) -> Question:
    options, answer = row.get("options"), row.get("answer")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) for o in options):
        raise DataError(f"{place}: `options` must be a list of at least two texts.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise DataError(
            f"{place}: `answer` ({answer!r}) must be the index of the right option, 0 to {len(options) - 1}."
        )
    ids = [tuple(tokenizer(option, add_special_tokens=False)["input_ids"]) for option in options]
    prompt_ids = tuple(encode_prompt(tokenizer, conversation_of(place, row)))
    if not prompt_ids or not all(ids):
        raise DataError(f"{place}: its prompt or one of its options has no token. Remove the row.")
    return Question(prompt_ids, tuple(ids), answer)
