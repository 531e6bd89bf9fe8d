"""Text as rows of tokens: documents are concatenated and cut (chunks), or packed without cuts (whole).

A row has one token more than the model reads, so that the last input has a next token. Every epoch shuffles
and cuts the documents anew; row r of a run is a function of (seed, r) alone. Not here: masks and objectives.

Shape suffixes: B rows, L inputs of a row, R one more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlm.config.text import TextSection
from opdlm.data.chat_template import encode_prompt, token_ids, with_date
from opdlm.data.messages import PROMPT_COLUMNS, conversation_of, read_messages
from opdlm.data.rows import Row, check_text, evenly_spaced, read_rows
from opdlm.errors import DataError
from opdlm.seeds import Stream, generator_for

UNWRITTEN = ("tool_calls", "reasoning_content", "thinking")
"""Keys of a message that belong to its response and are not in its content."""
PADDING = -1
"""`start` of a padding token."""


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids that end with a stop token. The first `num_prompt` belong to a prompt and carry no loss."""

    ids: tuple[int, ...]
    num_prompt: int = 0


@dataclass(frozen=True, slots=True)
class TextRow:
    """Pieces of documents, concatenated."""

    ids_R: Tensor
    start_R: Tensor
    """Column at which the piece of the token starts; PADDING after the last piece."""
    is_given_R: Tensor
    """Whether the token belongs to a prompt."""


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows as tensors, with the fields of `TextRow`."""

    ids_BR: Tensor
    start_BR: Tensor
    is_given_BR: Tensor

    @classmethod
    def of(cls, rows: Sequence[TextRow]) -> RowBatch:
        """Stack rows."""
        fields = ("ids_R", "start_R", "is_given_R")
        return cls(*(torch.stack([getattr(row, field) for row in rows]) for field in fields))

    def pick(self, index: Tensor) -> RowBatch:
        """Some of the rows."""
        return RowBatch(self.ids_BR[index], self.start_BR[index], self.is_given_BR[index])

    @property
    def is_text_BL(self) -> Tensor:
        """Inputs that are not padding."""
        return self.start_BR[:, :-1] != PADDING

    @property
    def is_learnt_BR(self) -> Tensor:
        """Tokens of responses, or of plain text."""
        return (self.start_BR != PADDING) & ~self.is_given_BR

    @property
    def follows_BL(self) -> Tensor:
        """Inputs whose next token belongs to the same piece and is learnt."""
        return (self.start_BR[:, 1:] == self.start_BR[:, :-1]) & self.is_learnt_BR[:, 1:]


def load_documents(
    section: TextSection,
    tokenizer: PreTrainedTokenizerBase,
    mask_token_id: int,
    key: str = "data.path",
) -> list[Document]:
    """Documents of `section.path`, the setting `key`. DataError names file and line of an invalid row."""
    paths = (section.path,) if isinstance(section.path, str) else section.path
    if not paths or not all(paths):
        raise DataError(f"{key} is empty: give a .jsonl or .parquet file, or the name of a dataset.")
    tokenizer = with_date(tokenizer, section.date)
    documents = []
    for place, row in itertools.chain.from_iterable(
        read_rows(path, section.split, section.config) for path in paths
    ):
        documents.append(read_document(place, row, tokenizer, section.text_column))
        if mask_token_id in documents[-1].ids:
            raise DataError(f"{place} contains the mask token. Remove it or set another format.mask_token.")
    if not documents:
        raise DataError(f"{key} ({section.path}) holds no rows. Give at least one text.")
    return documents


def read_document(place: str, row: Row, tokenizer: PreTrainedTokenizerBase, column: str) -> Document:
    """The document of a row with text, with prompt and response, or with messages."""
    text, prompt = (row[column], []) if column in row else read_pair(place, row, tokenizer, column)
    if not isinstance(text, str) or not text:
        raise DataError(f"{place}: its text is empty or not text ({text!r:.40}). Remove the row.")
    ids = token_ids(tokenizer, check_text(place, text), is_rendered=bool(prompt))
    stop = tokenizer.eos_token_id
    if stop is not None and (not ids or ids[-1] != stop):
        ids = [*ids, stop]
    return Document((*prompt, *ids), len(prompt))


def read_pair(place: str, row: Row, tokenizer: PreTrainedTokenizerBase, column: str) -> tuple[Any, list[int]]:
    """The response of a row, and the token ids of its prompt."""
    if any(row.get(name) is not None for name in PROMPT_COLUMNS):
        conversation = conversation_of(place, row)
        if conversation.response is not None:
            return response_text(place, conversation.response), encode_prompt(tokenizer, conversation)
        if row.get("messages") is not None:
            raise DataError(f"{place}: `messages` must end with the assistant's, which is trained on.")
    raise DataError(
        f"{place} has neither `{column}`, nor `prompt` and `response`, nor `messages` (found: "
        f"{', '.join(row) or 'nothing'}). Set data.text_column or rename a column."
    )


def response_text(place: str, response: Any) -> Any:
    """The text of a response, which may be a message or a list of one."""
    if isinstance(response, list):
        messages = read_messages(place, "completion", response)
        response = messages[0] if len(messages) == 1 else None
    if not isinstance(response, dict):
        return response
    lost = [key for key in UNWRITTEN if response.get(key)]
    if lost:
        raise DataError(
            f"{place}: its response has {', '.join(lost)}, and only its content is trained on: write them "
            "into the content, or remove the row."
        )
    return response.get("content")


def keep_tokens(documents: Sequence[Document], num_tokens: int, seed: int) -> list[Document]:
    """The first `num_tokens` tokens of the shuffled documents. The last document is cut."""
    order = torch.randperm(len(documents), generator=generator_for(seed, Stream.UNIQUE_TOKENS)).tolist()
    kept, left = list[Document](), num_tokens
    for index in order:
        document = documents[index]
        kept.append(Document(document.ids[:left], document.num_prompt))
        left -= len(kept[-1].ids)
        if left == 0:
            return kept
    raise DataError(
        f"data.unique_tokens ({num_tokens}) exceeds the {num_tokens - left} tokens of data.path: lower it."
    )


class PackedDataset:
    """An endless sequence of rows; row r depends on (seed, r) alone, so resuming needs no state."""

    def __init__(
        self, documents: Sequence[Document], section: TextSection, seed: int, key: str = "data.path"
    ) -> None:
        self.documents, self.seed = documents, seed
        self.length, self.is_masked = section.sequence_length, section.document_mask
        self.num_tokens = sum(len(document.ids) for document in documents)
        self._bins = fill_bins(documents, self.length + 1, key) if section.packing == "whole" else None
        if self._bins is None and self.num_tokens <= self.length:
            raise DataError(
                f"{key} holds {self.num_tokens} tokens, fewer than one row of data.sequence_length "
                f"({self.length}) and the token after it: shorten the rows."
            )
        self._epoch, self._rows = -1, list[TextRow]()

    @property
    def per_epoch(self) -> int:
        """Rows of an epoch."""
        return (self.num_tokens - 1) // self.length if self._bins is None else len(self._bins)

    def at(self, index: int) -> TextRow:
        """Row `index` of the run."""
        epoch, number = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._rows = (
                epoch,
                list(self._cut(generator_for(self.seed, Stream.DOCUMENT_ORDER, epoch))),
            )
        return self._rows[number]

    def evenly(self, limit: int) -> list[TextRow]:
        """At most `limit` rows of the first epoch, evenly spaced."""
        return [self.at(number) for number in evenly_spaced(range(self.per_epoch), limit)]

    def _cut(self, rng: torch.Generator) -> Iterator[TextRow]:
        """The rows of one epoch."""
        if self._bins is not None:
            for number in torch.randperm(len(self._bins), generator=rng).tolist():
                yield self._row([self.documents[i] for i in self._bins[number]])
            return
        order = torch.randperm(len(self.documents), generator=rng).tolist()
        whole = self._row([self.documents[i] for i in order])
        for first in range(0, self.per_epoch * self.length, self.length):
            columns = slice(first, first + self.length + 1)
            start_R = (whole.start_R[columns] - first).clamp_min(0)
            yield TextRow(whole.ids_R[columns], start_R, whole.is_given_R[columns])

    def _row(self, documents: Sequence[Document]) -> TextRow:
        """Concatenated documents, padded to a row if they are shorter."""
        ids = torch.tensor([i for document in documents for i in document.ids])
        lengths = torch.tensor([len(document.ids) for document in documents])
        first = lengths.cumsum(0) - lengths if self.is_masked else torch.zeros_like(lengths)
        start = first.repeat_interleave(lengths)
        given = [i < document.num_prompt for document in documents for i in range(len(document.ids))]
        rest = max(0, self.length + 1 - len(ids))
        pad = torch.nn.functional.pad
        return TextRow(
            pad(ids, (0, rest)), pad(start, (0, rest), value=PADDING), pad(torch.tensor(given), (0, rest))
        )


def fill_bins(documents: Sequence[Document], capacity: int, key: str = "data.path") -> list[list[int]]:
    """Indices of the documents in each row, in order; DataError if a document exceeds a row."""
    bins, free = list[list[int]](), 0
    for index, document in enumerate(documents):
        size = len(document.ids)
        if size > capacity:
            raise DataError(
                f"a document of {key} has {size} tokens, and data.packing=whole cuts none: set "
                f"data.sequence_length ({capacity - 1}) to at least {size - 1}, or data.packing=chunks."
            )
        if size > free:
            bins.append([])
            free = capacity
        bins[-1].append(index)
        free -= size
    return bins
