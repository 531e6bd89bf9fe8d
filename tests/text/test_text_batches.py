"""Rows of text against brute force: every piece alone, in a dense forward of the stock model in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import BLOCK, GRIDS, MASK, STOP, V, make_lm, qwen3
from torch import Tensor
from transformers import PreTrainedModel

from opdlm.config.text import ObjectiveSection, TextSection
from opdlm.data.documents import PADDING, Document, PackedDataset, RowBatch, TextRow
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.slots import GridKind
from opdlm.objectives.masking import ANY_RATE, MaskRates, Masks, draw_masks
from opdlm.seeds import generator_for
from opdlm.text.batches import Prediction, TextBatch, block_batch, can_mask, mixed_rows
from opdlm.text.trainer import TextLoss

PREDICTIONS: tuple[Prediction, ...] = ("same_position", "next_position")
PACKINGS = ("chunks", "whole")
LENGTH = 11
Place = tuple[int, int]
"""Row and column."""


@dataclass(frozen=True)
class Both:
    """A model behind slots, and the same weights as transformers has them."""

    model: DiffusionLM
    plain: PreTrainedModel


@pytest.fixture(scope="module")
def both() -> Both:
    return make_both()


def make_both(grid: GridKind = "absolute") -> Both:
    plain = qwen3(attn_implementation="eager").double()
    plain.set_attn_implementation("eager")
    model = make_lm("sdar", grid, base=qwen3().double(), noise=0.0)
    object.__setattr__(model.spec, "banned_token_ids", ())  # transformers bans nothing
    return Both(model, plain)


def documents(*, num_prompt: int = 0, seed: int = 0) -> list[Document]:
    rng = generator_for(seed)
    lengths = (5, 2, 9, 3, 7, 4, 8, 6)
    ids = [torch.randint(STOP, (n,), generator=rng).tolist() for n in lengths]
    return [Document((*i[:-1], STOP), min(num_prompt, len(i) - 1)) for i in ids]


def text_rows(
    packing: Any = "chunks", *, num_prompt: int = 0, length: int = LENGTH, num: int = 3
) -> list[TextRow]:
    section = TextSection(sequence_length=length, packing=packing)
    rows = PackedDataset(documents(num_prompt=num_prompt), section, seed=0)
    return [rows.at(i) for i in range(num)]


def drawn(row_batch: RowBatch, prediction: Prediction, seed: int = 0, rates: MaskRates = ANY_RATE) -> Masks:
    return draw_masks(can_mask(row_batch, prediction), rates, generator_for(seed))


def masked_batch(
    rows: Sequence[TextRow], prediction: Prediction, seed: int = 0, num_causal: int = 0
) -> TextBatch:
    row_batch = RowBatch.of(rows)
    return mixed_rows(row_batch, num_causal, drawn(row_batch, prediction, seed), prediction, MASK)


def piece_columns(row: TextRow, num_columns: int) -> Iterator[list[int]]:
    starts = row.start_R[:num_columns].tolist()
    for start in dict.fromkeys(starts):
        if start != PADDING:
            yield [column for column, other in enumerate(starts) if other == start]


def dense(plain: PreTrainedModel, ids: Sequence[int], allowed_LL: Tensor) -> Tensor:
    """Log-probabilities `[L, V]` of the stock model under a dense mask."""
    mask = torch.zeros(allowed_LL.shape, dtype=torch.float64).masked_fill(~allowed_LL, -1e300)
    with torch.no_grad():
        output = plain(input_ids=torch.tensor([list(ids)]), attention_mask=mask[None, None], use_cache=False)
    return output.logits[0].log_softmax(-1)


def nats(model: DiffusionLM, batch: TextBatch) -> dict[Place, float]:
    """-log p of every target by its place."""
    with torch.no_grad():
        hidden_MH = model.student_hidden(batch.slots)[batch.row_M, batch.column_M]
        logprobs_MV = (hidden_MH @ model.student.lm_head.weight.T).log_softmax(-1)
    nats_M = -logprobs_MV.gather(-1, batch.target_M[:, None])[:, 0]
    places = zip(batch.row_M.tolist(), batch.column_M.tolist(), strict=True)
    return dict(zip(places, nats_M.tolist(), strict=True))


def weights(batch: TextBatch) -> dict[Place, float]:
    places = zip(batch.row_M.tolist(), batch.column_M.tolist(), strict=True)
    return dict(zip(places, batch.weight_M.tolist(), strict=True))


@pytest.mark.parametrize("packing", PACKINGS)
def test_causal_rows_have_the_loss_of_transformers_on_each_piece_alone(packing: str, both: Both) -> None:
    rows = text_rows(packing)
    batch = masked_batch(rows, "same_position", num_causal=len(rows))
    loss = TextLoss(both.model, ObjectiveSection(name="autoregressive"))(batch, batch.weight_M / batch.num_ar)
    total = num_tokens = 0.0
    for row in rows:
        for columns in piece_columns(row, LENGTH + 1):
            ids = row.ids_R[columns][None]
            if ids.shape[1] > 1:
                total += both.plain(input_ids=ids, labels=ids).loss.detach().item() * (ids.shape[1] - 1)
                num_tokens += ids.shape[1] - 1
    assert batch.num_ar == num_tokens
    assert float(loss.loss) == pytest.approx(total / num_tokens, abs=1e-6)


def test_causal_rows_learn_responses_only(both: Both) -> None:
    rows = text_rows("whole", num_prompt=2)
    batch = masked_batch(rows, "same_position", num_causal=len(rows))
    expected = {
        (number, left)
        for number, row in enumerate(rows)
        for columns in piece_columns(row, LENGTH + 1)
        for left, right in pairwise(columns)
        if not row.is_given_R[right]
    }
    assert set(nats(both.model, batch)) == expected and batch.num_ar == len(expected)


@pytest.mark.parametrize("num_prompt", [0, 3])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_masked_rows_equal_a_bidirectional_forward_of_each_piece_alone(
    prediction: Prediction, packing: str, num_prompt: int, both: Both
) -> None:
    rows = text_rows(packing, num_prompt=num_prompt)
    row_batch = RowBatch.of(rows)
    masks = drawn(row_batch, prediction, seed=3)
    batch = mixed_rows(row_batch, 0, masks, prediction, MASK)
    expected: dict[Place, float] = {}
    expected_weights: dict[Place, float] = {}
    for number, row in enumerate(rows):
        hidden_L = masks.is_masked[number]
        for piece in piece_columns(row, LENGTH):
            shown = [MASK if hidden_L[c] else int(row.ids_R[c]) for c in piece]
            logprobs_LV = dense(both.plain, shown, torch.ones(len(piece), len(piece), dtype=torch.bool))
            for i, c in enumerate(piece):
                target = c if prediction == "same_position" else c + 1
                inside = target < LENGTH and target in piece
                is_last = target == LENGTH and row.start_R[LENGTH] == row.start_R[c]
                if (inside and hidden_L[target]) or (is_last and not row.is_given_R[target]):
                    expected[number, c] = -float(logprobs_LV[i, row.ids_R[target]])
                    expected_weights[number, c] = 1.0 if is_last else float(masks.weight[number, target])
    assert nats(both.model, batch) == pytest.approx(expected, abs=1e-5)
    assert weights(batch) == pytest.approx(expected_weights)
    assert len(expected) >= 5


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_mixed_rows_in_one_forward_equal_two_forwards(prediction: Prediction) -> None:
    model = make_lm("sdar")
    rows = text_rows("chunks", num=4)
    row_batch = RowBatch.of(rows)
    masks = drawn(row_batch, prediction)
    loss = TextLoss(model, ObjectiveSection())

    def gradients(parts: Sequence[tuple[slice, int]]) -> tuple[float, list[Tensor]]:
        model.zero_grad()
        total = 0.0
        for part, num_causal in parts:
            some = RowBatch(row_batch.ids_BR[part], row_batch.start_BR[part], row_batch.is_given_BR[part])
            chosen = Masks(masks.is_masked[part], masks.weight[part], masks.is_counted[part])
            batch = mixed_rows(some, num_causal, chosen, prediction, MASK)
            output = loss(batch, batch.weight_M / 40)
            output.loss.backward()
            total += float(output.loss)
        return total, [p.grad.clone() for p in model.student.parameters() if p.grad is not None]

    together, alone = gradients([(slice(0, 4), 1)]), gradients([(slice(0, 1), 1), (slice(1, 4), 0)])
    assert together[0] == pytest.approx(alone[0], abs=1e-6)
    for left, right in zip(together[1], alone[1], strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_prompt", [0, 3])
def test_weights_sum_to_the_learnt_tokens_on_average(prediction: Prediction, num_prompt: int) -> None:
    rows = text_rows("whole", num_prompt=num_prompt)
    rates = MaskRates(windows=((0.3, 0.9),))  # weights stay small, so the mean is sharp
    sums, num = [], 0.0
    for seed in range(600):
        row_batch = RowBatch.of(rows)
        batch = mixed_rows(row_batch, 0, drawn(row_batch, prediction, seed, rates), prediction, MASK)
        sums.append(float(batch.weight_M.sum()))
        num = batch.num_masked
    found = torch.tensor(sums)
    assert abs(float(found.mean()) - num) < 4 * float(found.std()) / len(sums) ** 0.5
    learnt = [(~row.is_given_R & (row.start_R != PADDING))[:LENGTH].sum() for row in rows]
    if prediction == "same_position":
        assert num == sum(learnt)


LAST_ONLY = MaskRates(windows=((0.0, 0.0),), always_mask=(-1,))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_tokens_that_are_never_masked_are_not_counted(prediction: Prediction) -> None:
    row_batch = RowBatch.of(text_rows("whole"))
    batch = mixed_rows(row_batch, 0, drawn(row_batch, prediction, 0, LAST_ONLY), prediction, MASK)
    assert 0 < len(batch.weight_M) == float(batch.weight_M.sum()) == batch.num_masked
    assert batch.num_masked < can_mask(row_batch, prediction).sum()


def test_tokens_of_blocks_that_are_never_masked_are_not_counted() -> None:
    rows, spec = text_rows("chunks"), make_lm("sdar").spec
    rngs = [generator_for(i) for i in range(len(rows))]
    batch = block_batch(rows, spec, LAST_ONLY, rngs, complementary=False)
    assert 0 < len(batch.weight_M) == float(batch.weight_M.sum()) == batch.num_masked


def test_next_position_predicts_the_last_token_always_and_a_first_token_never() -> None:
    rows = text_rows("chunks", num=4)
    row_batch = RowBatch.of(rows)
    for rates in (MaskRates(windows=((0.0, 0.0),)), MaskRates(windows=((1.0, 1.0),))):
        batch = mixed_rows(
            row_batch, 0, drawn(row_batch, "next_position", rates=rates), "next_position", MASK
        )
        ends = {(n, LENGTH - 1) for n, row in enumerate(rows) if row.start_R[-1] == row.start_R[-2]}
        found = weights(batch)
        assert ends and all(found[place] == 1.0 for place in ends)
        assert set(found) == (ends if rates.windows[0][1] == 0 else places_before_tokens(rows))


def places_before_tokens(rows: Sequence[TextRow]) -> set[Place]:
    """Every input whose next token is of the same piece."""
    return {
        (number, left)
        for number, row in enumerate(rows)
        for columns in piece_columns(row, LENGTH + 1)
        for left, _ in pairwise(columns)
    }


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_prompts_and_padding_are_never_masked(prediction: Prediction) -> None:
    rows = text_rows("whole", num_prompt=3)
    row_batch = RowBatch.of(rows)
    everything = MaskRates(windows=((1.0, 1.0),))
    batch = mixed_rows(row_batch, 0, drawn(row_batch, prediction, rates=everything), prediction, MASK)
    is_masked_BL = batch.slots.ids_BS == MASK
    assert torch.equal(is_masked_BL, row_batch.is_learnt_BR[:, :-1])
    assert row_batch.is_given_BR.any() and (~row_batch.is_text_BL).any()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_padding_is_invisible(prediction: Prediction, both: Both) -> None:
    (row,) = text_rows("whole", num=1)
    num_tokens = int((row.start_R != PADDING).sum())
    assert num_tokens < LENGTH + 1

    def padded(width: int, filler: int) -> TextRow:
        more = width + 1 - num_tokens
        fill = torch.full((more,), filler)
        given = torch.zeros(more, dtype=torch.bool)
        return TextRow(
            torch.cat([row.ids_R[:num_tokens], fill]),
            torch.cat([row.start_R[:num_tokens], torch.full((more,), PADDING)]),
            torch.cat([row.is_given_R[:num_tokens], given]),
        )

    for num_causal in (0, 1):
        found = []
        for width, filler in ((LENGTH, 0), (LENGTH, 7), (LENGTH + 9, 5)):
            row_batch = RowBatch.of([padded(width, filler)])
            is_masked = torch.zeros(1, width, dtype=torch.bool)
            is_masked[0, [1, 2, 4]] = can_mask(row_batch, prediction)[0, [1, 2, 4]]
            batch = mixed_rows(
                row_batch,
                num_causal,
                Masks(is_masked, is_masked * 2.0, torch.ones_like(is_masked)),
                prediction,
                MASK,
            )
            found.append(nats(both.model, batch))
        assert found[0] and found[0] == found[1]
        assert found[2] == pytest.approx(found[0], abs=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_long_rows_are_the_same_under_the_dense_mask_and_in_chunks(prediction: Prediction) -> None:
    model = make_lm("sdar")
    long = [
        Document((*torch.randint(STOP, (n,), generator=generator_for(n)).tolist(), STOP))
        for n in (400, 90, 140)
    ]
    rows = PackedDataset(long, TextSection(sequence_length=300), seed=0)
    row_batch = RowBatch.of([rows.at(0), rows.at(1)])
    batch = mixed_rows(row_batch, 1, drawn(row_batch, prediction), prediction, MASK)
    found = []
    for model.attention in ("sdpa", "flash"):
        found.append(model.student_hidden(batch.slots).detach())
    torch.testing.assert_close(*found, atol=2e-5, rtol=0)


@pytest.mark.parametrize("num_prompt", [0, 3])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("grid", GRIDS)
def test_block_rows_equal_a_dense_forward_of_each_block_after_its_text(
    grid: GridKind, packing: str, num_prompt: int
) -> None:
    both = make_both(grid)
    rows = text_rows(packing, num_prompt=num_prompt)
    rngs = [generator_for(1, i) for i in range(len(rows))]
    batch = block_batch(rows, both.model.spec, ANY_RATE, rngs, complementary=False)
    found = nats(both.model, batch)
    slots, checked = batch.slots, 0
    places = list(zip(batch.row_M.tolist(), batch.column_M.tolist(), strict=True))
    for group in slots.group_BS[slots.group_BS > 0].unique().tolist():
        row_S, column_S = (slots.group_BS == group).nonzero(as_tuple=True)
        start = int(slots.start_BS[row_S[0], column_S[0]])
        positions = slots.positions_BS[row_S, column_S].tolist()
        noised = slots.ids_BS[row_S, column_S].tolist()
        is_text = (batch.text.start_BS == start) & (batch.text.group_BS == 0)
        text = batch.text.ids_BS[is_text].tolist()
        kinds = [kind for kind in all_pieces(rows) if kind[0] == text]
        num_given = max(1, kinds[0][1])
        assert positions == list(range(positions[0], positions[0] + len(noised)))
        assert len(noised) == BLOCK
        origin = num_given % BLOCK if grid == "response" else 0
        assert (positions[0] - origin) % BLOCK == 0
        for position, token in zip(positions, noised, strict=True):
            assert token == MASK or token == text[position]
            assert token != MASK or position >= num_given
        shown = text[: positions[0]] + noised
        block_L = (torch.arange(len(shown)) - origin) // BLOCK
        logprobs_LV = dense(both.plain, shown, block_L[None, :] <= block_L[:, None])
        supervised = [
            (position, int(column))
            for position, token, column in zip(positions, noised, column_S, strict=True)
            if token == MASK and position < len(text)
        ]
        for position, column in supervised:
            place = (int(row_S[0]), column)
            assert found[place] == pytest.approx(-float(logprobs_LV[position, text[position]]), abs=1e-5)
            assert int(batch.target_M[places.index(place)]) == text[position]
            checked += 1
    assert checked == len(found) >= 5


def all_pieces(rows: Sequence[TextRow]) -> list[tuple[list[int], int]]:
    """Token ids and number of given ones of every piece."""
    return [
        (row.ids_R[columns].tolist(), int(row.is_given_R[columns].sum()))
        for row in rows
        for columns in piece_columns(row, len(row.ids_R))
    ]


def test_block_weights_sum_to_the_response_tokens_on_average() -> None:
    rows, spec = text_rows("chunks", num_prompt=2), make_lm("sdar").spec
    sums, num = [], 0.0
    for seed in range(300):
        rngs = [generator_for(seed, i) for i in range(len(rows))]
        batch = block_batch(rows, spec, MaskRates(windows=((0.3, 0.9),)), rngs, complementary=False)
        sums.append(float(batch.weight_M.sum()))
        num = batch.num_masked
    found = torch.tensor(sums)
    assert abs(float(found.mean()) - num) < 4 * float(found.std()) / len(sums) ** 0.5
    # given tokens, and the first of a piece without any, are not learnt
    assert num == sum(len(ids) - max(1, given) for ids, given in all_pieces(rows))


def test_complementary_blocks_learn_every_token_once() -> None:
    rows, spec = text_rows("chunks"), make_lm("sdar").spec
    rngs = [generator_for(i) for i in range(len(rows))]
    batch = block_batch(rows, spec, ANY_RATE, rngs, complementary=True)
    assert (batch.weight_M == 1).all() and len(batch.weight_M) == batch.num_masked
    assert sorted(batch.target_M.tolist()) == sorted(i for ids, _ in all_pieces(rows) for i in ids[1:])


def test_rows_of_nothing_but_prompts_teach_nothing() -> None:
    """A long prompt fills whole rows of `chunks`."""
    model = make_lm("sdar")
    text = Document((*([3, 4, 5] * 10), STOP), num_prompt=30)
    rows = PackedDataset([text], TextSection(sequence_length=LENGTH), seed=0)
    assert rows.at(0).is_given_R.all()
    block = block_batch([rows.at(0)], model.spec, ANY_RATE, [generator_for(0)], complementary=False)
    two = [rows.at(0), rows.at(0)]
    generators = [generator_for(0), generator_for(1)]
    for batch in (
        block,
        block_batch(two, model.spec, ANY_RATE, generators, complementary=False),
        masked_batch([rows.at(0)], "same_position"),
        masked_batch([rows.at(0)], "next_position", 0, 1),
    ):
        output = TextLoss(model, ObjectiveSection())(batch, batch.weight_M)
        assert len(batch.target_M) == batch.num_ar == batch.num_masked == 0
        output.loss.backward()
        assert float(output.loss) == 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_teacher_predicts_each_target_from_the_clean_text_before_it(
    prediction: Prediction, both: Both
) -> None:
    rows = text_rows("chunks", num_prompt=2)
    blocks = block_batch(
        rows, both.model.spec, ANY_RATE, [generator_for(i) for i in range(3)], complementary=False
    )
    for batch in (masked_batch(rows, prediction, num_causal=1), blocks):
        hidden_BLH = both.model.student_hidden(batch.text)
        for row, column, target in zip(
            batch.row_M.tolist(), batch.teacher_column_M.tolist(), batch.target_M.tolist(), strict=True
        ):
            if column < 0:
                continue
            start = int(batch.text.start_BS[row, column])
            before = batch.text.ids_BS[row, start : column + 1]
            assert any(ids[: len(before) + 1] == [*before.tolist(), target] for ids, _ in all_pieces(rows))
            causal = torch.ones(len(before), len(before), dtype=torch.bool).tril()
            logprobs_V = dense(both.plain, before.tolist(), causal)[-1]
            found_V = (hidden_BLH[row, column] @ both.model.student.lm_head.weight.T).log_softmax(-1)
            torch.testing.assert_close(found_V, logprobs_V, atol=1e-5, rtol=0)
    own = masked_batch(rows, "same_position")
    first = {(n, int(s)) for n, row in enumerate(rows) for s in row.start_R[:-1].unique()}
    without = {
        (r, c)
        for r, c, t in zip(
            own.row_M.tolist(), own.column_M.tolist(), own.teacher_column_M.tolist(), strict=True
        )
        if t < 0
    }
    assert without <= first and V > STOP
