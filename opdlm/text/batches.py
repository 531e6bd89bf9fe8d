"""Rows of text as slots, with their targets: causal, bidirectional, prefix and block-causal rows.

`visible_until` of a slot decides the kind of its row: its own position (causal), the end of its document
(masked diffusion) or the end of a prefix. Rows of different kinds can share one forward. Masked diffusion
weighs a masked token by 1 / P(masked | t): the sum over a row is an unbiased estimate of the bound, whatever
the distribution of t. With `next_position`, input i predicts token i + 1 in masked rows as well: masks are
drawn over inputs, and the last token of a row, which is never an input, is always predicted (arXiv
2512.14549).

Shape suffixes: B rows, L inputs of a row (R has one token more), M supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from opdlm.data.documents import RowBatch, TextRow
from opdlm.decoding.rollout import Rollout
from opdlm.modeling.diffusion_lm import DiffusionSpec
from opdlm.modeling.slots import Slots, make_slots
from opdlm.objectives.masking import MaskRates, Masks, draw_masks
from opdlm.objectives.states import StateBatch, block_table, make_states, pack_states, text_to_rollout

Prediction = Literal["same_position", "next_position"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """One forward: what the student reads, and the targets."""

    slots: Slots
    text: Slots
    """The clean text, token-causal, as a teacher reads it."""
    row_M: Tensor
    column_M: Tensor
    target_M: Tensor
    """Token ids."""
    teacher_column_M: Tensor
    """Where `text` predicts the target, in the same row; -1 for the first token of a piece."""
    weight_M: Tensor
    is_ar_M: Tensor
    """Targets in autoregressive rows."""
    num_ar: float
    """Tokens that autoregressive rows learn."""
    num_masked: float
    """Tokens that masked rows may learn, which is the expectation of the sum of their weights over masks."""

    def to(self, device: torch.device) -> TextBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if not isinstance(value, float)}
        return replace(self, **moved)

    def without_targets(self) -> TextBatch:
        """The same rows, teaching nothing."""
        places = {f.name: getattr(self, f.name)[:0] for f in fields(self) if f.name.endswith("_M")}
        return replace(self, num_ar=0.0, num_masked=0.0, **places)


def positions(row_batch: RowBatch) -> Tensor:
    start_BL = row_batch.start_BR[:, :-1]
    return torch.arange(start_BL.shape[1]) - start_BL


def slots_visible_until(row_batch: RowBatch, ids_BL: Tensor, visible_until_BL: Tensor) -> Slots:
    """Clean slots; padding sees itself."""
    start_BL = row_batch.start_BR[:, :-1]
    zeros_BL = torch.zeros_like(start_BL)
    slots = make_slots(ids_BL, positions(row_batch), visible_until_BL, zeros_BL, row_batch.is_text_BL)
    return replace(slots, start_BS=start_BL.clamp_min(0))


def end_of_piece(row_batch: RowBatch) -> Tensor:
    """Position of the last input of each slot's piece `[B, L]`: `visible_until` of a bidirectional row."""
    start_BL = row_batch.start_BR[:, :-1].clamp_min(0)
    last_BL = torch.zeros_like(start_BL).scatter_reduce_(
        1, start_BL, torch.arange(start_BL.shape[1]).expand_as(start_BL) * row_batch.is_text_BL, "amax"
    )
    return last_BL.gather(1, start_BL) - start_BL


def can_mask(row_batch: RowBatch, prediction: Prediction) -> Tensor:
    """Inputs that may be masked `[B, L]`: those whose tokens are learnt and can be predicted."""
    can_BL = row_batch.is_learnt_BR[:, :-1].clone()
    if prediction == "next_position":  # nothing predicts the first token of a piece
        can_BL &= positions(row_batch) > 0
    return can_BL


def mixed_rows(
    row_batch: RowBatch,
    num_causal: int,
    masks: Masks,
    prediction: Prediction,
    mask_token_id: int,
    *,
    ar_weight: float = 1.0,
    masks_causal: bool = False,
) -> TextBatch:
    """The first `num_causal` rows are autoregressive, the others masked; `masks` `[B, L]` cover all rows.

    masks_causal: mask the inputs of autoregressive rows as well; they still predict every next token.
    """
    num_rows, length = row_batch.is_text_BL.shape
    is_ar_B1 = (torch.arange(num_rows) < num_causal)[:, None]
    hidden_BL = masks.is_masked & (~is_ar_B1 | masks_causal)
    visible_until_BL = torch.where(is_ar_B1, positions(row_batch), end_of_piece(row_batch))
    ids_BL = row_batch.ids_BR[:, :-1].masked_fill(hidden_BL, mask_token_id)

    follows_BL = row_batch.follows_BL
    if prediction == "next_position":
        next_BL = torch.ones(num_rows, length)  # the last token is no input and always predicted
        next_BL[:, :-1] = masks.weight[:, 1:]
        counted_BL = follows_BL.clone()
        counted_BL[:, :-1] &= masks.is_counted[:, 1:]
        weight_BL = next_BL * follows_BL
    else:
        counted_BL = can_mask(row_batch, prediction)
        weight_BL = masks.weight * counted_BL
        counted_BL &= masks.is_counted
    is_own_B1 = ~is_ar_B1 & (prediction == "same_position")
    target_BL = torch.where(is_own_B1, row_batch.ids_BR[:, :-1], row_batch.ids_BR[:, 1:])
    weight_BL = torch.where(is_ar_B1, ar_weight * follows_BL, weight_BL)

    row_M, column_M = (weight_BL > 0).nonzero(as_tuple=True)
    is_ar_M = row_M < num_causal
    is_own_M = is_own_B1[row_M, 0]
    has_teacher_M = ~is_own_M | (positions(row_batch)[row_M, column_M] > 0)
    return TextBatch(
        slots=slots_visible_until(row_batch, ids_BL, visible_until_BL),
        text=slots_visible_until(row_batch, row_batch.ids_BR[:, :-1], positions(row_batch)),
        row_M=row_M,
        column_M=column_M,
        target_M=target_BL[row_M, column_M],
        teacher_column_M=torch.where(has_teacher_M, column_M - is_own_M.long(), -1),
        weight_M=weight_BL[row_M, column_M],
        is_ar_M=is_ar_M,
        num_ar=float((follows_BL & is_ar_B1).sum()),
        num_masked=float((counted_BL & ~is_ar_B1).sum()),
    )


def block_batch(
    rows: Sequence[TextRow],
    spec: DiffusionSpec,
    rates: MaskRates,
    rngs: Sequence[torch.Generator],
    *,
    complementary: bool,
) -> TextBatch:
    """Masked blocks after their clean context (`states`), packed into one row; each block draws its own t."""
    states, weights, num_masked = list[StateBatch](), list[Tensor](), 0
    for row, rng in zip(rows, rngs, strict=True):
        for rollout in pieces(row, spec):
            table = block_table([rollout], spec)
            masks = draw_masks(table.is_response_BNT, rates, rng, at_least_one=True)
            versions, weight = masks.is_masked[:, None], masks.weight[:, None]
            num_masked += rollout.num_response if complementary else int(masks.is_counted.sum())
            if complementary:
                versions = torch.stack([masks.is_masked, table.is_response_BNT & ~masks.is_masked], 1)
                weight = versions.float()
            is_rest_BNT = table.is_inside_BNT & (table.step_BNT >= 0) & ~table.is_response_BNT
            shown = versions | (is_rest_BNT[:, None] & versions.any(-1, keepdim=True))
            states.append(make_states([rollout], table, shown, spec))
            weights.append(weight[versions])
    if not states:  # only prompts: the forward still runs, on any masks, without targets
        row = TextRow(rows[0].ids_R, torch.zeros_like(rows[0].start_R), rows[0].ids_R < 0)
        return block_batch([row], spec, rates, rngs[:1], complementary=complementary).without_targets()
    packed = pack_states(states)
    row_M, column_M = packed.is_supervised_BS.nonzero(as_tuple=True)
    place_M = packed.slots.start_BS[row_M, column_M] + packed.target_BS[row_M, column_M]
    return TextBatch(
        slots=packed.slots,
        text=packed.text,
        row_M=row_M,
        column_M=column_M,
        target_M=packed.text.ids_BS[row_M, place_M],
        teacher_column_M=place_M - 1,
        weight_M=torch.cat(weights),
        is_ar_M=torch.zeros_like(row_M, dtype=torch.bool),
        num_ar=0.0,
        num_masked=float(num_masked),
    )


def pieces(row: TextRow, spec: DiffusionSpec) -> Iterator[Rollout]:
    """The documents of a row as prompt and response; text without a prompt gives its first token."""
    for start in row.start_R[row.start_R >= 0].unique().tolist():
        inside_R = row.start_R == start
        ids = row.ids_R[inside_R].tolist()
        num_prompt = max(1, int(row.is_given_R[inside_R].sum()))
        if len(ids) > num_prompt:
            yield text_to_rollout(ids[:num_prompt], ids[num_prompt:], spec)
