"""Lossless decoding: noised slots draft, clean slots verify, the output is the AR model's, token for token.

After the clean slots [u, d_1 .. d_m] stand groups of masks, one per number k of accepted tokens that is worth
it: the forward that verifies a draft also holds the draft that follows. If the realised k has no group, the
next forward starts without a draft; the output never depends on what was chosen. A token is the arg-max, or
at a temperature the arg-max of logits plus the Gumbel noise of its position; draft and AR model share the
noise, so a sample too is the one that AR decoding draws (arXiv 2408.07978). METHOD part 8.

What pays: a forward costs `forward_overhead` + its slots, and decoding has earned `rate` tokens per unit of
that so far. A draft token is verified while its chance to be accepted exceeds the rate; a group stands where
its chance to be needed times what a draft brings (its tokens, less the rate times the slots that verify it)
exceeds the rate times its slots. Chances come from the draft's own confidence, calibrated by what was
accepted so far.

Shape suffixes: B rows, D draft length, K = D + 1 possible numbers of accepted tokens, J groups of a row,
M flat selection of slots, R rows that go on with a draft, C confidence bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import CLEAN, Grid, Slots, join_slots, make_slots
from .cache import DecodeCache
from .denoise import slot_logits
from .diffusion import DiffusionLM
from .records import NEVER
from .rows import DecodeConfig, Rows
from .unmasking import choose_tokens, noise_keys

ONE_TOKEN = Grid(block_size=1)
NUM_BINS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward: `num_verified_B` draft tokens, the groups `has_group_BK`, each of `length_B` masks."""

    num_verified_B: Tensor
    has_group_BK: Tensor
    length_B: Tensor


class Economy:
    """Running averages over one call of `generate` that decide what a forward holds."""

    def __init__(self, draft_length: int, overhead: float) -> None:
        self.draft_length, self.overhead = draft_length, overhead
        self.tokens, self.cost = 1.0 + draft_length / 2, overhead + 2.0 * (1 + draft_length)
        self.tried_C, self.accepted_C = torch.zeros(NUM_BINS), torch.zeros(NUM_BINS)
        self.offered_D, self.survived_D = torch.zeros(draft_length), torch.zeros(draft_length)

    @property
    def rate(self) -> float:
        """Tokens per unit of cost."""
        return self.tokens / self.cost

    def chance(self, confidence: Tensor) -> Tensor:
        """Acceptance of a draft token given that all before it were accepted, same shape; a bin starts with
        four trials of its centre.
        """
        prior_C = torch.sigmoid(torch.arange(NUM_BINS) - NUM_BINS / 2 + 0.5)
        return ((self.accepted_C + 4 * prior_C) / (self.tried_C + 4))[confidence_bin(confidence)]

    def plan(self, rows: Rows) -> Plan:
        """What the next forward verifies and drafts. Rows that start always draft, at full length."""
        is_start_B = rows.committed_B == 0
        column_D = torch.arange(self.draft_length)
        chance_BD = self.chance(rows.draft_confidence_BD) * (column_D < rows.num_draft_B[:, None])
        reach_BD = chance_BD.cumprod(1)
        num_verified_B = (reach_BD > self.rate).sum(1)
        ones_B1 = torch.ones(len(rows), 1)
        column_K = torch.arange(self.draft_length + 1)
        goes_on_BK = torch.cat([chance_BD, 0 * ones_B1], 1) * (column_K < num_verified_B[:, None])
        needed_BK = torch.cat([ones_B1, reach_BD], 1) * (1 - goes_on_BK)
        needed_BK = needed_BK * (column_K <= num_verified_B[:, None])
        survival_D = (self.survived_D + 2) / (self.offered_D + 2)
        length = max(1, int((survival_D > 2 * self.rate).long().cumprod(0).sum()))
        value = float(survival_D[:length].sum())
        has_group_BK = needed_BK * (value - self.rate * length) > self.rate * length
        has_group_BK[:, 0] |= is_start_B
        return Plan(num_verified_B, has_group_BK, torch.where(is_start_B, self.draft_length, length))

    def learn(self, rows: Rows, plan: Plan, accepted_B: Tensor, num_forwards: int) -> None:
        """Count one forward's outcome."""
        column_D = torch.arange(self.draft_length)
        verified_BD = column_D < plan.num_verified_B[:, None]
        tried_BD = verified_BD & (column_D <= accepted_B[:, None])
        survived_BD = verified_BD & (column_D < accepted_B[:, None])
        bin_BD = confidence_bin(rows.draft_confidence_BD)
        self.tried_C += bin_BD[tried_BD].bincount(minlength=NUM_BINS)
        self.accepted_C += bin_BD[survived_BD].bincount(minlength=NUM_BINS)
        self.offered_D += (column_D < rows.num_draft_B[:, None]).sum(0)
        self.survived_D += survived_BD.sum(0)
        num_slots = len(rows) + int(plan.num_verified_B.sum())
        num_slots += int((plan.has_group_BK.sum(1) * plan.length_B).sum())
        self.tokens += len(rows) + int(accepted_B.sum())
        self.cost += self.overhead * num_forwards + num_slots


def confidence_bin(confidence: Tensor) -> Tensor:
    """Unit steps of the log-odds, clamped to the bins."""
    odds = torch.logit(confidence, eps=1e-6)
    return (odds + NUM_BINS / 2).long().clamp(0, NUM_BINS - 1)


def lossless_step(
    model: DiffusionLM, rows: Rows, cache: DecodeCache, config: DecodeConfig, economy: Economy
) -> None:
    """Accept each draft's valid prefix and one token more; leave the next draft in `rows`."""
    mask_id, draft_length = model.spec.mask_token_id, economy.draft_length
    frontier_B = rows.frontier(mask_id)
    plan = economy.plan(rows)
    column_D = torch.arange(draft_length)
    position_BD = frontier_B[:, None] + column_D
    is_verified_BD = column_D < plan.num_verified_B[:, None]
    rows.tokens_BL.scatter_(1, position_BD, torch.where(is_verified_BD, rows.draft_BD, mask_id))
    clean_from_B = torch.minimum(rows.committed_B, frontier_B - 1)
    clean = rows.span(clean_from_B, frontier_B + plan.num_verified_B, ONE_TOKEN, "preserve", group=CLEAN)
    groups = draft_groups(frontier_B, plan, mask_id)
    hidden_BSH, num_forwards = model.decode_hidden(join_slots(clean, groups), cache)
    rows.num_forwards_B = rows.num_forwards_B + num_forwards
    rows.num_steps_B = rows.num_steps_B + 1

    row_M, place_M = (torch.arange(draft_length + 1) <= plan.num_verified_B[:, None]).nonzero(as_tuple=True)
    column_M = (frontier_B - 1 - clean_from_B)[row_M] + place_M
    is_clean_M = torch.ones_like(row_M, dtype=torch.bool)
    logits_MV = slot_logits(model, hidden_BSH, row_M, column_M, is_clean_M)
    chosen_M = choose_at(logits_MV, rows.seed_B[row_M], frontier_B[row_M] + place_M, config)
    own_BK = torch.full((len(rows), draft_length + 1), mask_id)
    own_BK[row_M, place_M] = chosen_M.cpu()
    agrees_BD = is_verified_BD & (own_BK[:, :draft_length] == rows.draft_BD)
    accepted_B = agrees_BD.long().cumprod(1).sum(1)
    economy.learn(rows, plan, accepted_B, num_forwards)
    if config.logprobs:
        logprob_M = logits_MV.log_softmax(-1).gather(-1, chosen_M[:, None])[:, 0].cpu()
        rows.logprob_BL[row_M, frontier_B[row_M] + place_M] = logprob_M
    write_accepted(rows, frontier_B, own_BK, accepted_B, mask_id)
    draft_next(model, rows, hidden_BSH, clean.ids_BS.shape[1], plan, accepted_B, config)


def write_accepted(
    rows: Rows, frontier_B: Tensor, own_BK: Tensor, accepted_B: Tensor, mask_token_id: int
) -> None:
    """The accepted tokens and the AR model's own after them; masks where the rest of the draft stood."""
    column_K = torch.arange(own_BK.shape[1])
    position_BK = frontier_B[:, None] + column_K
    is_new_BK = column_K <= accepted_B[:, None]
    rows.tokens_BL.scatter_(1, position_BK, torch.where(is_new_BK, own_BK, mask_token_id))
    steps_BK = torch.where(is_new_BK, rows.num_steps_B[:, None], NEVER)
    rows.unmask_step_BL.scatter_(1, position_BK, steps_BK)
    rows.committed_B = frontier_B + accepted_B
    rows.final_B = rows.committed_B + 1


def draft_next(
    model: DiffusionLM,
    rows: Rows,
    hidden_BSH: Tensor,
    num_clean: int,
    plan: Plan,
    accepted_B: Tensor,
    config: DecodeConfig,
) -> None:
    """Read the group of the realised number of accepted tokens, where there is one."""
    rows.num_draft_B = torch.zeros_like(accepted_B)
    goes_on_B = plan.has_group_BK.gather(1, accepted_B[:, None])[:, 0]
    row_R = goes_on_B.nonzero()[:, 0]
    if not len(row_R):
        return
    rows.num_draft_B[row_R] = plan.length_B[row_R]
    rank_R = plan.has_group_BK.long().cumsum(1)[row_R, accepted_B[row_R]] - 1
    width = int(plan.length_B.max())
    inside_RD = torch.arange(width) < plan.length_B[row_R, None]
    which_M, place_M = inside_RD.nonzero(as_tuple=True)
    row_M = row_R[which_M]
    logits_MV = slot_logits(model, hidden_BSH, row_M, num_clean + rank_R[which_M] * width + place_M)
    position_M = rows.final_B[row_M] + place_M
    ids_M = choose_at(logits_MV, rows.seed_B[row_M], position_M, config)
    confidence_M = logits_MV.softmax(-1).gather(-1, ids_M[:, None])[:, 0]
    rows.draft_BD[row_M, place_M] = ids_M.cpu()
    rows.draft_confidence_BD[row_M, place_M] = confidence_M.cpu()


def choose_at(logits_MV: Tensor, seed_M: Tensor, position_M: Tensor, config: DecodeConfig) -> Tensor:
    """The token of a position: the same noise whoever proposes it, draft or AR model."""
    key_M = noise_keys(seed_M, position_M, 0).to(logits_MV.device)
    return choose_tokens(logits_MV, config.temperature, config.top_k, config.top_p, key_M)


def draft_groups(frontier_B: Tensor, plan: Plan, mask_token_id: int) -> Slots:
    """The planned groups, left-aligned: masks after the token that follows k accepted ones."""
    num_groups_B, width = plan.has_group_BK.sum(1), int(plan.length_B.max())
    num_groups = int(num_groups_B.max())
    accepted_BJ = (~plan.has_group_BK).long().argsort(dim=1, stable=True)[:, :num_groups]
    shape = (len(frontier_B), num_groups, width)
    offset_D = torch.arange(width)
    valid = torch.arange(num_groups)[:, None] < num_groups_B[:, None, None]
    valid = valid & (offset_D < plan.length_B[:, None, None])
    reach = (frontier_B[:, None] - 1 + accepted_BJ)[..., None].expand(shape)
    ids = torch.full(shape, mask_token_id)
    slots = (ids, reach + 1 + offset_D, reach, (accepted_BJ + 1)[..., None].expand(shape), valid)
    return make_slots(*(value.reshape(len(frontier_B), -1) for value in slots))
