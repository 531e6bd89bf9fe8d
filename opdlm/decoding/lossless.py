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

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile
from operator import mul

import torch
from torch import Tensor

from ..modeling.diffusion_lm import DiffusionLM
from ..modeling.kv_cache import DecodeCache, Packed
from ..modeling.slots import CLEAN
from .decode_config import DecodeConfig
from .decode_state import DecodeState
from .rollout import NEVER
from .unmasking import choose_tokens, noise_keys

NUM_BINS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What one forward does for one row."""

    num_verified: int
    """Draft tokens that it verifies."""
    groups: tuple[int, ...]
    """The numbers of accepted tokens that it drafts for."""
    length: int
    """Masks of a group."""


class DraftPolicy:
    """Running averages over one call of `generate` that decide what a forward holds. Plain numbers: a tensor
    of a few elements costs more than they do.
    """

    def __init__(self, draft_length: int, overhead: float) -> None:
        self.draft_length, self.overhead = draft_length, overhead
        self.tokens, self.cost = 1.0 + draft_length / 2, overhead + 2.0 * (1 + draft_length)
        centres = [1 / (1 + math.exp(NUM_BINS / 2 - 0.5 - i)) for i in range(NUM_BINS)]
        self.accepted, self.tried = [4 * centre for centre in centres], [4] * NUM_BINS
        self.survived, self.offered = [2] * draft_length, [2] * draft_length

    @property
    def rate(self) -> float:
        """Tokens per unit of cost."""
        return self.tokens / self.cost

    def chance(self, confidence: float) -> float:
        """Acceptance of a draft token given that all before it were accepted; a bin starts with four trials
        of its centre.
        """
        place = confidence_bin(confidence)
        return self.accepted[place] / self.tried[place]

    def plan(self, rows: DecodeState) -> list[Plan]:
        """What the next forward verifies and drafts. Rows that start always draft, at full length."""
        survival = [survived / offered for survived, offered in zip(self.survived, self.offered, strict=True)]
        paying = list(takewhile(lambda chance: chance > 2 * self.rate, survival))
        length = max(1, len(paying))
        cost = self.rate * length
        value = sum(survival[:length]) - cost
        plans = []
        for committed, confidences in zip(rows.committed_B.tolist(), drafted(rows), strict=True):
            chances = [self.chance(confidence) for confidence in confidences]
            reached = list(accumulate(chances, mul, initial=1.0))
            num_verified = sum(chance > self.rate for chance in reached[1:])
            needed = [here - after for here, after in pairwise(reached[: num_verified + 1])]
            needed.append(reached[num_verified])
            groups = tuple(place for place, chance in enumerate(needed) if chance * value > cost)
            plans.append(
                Plan(num_verified, groups, length) if committed else Plan(0, (0,), self.draft_length)
            )
        return plans

    def learn(self, rows: DecodeState, plans: list[Plan], accepted: list[int], num_forwards: int) -> None:
        """Count one forward's outcome."""
        for confidences, plan, num_accepted in zip(drafted(rows), plans, accepted, strict=True):
            for place, confidence in enumerate(confidences):
                self.offered[place] += 1
                self.survived[place] += place < num_accepted
                if place <= num_accepted and place < plan.num_verified:
                    self.tried[confidence_bin(confidence)] += 1
                    self.accepted[confidence_bin(confidence)] += place < num_accepted
            self.tokens += 1 + num_accepted
            self.cost += 1 + plan.num_verified + len(plan.groups) * plan.length
        self.cost += self.overhead * num_forwards


def drafted(rows: DecodeState) -> list[list[float]]:
    """The confidences of each row's draft."""
    pairs = zip(rows.draft_confidence_BD.tolist(), rows.num_draft_B.tolist(), strict=True)
    return [confidences[:num_draft] for confidences, num_draft in pairs]


def confidence_bin(confidence: float) -> int:
    """Unit steps of the log-odds, clamped to the bins; a broken model's NaN falls into the first."""
    confidence = min(1 - 1e-6, max(1e-6, confidence))
    odds = math.log(confidence / (1 - confidence))
    return min(max(int(odds + NUM_BINS / 2), 0), NUM_BINS - 1)


def lossless_step(
    model: DiffusionLM, rows: DecodeState, cache: DecodeCache, config: DecodeConfig, policy: DraftPolicy
) -> None:
    """Accept each draft's valid prefix and one token more; leave the next draft in `rows`."""
    mask_id, draft_length = model.spec.mask_token_id, policy.draft_length
    frontier_B = rows.frontier(mask_id)
    plans = policy.plan(rows)
    num_verified_B = torch.tensor([plan.num_verified for plan in plans])
    column_D = torch.arange(draft_length)
    is_verified_BD = column_D < num_verified_B[:, None]
    rows.tokens_BL.scatter_(
        1, frontier_B[:, None] + column_D, torch.where(is_verified_BD, rows.draft_BD, mask_id)
    )
    clean_from_B = torch.minimum(rows.committed_B, frontier_B - 1)
    packed, judge, draft = pack_slots(
        rows.tokens_BL, clean_from_B.tolist(), frontier_B.tolist(), plans, mask_id
    )
    hidden_NH, num_forwards = model.packed_hidden(packed, len(rows), cache)
    rows.num_forwards_B = rows.num_forwards_B + num_forwards
    rows.num_steps_B = rows.num_steps_B + 1

    row_M, place_M = (torch.arange(draft_length + 1) <= num_verified_B[:, None]).nonzero(as_tuple=True)
    position_M = frontier_B[row_M] + place_M
    logits_MV = logits_at(model, hidden_NH, torch.tensor(judge)[row_M] + place_M, is_clean=True)
    chosen_M = choose_at(logits_MV, rows.seed_B[row_M], position_M, config)
    own_BK = torch.full((len(rows), draft_length + 1), mask_id)
    own_BK[row_M, place_M] = chosen_M.cpu()
    agrees_BD = is_verified_BD & (own_BK[:, :draft_length] == rows.draft_BD)
    accepted_B = agrees_BD.long().cumprod(1).sum(1)
    accepted = accepted_B.tolist()
    policy.learn(rows, plans, accepted, num_forwards)
    if config.logprobs:
        logprob_M = logits_MV.log_softmax(-1).gather(-1, chosen_M[:, None])[:, 0].cpu()
        rows.logprob_BL[row_M, position_M] = logprob_M
    write_accepted(rows, frontier_B, own_BK, accepted_B, mask_id)
    draft_next(model, rows, hidden_NH, draft, plans, accepted, config)


def pack_slots(
    tokens_BL: Tensor, clean_from: list[int], frontier: list[int], plans: list[Plan], mask_token_id: int
) -> tuple[Packed, list[int], list[int]]:
    """Each row's new clean slots with the draft that it verifies, then each row's groups: masks after the
    token that follows k accepted ones. Also, per row, which packed slot judges the first draft token, and
    which is the first of the row's groups.
    """
    clean: list[tuple[int, int, int, int]] = []  # row, position, visible_until, group
    noised: list[tuple[int, int, int, int]] = []
    judge, draft = [], []
    for row, (first, known, plan) in enumerate(zip(clean_from, frontier, plans, strict=True)):
        judge.append(len(clean) + known - 1 - first)
        draft.append(len(noised))
        clean += [(row, place, place, CLEAN) for place in range(first, known + plan.num_verified)]
        for k in plan.groups:
            anchor = known - 1 + k
            noised += [(row, anchor + 1 + i, anchor, k + 1) for i in range(plan.length)]
    num_clean = len(clean)
    row_N, position_N, visible_until_N, group_N = torch.tensor(clean + noised).unbind(1)
    ids_N = tokens_BL[row_N, position_N]
    ids_N[num_clean:] = mask_token_id
    packed = Packed(num_clean, row_N, ids_N, position_N, visible_until_N, group_N)
    return packed, judge, [num_clean + first for first in draft]


def write_accepted(
    rows: DecodeState, frontier_B: Tensor, own_BK: Tensor, accepted_B: Tensor, mask_token_id: int
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
    rows: DecodeState,
    hidden_NH: Tensor,
    draft: list[int],
    plans: list[Plan],
    accepted: list[int],
    config: DecodeConfig,
) -> None:
    """Read the group of the realised number of accepted tokens, where there is one."""
    num_draft = [0] * len(plans)
    for row, (plan, num_accepted) in enumerate(zip(plans, accepted, strict=True)):
        if num_accepted in plan.groups:
            draft[row] += plan.groups.index(num_accepted) * plan.length
            num_draft[row] = plan.length
    rows.num_draft_B = torch.tensor(num_draft)
    column_D = torch.arange(rows.draft_BD.shape[1])
    row_M, place_M = (column_D < rows.num_draft_B[:, None]).nonzero(as_tuple=True)
    if not len(row_M):
        return
    logits_MV = logits_at(model, hidden_NH, torch.tensor(draft)[row_M] + place_M, is_clean=False)
    ids_M = choose_at(logits_MV, rows.seed_B[row_M], rows.final_B[row_M] + place_M, config)
    confidence_M = logits_MV.softmax(-1).gather(-1, ids_M[:, None])[:, 0]
    rows.draft_BD[row_M, place_M] = ids_M.cpu()
    rows.draft_confidence_BD[row_M, place_M] = confidence_M.cpu()


def choose_at(logits_MV: Tensor, seed_M: Tensor, position_M: Tensor, config: DecodeConfig) -> Tensor:
    """The token of a position: the same noise whoever proposes it, draft or AR model."""
    if config.temperature == 0:  # noise is not free
        return logits_MV.argmax(-1)
    key_M = noise_keys(seed_M, position_M, 0).to(logits_MV.device)
    return choose_tokens(logits_MV, config.temperature, config.top_k, config.top_p, key_M)


def logits_at(model: DiffusionLM, hidden_NH: Tensor, slot_M: Tensor, is_clean: bool) -> Tensor:
    """Logits `[M, V]` of packed slots that are all clean or all noised."""
    slot_M = slot_M.to(model.device)
    return model.logits(hidden_NH[slot_M], torch.ones_like(slot_M, dtype=torch.bool) if is_clean else None)
