"""Given text as rows: nothing lost, nothing twice, documents apart, and every bad row named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import tiny_tokenizer, write_rows

from opdlm.config.text import TextSection
from opdlm.data.documents import (
    PADDING,
    Document,
    PackedDataset,
    RowBatch,
    TextRow,
    fill_bins,
    keep_tokens,
    load_documents,
)
from opdlm.errors import DataError

MASK, STOP = 63, 1
LENGTHS = (5, 1, 12, 3, 7, 2, 9)
"""With rows of 6: documents longer than a row, and a document of one token."""


def numbered(lengths: tuple[int, ...] = LENGTHS, num_prompt: int = 0) -> list[Document]:
    """Documents of which no two tokens are the same: 100 * document + place."""
    return [
        Document(tuple(100 * (d + 1) + i for i in range(n)), min(num_prompt, n - 1))
        for d, n in enumerate(lengths)
    ]


def make_rows(documents: list[Document], *, seed: int = 0, length: int = 6, **changes: Any) -> PackedDataset:
    return PackedDataset(documents, TextSection(sequence_length=length, **changes), seed)


def pieces_of(row: TextRow) -> list[list[int]]:
    """Runs of tokens with the same start, in order."""
    starts = [start for start in dict.fromkeys(row.start_R.tolist()) if start != PADDING]
    return [row.ids_R[row.start_R == start].tolist() for start in starts]


def load(tmp_path: Path, *rows: dict[str, Any], tokenizer: Any = None, **changes: Any) -> list[Document]:
    path = write_rows(tmp_path / "text.jsonl", rows)
    section = TextSection(path=str(path), **changes)
    return load_documents(section, tokenizer or tiny_tokenizer(), MASK)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_chunks_show_every_token_once_per_epoch_as_an_input(epoch: int) -> None:
    rows = make_rows(numbered())
    inputs: list[int] = []
    for place in range(rows.per_epoch):
        row = rows.at(epoch * rows.per_epoch + place)
        assert len(row.ids_R) == 7 and (row.start_R != PADDING).all()
        inputs += row.ids_R[:-1].tolist()
    assert len(set(inputs)) == len(inputs) == rows.per_epoch * 6
    everything = {i for document in numbered() for i in document.ids}
    assert set(inputs) <= everything and len(everything) - len(inputs) <= 6


def test_a_row_ends_with_the_token_that_the_next_one_starts_with() -> None:
    rows = make_rows(numbered())
    for place in range(rows.per_epoch - 1):
        assert rows.at(place).ids_R[-1] == rows.at(place + 1).ids_R[0]


def test_starts_mark_pieces_of_single_documents_also_where_one_is_cut() -> None:
    rows = make_rows(numbered())
    cut = 0
    for place in range(rows.per_epoch):
        row = rows.at(place)
        for start, piece in zip(dict.fromkeys(row.start_R.tolist()), pieces_of(row), strict=True):
            first = row.ids_R.tolist().index(piece[0])
            assert start == first  # the column at which it starts
            assert piece == list(range(piece[0], piece[0] + len(piece)))  # one document, nothing left out
            cut += start == 0 and piece[0] % 100 != 0
    assert cut


def test_without_a_document_mask_a_row_is_one_piece() -> None:
    rows = make_rows(numbered(), document_mask=False)
    assert all((rows.at(place).start_R == 0).all() for place in range(rows.per_epoch))
    padded = make_rows(numbered((2, 3)), document_mask=False, packing="whole").at(0)
    assert padded.start_R.tolist() == [0] * 5 + [PADDING] * 2


@pytest.mark.parametrize("packing", ["chunks", "whole"])
def test_a_row_depends_on_seed_and_number_alone(packing: Any) -> None:
    def ids(rows: PackedDataset, number: int) -> list[int]:
        return rows.at(number).ids_R.tolist()

    rows = make_rows(numbered(), packing=packing, length=12)
    numbers = list(range(2 * rows.per_epoch))
    forwards = [ids(rows, number) for number in numbers]
    again = make_rows(numbered(), packing=packing, length=12)
    assert [ids(again, number) for number in reversed(numbers)] == forwards[::-1]
    other = make_rows(numbered(), packing=packing, length=12, seed=1)
    assert [ids(other, number) for number in numbers] != forwards


def test_every_epoch_shuffles_and_cuts_anew() -> None:
    rows = make_rows(numbered())
    epochs = [
        [tuple(rows.at(epoch * rows.per_epoch + i).ids_R.tolist()) for i in range(rows.per_epoch)]
        for epoch in range(3)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert set(epochs[0]) != set(epochs[1])  # not the same rows in another order
    whole = make_rows(numbered((2, 3, 4, 3, 5)), packing="whole")
    orders = [[tuple(whole.at(e * whole.per_epoch + i).ids_R.tolist()) for i in range(3)] for e in range(6)]
    assert len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_whole_packing_cuts_nothing_and_pads() -> None:
    documents = numbered((5, 1, 7, 3, 4, 2, 6))
    rows = make_rows(documents, packing="whole")
    found = [rows.at(place) for place in range(rows.per_epoch)]
    pieces = [tuple(piece) for row in found for piece in pieces_of(row)]
    assert sorted(pieces) == sorted(document.ids for document in documents)
    for row in found:
        num_tokens = sum(len(piece) for piece in pieces_of(row))
        assert len(row.ids_R) == 7
        assert (row.start_R[num_tokens:] == PADDING).all() and (row.ids_R[num_tokens:] == 0).all()
        assert not row.is_given_R[num_tokens:].any()


def test_bins_hold_as_many_neighbours_as_fit() -> None:
    assert fill_bins(numbered((5, 1, 7, 3, 4, 2, 6)), 7) == [[0, 1], [2], [3, 4], [5], [6]]
    with pytest.raises(DataError, match=r"has 8 tokens.*data\.sequence_length \(6\) to at least 7"):
        fill_bins(numbered((5, 8)), 7)


def test_prompts_are_given_wherever_a_row_cuts_them() -> None:
    documents = numbered(num_prompt=4)
    prompts = {i for document in documents for i in document.ids[: document.num_prompt]}
    rows = make_rows(documents)
    for place in range(rows.per_epoch):
        row = rows.at(place)
        assert row.is_given_R.tolist() == [i in prompts for i in row.ids_R.tolist()]


def test_columns_know_what_is_learnt_and_what_follows() -> None:
    rows = make_rows(numbered((3, 3), num_prompt=1), packing="whole", length=7)
    columns = RowBatch.of([rows.at(0)])
    assert columns.is_text_BL.int().tolist() == [[1, 1, 1, 1, 1, 1, 0]]
    assert columns.is_learnt_BR.int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    assert columns.follows_BL.int().tolist() == [[1, 1, 0, 1, 1, 0, 0]]


def test_too_little_text_for_one_row_is_explained() -> None:
    with pytest.raises(DataError, match=r"data\.path holds 6 tokens.*data\.sequence_length \(6\)"):
        make_rows(numbered((4, 2)))
    assert make_rows(numbered((4, 3))).per_epoch == 1


def test_unique_tokens_keep_a_shuffled_part_to_the_token() -> None:
    documents = numbered()
    for num_tokens in (1, 13, sum(LENGTHS)):
        kept = keep_tokens(documents, num_tokens, seed=0)
        assert sum(len(document.ids) for document in kept) == num_tokens
        by_number = {document.ids[0] // 100: document.ids for document in documents}
        assert all(k.ids == by_number[k.ids[0] // 100][: len(k.ids)] for k in kept)
    firsts = [[d.ids[0] for d in keep_tokens(documents, 13, seed)] for seed in range(4)]
    assert len({tuple(first) for first in firsts}) > 1
    with pytest.raises(DataError, match=r"data\.unique_tokens \(40\) exceeds the 39 tokens"):
        keep_tokens(documents, 40, seed=0)


def test_text_ends_with_the_stop_token_once(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    plain, stopped = load(tmp_path, {"text": "ab"}, {"text": "ab<eos>"}, tokenizer=tokenizer)
    assert plain == stopped == Document((*tokenizer("ab")["input_ids"], STOP))
    (other,) = load(tmp_path, {"story": "ab", "text": 3}, tokenizer=tokenizer, text_column="story")
    assert other == plain


def test_prompts_and_messages_are_given_and_responses_learnt(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = ({"prompt": "a", "response": "b"}, {"messages": messages})
    pair, chat = load(tmp_path, *rows, tokenizer=tokenizer)
    prompt, response = (tuple(tokenizer(text)["input_ids"]) for text in ("a\n> ", "b"))
    assert pair == chat == Document((*prompt, *response, STOP), len(prompt))
    tokenizer.chat_template = None
    (pair,) = load(tmp_path, rows[0], tokenizer=tokenizer)
    assert pair == Document((*tokenizer("a")["input_ids"], *response, STOP), 1)
    with pytest.raises(DataError, match=r":1: messages.* need a chat template, and this tokenizer has none"):
        load(tmp_path, rows[1], tokenizer=tokenizer)


def test_a_conversation_keeps_its_earlier_turns_as_the_prompt(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (document,) = load(tmp_path, row | {"prompt": "x", "response": "y"})  # messages win, prompt and response
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(document.ids[: document.num_prompt]) == "a\nb\nc\n> "
    assert tokenizer.decode(document.ids[document.num_prompt :]) == "d<eos>"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": ""}, ":2: its text is empty"),
        ({"text": None}, ":2: its text is empty or not text"),
        ({"text": 7}, ":2: its text is empty or not text"),
        ({"prompt": "a"}, ":2 has neither `text`"),
        ({"prompt": "a", "response": ""}, ":2: its text is empty"),
        ({"prompt": "", "response": "a"}, ":2 has an empty prompt"),
        ({"prompt": 3, "response": "a"}, ":2: `prompt` must be text"),
        ({"messages": "hi"}, ":2: `messages` is not valid JSON"),
        ({"messages": [{"role": "user", "content": "a"}]}, ":2: `messages` must end with the assistant's"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, ":2 has an empty prompt"),
        ({"body": "a"}, r":2 has neither `text`.*found: body.*data\.text_column"),
        ({}, ":2 has neither `text`.*found: nothing"),
        ({"text": "a<|mask|>"}, ":2 contains the mask token.*format.mask_token"),
        ({"prompt": "<|mask|>", "response": "a"}, ":2 contains the mask token"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    mask_token_id = tokenizer.mask_token_id
    path = write_rows(tmp_path / "text.jsonl", [{"text": "good"}, row])
    with pytest.raises(DataError, match=rf"text\.jsonl{words}"):
        load_documents(TextSection(path=str(path)), tokenizer, mask_token_id)


def test_no_rows_and_no_path_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"data\.path is empty"):
        load_documents(TextSection(), tiny_tokenizer(), MASK)


def test_several_files_are_one_text(tmp_path: Path) -> None:
    paths = [str(write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])) for name in "ab"]
    documents = load_documents(TextSection(path=tuple(paths)), tiny_tokenizer(), MASK)
    assert documents == [*load(tmp_path, {"text": "a"}), *load(tmp_path, {"text": "b"})]


def test_rows_are_tensors_of_one_width() -> None:
    rows = make_rows(numbered((2, 3, 7)), packing="whole")
    columns = RowBatch.of([rows.at(0), rows.at(1)])
    assert columns.ids_BR.shape == columns.start_BR.shape == columns.is_given_BR.shape == (2, 7)
    assert columns.ids_BR.dtype == torch.int64 and columns.is_given_BR.dtype == torch.bool
