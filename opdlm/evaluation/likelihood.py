"""Likelihood of given text: exactly for the AR model, as a bound for the diffusion student; and the
divergence between the two for each token.

Revealing the k masked tokens of a block one by one in a uniformly random order gives the masked-diffusion
bound without its integral over t, block by block:

    -log p(block) <= sum_k E_{|M| = k} [ (1/k) sum_{i in M} -log p(x_i | x_outside_M) ]

One Monte-Carlo sample is one order with all its k. The loss at each k is averaged over M, which averages over
the next token instead of drawing it, and each order is paired with its reverse. In `preserve` the AR model
predicts the first unknown token of a block, so revealing from left to right gives exactly the AR likelihood.
Positions after the response stay masked and are not scored. Bound per block: BD3LM (arXiv 2503.09573); any
order: 2406.03736.

Shape suffixes: B rows, C masked copies, N blocks, T positions of a block, S slots, L row, M supervised.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdlm.decoding.rollout import Rollout
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.objectives.states import (
    BlockTable,
    StateBatch,
    block_table,
    make_states,
    select_states,
    text_to_rollout,
)
from opdlm.objectives.targets import TeacherPass, score_rows
from opdlm.seeds import generator_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Upper bound on the negative log-likelihood in nats, per row `[B]`, with its standard error."""

    nats_B: Tensor
    standard_error_B: Tensor


@dataclass(frozen=True, slots=True)
class ScoredText:
    """Text to be evaluated: its blocks (on the CPU), its token ids, and the teacher's pass over it."""

    rows: Sequence[Rollout]
    table: BlockTable
    ids_BL: Tensor
    scored: TeacherPass


def score_text(model: DiffusionLM, rows: Sequence[Rollout]) -> ScoredText:
    """One teacher pass over the rows."""
    table = block_table(rows, model.spec)
    text = make_states(rows, table, table.is_response_BNT[:, None], model.spec).text.to(model.device)
    return ScoredText(rows, table, text.ids_BS, score_rows(model, text))


@torch.no_grad()
def ar_response_nll(model: DiffusionLM, rows: Sequence[Rollout]) -> Tensor:
    """Exact negative log-likelihood of the responses under the AR model, in nats: `[B]`."""
    return ar_cross_entropy(model, score_text(model, rows)).sum((1, 2))


@torch.no_grad()
def nll_bound(model: DiffusionLM, rows: Sequence[Rollout], num_samples: int, seed: int = 0) -> Bound:
    """Monte-Carlo estimate of the student's bound from `num_samples` (at least 2) pairs of orders."""
    given = score_text(model, rows)
    rng = generator_for(seed)
    samples = []
    for _ in range(num_samples):
        ranks_BNT = torch.rand(given.table.ids_BNT.shape, generator=rng)
        samples.append((order_average(model, given, ranks_BNT) + order_average(model, given, -ranks_BNT)) / 2)
    samples_NB = torch.stack(samples)
    return Bound(nats_B=samples_NB.mean(0), standard_error_B=samples_NB.std(0) / num_samples**0.5)


def order_average(model: DiffusionLM, given: ScoredText, order_BNT: Tensor) -> Tensor:
    """One sample of the bound `[B]`: the sum over steps of the mean over positions that are still masked."""
    masks_BCNT = masks_of_order(given.table, order_BNT)
    entropy_BCNT = masked_cross_entropy(model, given, masks_BCNT)
    return (entropy_BCNT.sum(-1) / masks_BCNT.sum(-1).clamp_min(1)).sum((1, 2))


def masks_of_order(table: BlockTable, order_BNT: Tensor) -> Tensor:
    """Response positions masked before each step, bool `[B, C, N, T]`; a block reveals its positions in the
    order of their ranks.
    """
    last = order_BNT.max() + 1
    rank_BNT = torch.where(table.is_response_BNT, order_BNT, last).argsort(-1).argsort(-1)
    step_C = torch.arange(order_BNT.shape[-1])[:, None, None]
    return table.is_response_BNT[:, None] & (rank_BNT[:, None] >= step_C)


def ar_cross_entropy(model: DiffusionLM, given: ScoredText) -> Tensor:
    """The AR model's -log p of every response token given all earlier tokens: `[B, N, T]`, 0 elsewhere."""
    is_response_BNT = given.table.is_response_BNT
    row_M = is_response_BNT.nonzero()[:, 0].to(model.device)
    position_M = given.table.positions_BNT[is_response_BNT].to(model.device)
    entropy_M = cross_entropy_of(
        teacher_logits(model, given.scored, row_M, position_M), given.ids_BL[row_M, position_M]
    )
    return torch.zeros(is_response_BNT.shape).masked_scatter_(is_response_BNT, entropy_M.cpu())


def teacher_logits(model: DiffusionLM, scored: TeacherPass, row_M: Tensor, position_M: Tensor) -> Tensor:
    """The AR model's logits `[M, V]` for the tokens at these positions."""
    return model.logits(scored.hidden_BLH[row_M, position_M - 1], torch.ones_like(row_M, dtype=torch.bool))


def cross_entropy_of(logits_MV: Tensor, ids_M: Tensor) -> Tensor:
    """-log p of the ids `[M]`."""
    return -logits_MV.log_softmax(-1).gather(-1, ids_M[:, None])[:, 0]


def masked_cross_entropy(model: DiffusionLM, given: ScoredText, masks_BCNT: Tensor) -> Tensor:
    """-log p of every masked response token given the rest of its copy: `[B, C, N, T]`, else 0."""
    table = given.table
    is_rest_BNT = table.is_inside_BNT & (table.step_BNT >= 0) & ~table.is_response_BNT
    all_masks_BCNT = masks_BCNT | (is_rest_BNT[:, None] & masks_BCNT.any(-1, keepdim=True))
    states = make_states(given.rows, table, all_masks_BCNT, model.spec).to(model.device)
    row_M, column_M = states.is_supervised_BS.nonzero(as_tuple=True)
    target_M = states.target_BS[row_M, column_M]
    hidden_BSH = model.student_hidden(states.slots, given.scored.cache)
    entropy_M = cross_entropy_of(model.logits(hidden_BSH[row_M, column_M]), given.ids_BL[row_M, target_M])
    group_M = (states.slots.group_BS[row_M, column_M] - 1).cpu()
    row_M, target_M = row_M.cpu(), target_M.cpu()
    copy_M, block_M = group_M // masks_BCNT.shape[2], group_M % masks_BCNT.shape[2]
    offset_M = target_M - table.positions_BNT[row_M, block_M, 0]
    entropy_BCNT = torch.zeros(masks_BCNT.shape)
    entropy_BCNT[row_M, copy_M, block_M, offset_M] = entropy_M.cpu()
    if model.spec.format == "sdar":
        return entropy_BCNT
    is_first_BCNT = masks_BCNT & (masks_BCNT.cumsum(-1) == 1)  # predicted by the clean slot before it
    return torch.where(is_first_BCNT, ar_cross_entropy(model, given)[:, None], entropy_BCNT)


@torch.no_grad()
def likelihood_report(
    model: DiffusionLM, rollouts: Sequence[Rollout], num_samples: int, batch_size: int
) -> dict[str, float]:
    """Nats per token of the responses: exact for the AR model, a bound for the student."""
    nll, bound, variance, num_tokens = 0.0, 0.0, 0.0, 0
    for rows in batches(rollouts, batch_size):
        rows = [text_to_rollout(r.prompt_ids, r.text_ids, model.spec) for r in rows]
        nll += float(ar_response_nll(model, rows).sum())
        bounds = nll_bound(model, rows, num_samples, seed=num_tokens)
        bound += float(bounds.nats_B.sum())
        variance += float((bounds.standard_error_B**2).sum())
        num_tokens += sum(r.num_response for r in rows)
    return {
        "teacher_nll_per_token": nll / num_tokens,
        "student_bound_per_token": bound / num_tokens,
        "student_bound_standard_error": variance**0.5 / num_tokens,
        "num_tokens": num_tokens,
        "num_samples": num_samples,
    }


@torch.no_grad()
def agreement_report(model: DiffusionLM, rollouts: Sequence[Rollout], batch_size: int) -> dict[str, Any]:
    """Agreement of responses and of the states of their trajectories with the teacher.

    `argmax_agreement`: share of response tokens that are the teacher's arg-max given the earlier tokens.
    `teacher_kl`: mean KL(teacher ‖ student) in nats over the masked tokens of the states (`preserve`: without
    the first of each state, which the AR model predicts). `profile` splits it by the masked share of the
    block and by the offset in the block.
    """
    agreed, num_tokens = 0, 0
    cells: dict[tuple[float, int], list[float]] = {}
    for rows in batches(rollouts, batch_size):
        states = select_states(rows, model.spec, "all", generator_for(0)).to(model.device)
        scored = score_rows(model, states.text)
        agreed += num_agreed(model, rows, states, scored)
        num_tokens += sum(r.num_response for r in rows)
        for fraction, offset, divergence in divergences(model, rows, states, scored):
            cells.setdefault((round(fraction, 3), offset), []).append(divergence)
    everything = list(itertools.chain.from_iterable(cells.values()))
    return {
        "argmax_agreement": agreed / num_tokens,
        "teacher_kl": sum(everything) / max(1, len(everything)),
        "num_states": len(everything),
        "profile": [
            {"masked": fraction, "offset": offset, "kl": sum(values) / len(values), "num": len(values)}
            for (fraction, offset), values in sorted(cells.items())
        ],
    }


def num_agreed(model: DiffusionLM, rows: Sequence[Rollout], states: StateBatch, scored: TeacherPass) -> int:
    """Number of response tokens that are the teacher's arg-max."""
    agreed = 0
    for i, row in enumerate(rows):  # one row at a time: logits are [R, V]
        num_prompt, end = len(row.prompt_ids), len(row.prompt_ids) + row.num_response
        position_M = torch.arange(num_prompt, end, device=model.device)
        logits_MV = teacher_logits(model, scored, torch.full_like(position_M, i), position_M)
        agreed += int((logits_MV.argmax(-1) == states.text.ids_BS[i, position_M]).sum())
    return agreed


def divergences(
    model: DiffusionLM, rows: Sequence[Rollout], states: StateBatch, scored: TeacherPass
) -> Iterator[tuple[float, int, float]]:
    """(masked share of the block, offset in the block, KL) of every supervised slot."""
    hidden_BSH = model.student_hidden(states.slots, scored.cache)
    for i, row in enumerate(rows):
        column_M = states.is_supervised_BS[i].nonzero()[:, 0]
        if not len(column_M):
            continue
        target_M = states.target_BS[i, column_M]
        teacher_MV = teacher_logits(model, scored, torch.full_like(target_M, i), target_M).log_softmax(-1)
        student_MV = model.logits(hidden_BSH[i, column_M]).log_softmax(-1)
        terms_MV = teacher_MV.exp() * (teacher_MV - student_MV)
        kl_M = torch.where(teacher_MV.isneginf(), 0.0, terms_MV).sum(-1)
        start_M = model.spec.block_grid.block_start(target_M, torch.tensor(len(row.prompt_ids)))
        fraction_M = states.masked_fraction_BS[i, column_M]
        yield from zip(fraction_M.tolist(), (target_M - start_M).tolist(), kl_M.tolist(), strict=True)


def batches(rows: Sequence[Rollout], size: int) -> Iterator[Sequence[Rollout]]:
    """Consecutive batches of at most `size` rows."""
    return (rows[i : i + size] for i in range(0, len(rows), size))
