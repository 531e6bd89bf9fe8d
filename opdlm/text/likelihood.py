"""Negative log-likelihood of given text in nats: autoregressive, prefix, masked-diffusion, pseudo-likelihood.

    causal_nll  -log p of every learnt token given all before it; first tokens are not scored
    prefix_nll  the same after a prefix that is seen in both directions
    md_bound    E_t E_masks [(1 / w) sum over masked tokens of -log p], w the realised rate
    pseudo_nll  every learnt token masked alone, all others visible (pseudo-log-likelihood, arXiv 1910.14659)

The bound is that of t ~ U(0, 1), whatever mask rates were trained (arXiv 2406.07524). One t from each of K
equal parts of (0, 1) has the same expectation and less variance. After a prompt only the response is masked,
so the bound is that of a continuation. The seed fixes all randomness.

Shape suffixes: B rows, K rates, L inputs of a row (R has one token more), M targets, N masked copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdlm.data.documents import PADDING, RowBatch, TextRow
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.objectives.masking import MaskRates, Masks, draw_masks
from opdlm.seeds import generator_for
from opdlm.text.batches import (
    Prediction,
    TextBatch,
    block_batch,
    can_mask,
    mixed_rows,
    positions,
    slots_visible_until,
)

ROWS_PER_FORWARD = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RowNats:
    """Negative log-likelihood, or its bound, and number of scored tokens of every row `[B]`."""

    nats_B: Tensor
    tokens_B: Tensor
    error_B: Tensor
    """Standard error from drawing masks; 0 where nothing is drawn."""

    @property
    def per_token(self) -> float:
        return float(self.nats_B.sum() / self.tokens_B.sum())

    @property
    def standard_error(self) -> float:
        """Of `per_token`, from the drawn masks alone; it does not cover the choice of text."""
        return float(self.error_B.square().sum().sqrt() / self.tokens_B.sum())


Score = Callable[[Sequence[TextRow], int], RowNats]
"""Rows of text and a seed -> nats of the learnt tokens of each row."""


@torch.no_grad()
def cross_entropy(model: DiffusionLM, batch: TextBatch) -> Tensor:
    """-log p of every target `[M]`, float32."""
    batch = batch.to(model.device)
    hidden_MH = model.student_hidden(batch.slots)[batch.row_M, batch.column_M]
    pieces = zip(hidden_MH.split(4096), batch.target_M.split(4096), strict=True)
    parts = [-model.logits(h).log_softmax(-1).gather(-1, ids[:, None])[:, 0] for h, ids in pieces]
    return torch.cat(parts).cpu()


def row_sums(values_M: Tensor, batch: TextBatch, num_rows: int) -> Tensor:
    return torch.zeros(num_rows, dtype=torch.float64).index_add_(0, batch.row_M, values_M.double())


def causal_nll(model: DiffusionLM, row_batch: RowBatch) -> RowNats:
    """-log p of every learnt token given all before it in its piece; first tokens are not scored."""
    return next_token_nll(model, row_batch, torch.ones_like(positions(row_batch)))


def prefix_nll(model: DiffusionLM, row_batch: RowBatch, share: float = 0.5) -> RowNats:
    """-log p of every learnt token after the prefix of its piece: its prompt, or `share` of plain text."""
    return next_token_nll(model, row_batch, prefix_lengths(row_batch, share))


def prefix_lengths(row_batch: RowBatch, share: float) -> Tensor:
    """Tokens of each slot's piece that belong to its prefix, at least one: `[B, L]`."""
    start_BR = row_batch.start_BR.clamp_min(0)
    position_BR = torch.arange(start_BR.shape[1]) - start_BR
    is_text_BR = row_batch.start_BR != PADDING
    size_BR = torch.zeros_like(start_BR).scatter_add_(1, start_BR, is_text_BR.long())
    learnt_BR = torch.where(row_batch.is_learnt_BR, position_BR, start_BR.shape[1])
    prompt_BR = size_BR.scatter_reduce(1, start_BR, learnt_BR, "amin")  # all of it where nothing is learnt
    lengths_BR = torch.where(prompt_BR > 0, prompt_BR, (share * size_BR).long().clamp_min(1))
    return lengths_BR.gather(1, start_BR)[:, :-1]


def next_token_nll(model: DiffusionLM, row_batch: RowBatch, prefix_BL: Tensor) -> RowNats:
    """Causal rows; the first `prefix_BL` tokens of a piece see each other, later ones are scored."""
    nats, tokens = list[Tensor](), list[Tensor]()
    for index in torch.arange(len(row_batch.ids_BR)).split(ROWS_PER_FORWARD):
        part, prefix = row_batch.pick(index), prefix_BL[index]
        none_BL = torch.zeros_like(part.is_text_BL)
        no_masks = Masks(none_BL, none_BL.float(), none_BL)
        batch = mixed_rows(part, len(index), no_masks, "next_position", model.spec.mask_token_id)
        visible_until_BL = positions(part).maximum(prefix - 1)
        batch = replace(batch, slots=slots_visible_until(part, part.ids_BR[:, :-1], visible_until_BL))
        is_scored_M = (positions(part) + 1 >= prefix)[batch.row_M, batch.column_M]
        nats.append(row_sums(cross_entropy(model, batch) * is_scored_M, batch, len(index)))
        tokens.append(row_sums(is_scored_M, batch, len(index)))
    return without_error(torch.cat(nats), torch.cat(tokens))


def without_error(nats_B: Tensor, tokens_B: Tensor) -> RowNats:
    return RowNats(nats_B=nats_B, tokens_B=tokens_B, error_B=torch.zeros_like(nats_B))


def strata(num_rates: int) -> list[MaskRates]:
    """Equal parts of t ~ U(0, 1), to draw from once each."""
    return [
        MaskRates(exact=True, windows=((part / num_rates, (part + 1) / num_rates),))
        for part in range(num_rates)
    ]


def over_strata(nats_BK: Tensor, tokens_B: Tensor) -> RowNats:
    """The mean over an even number of strata.

    Its standard error is estimated from pairs of neighbours (collapsed strata; Cochran, Sampling Techniques,
    1977), which tends to overestimate it.
    """
    num_rates = nats_BK.shape[1]
    difference = nats_BK[:, :-1:2] - nats_BK[:, 1::2]
    error_B = difference.square().sum(1).sqrt() / num_rates
    return RowNats(nats_B=nats_BK.mean(1), tokens_B=tokens_B, error_B=error_B)


def md_bound(
    model: DiffusionLM, row_batch: RowBatch, prediction: Prediction, num_rates: int, seed: int = 0
) -> RowNats:
    """Bound on -log p of the learnt tokens from `num_rates` stratified mask rates per row."""
    rng, can_BL = generator_for(seed), can_mask(row_batch, prediction)
    masks = [draw_masks(can_BL, rates, rng) for rates in strata(num_rates)]
    is_masked_NL = torch.stack([m.is_masked for m in masks], 1).flatten(0, 1)
    weight_NL = torch.stack([m.weight for m in masks], 1).flatten(0, 1)
    row_N = torch.arange(len(can_BL)).repeat_interleave(num_rates)
    nats = list[Tensor]()
    for index in torch.arange(len(row_N)).split(ROWS_PER_FORWARD):
        part_masks = Masks(is_masked_NL[index], weight_NL[index], can_BL[row_N[index]])
        batch = mixed_rows(row_batch.pick(row_N[index]), 0, part_masks, prediction, model.spec.mask_token_id)
        nats.append(row_sums(cross_entropy(model, batch) * batch.weight_M, batch, len(index)))
    learnt_BL = row_batch.follows_BL if prediction == "next_position" else can_BL
    return over_strata(torch.cat(nats).view(-1, num_rates), learnt_BL.sum(1))


def block_bound(model: DiffusionLM, rows: Sequence[TextRow], num_rates: int, seed: int = 0) -> RowNats:
    """The same bound for block diffusion: each block has its own t and sees the clean blocks before it."""
    nats_BK, tokens_B = torch.zeros(len(rows), num_rates, dtype=torch.float64), torch.zeros(len(rows))
    for number, row in enumerate(rows):
        for part, rates in enumerate(strata(num_rates)):
            rng = generator_for(seed, number, part)
            batch = block_batch([row], model.spec, rates, [rng], complementary=False)
            nats_BK[number, part] = cross_entropy(model, batch).double() @ batch.weight_M.double()
            tokens_B[number] = batch.num_masked
    return over_strata(nats_BK, tokens_B)


def pseudo_nll(
    model: DiffusionLM, row_batch: RowBatch, prediction: Prediction, num_right: int = 0
) -> RowNats:
    """-log p of every learnt token masked alone, or together with the `num_right` learnt tokens after it.

    One copy of the row per token. This is no likelihood: its terms belong to no joint distribution.
    """
    is_next = prediction == "next_position"
    learnt_BL = row_batch.follows_BL if is_next else can_mask(row_batch, prediction)
    row_N, token_N = learnt_BL.nonzero(as_tuple=True)
    token_N = token_N + is_next
    nats_B = torch.zeros(len(learnt_BL), dtype=torch.float64)
    for index in torch.arange(len(row_N)).split(ROWS_PER_FORWARD):
        part, token_B1 = row_batch.pick(row_N[index]), token_N[index, None]
        after_BL = torch.arange(learnt_BL.shape[1]) - token_B1
        is_near_BL = (after_BL >= 0) & (after_BL <= num_right)
        is_near_BL &= part.start_BR[:, :-1] == part.start_BR.gather(1, token_B1)
        can_BL = can_mask(part, prediction)
        masks = Masks(is_near_BL & can_BL, (after_BL == 0).float(), can_BL)
        batch = mixed_rows(part, 0, masks, prediction, model.spec.mask_token_id)
        is_scored_M = batch.column_M + is_next == token_N[index][batch.row_M]
        values_B = row_sums(cross_entropy(model, batch) * is_scored_M, batch, len(index))
        nats_B.index_add_(0, row_N[index], values_B)
    return without_error(nats_B, learnt_BL.sum(1))
