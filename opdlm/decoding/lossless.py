"""Lossless decoding: speculative decoding in which one forward pass verifies a draft and computes the next.

Clean slots [u, d_1 .. d_m] hold the last known token u and the draft. Each gives the AR model's prediction of
the next token, and the longest prefix of the draft that equals these predictions is accepted. Groups of masks
follow: group k drafts the tokens after k accepted ones. If the group of the actual number is absent, the next
forward verifies no draft. The output is that of AR decoding, token for token, whatever is drafted: a token is
the arg-max, or with temperature the arg-max of logits plus the Gumbel noise of its position, which draft and
AR model share (docs/concepts.md, "Lossless decoding"; shared noise, arXiv 2408.07978).

With `draft_sampling=rejection` drafts have noise of their own. A token d from the draft's distribution q is
accepted with probability min(1, p(d) / q(d)), p being the AR model's, else replaced by a sample of
max(p - q, 0): together a sample of p (speculative sampling, arXiv 2211.17192).

Where the text repeats itself, a draft may be copied from it instead (`prompt_lookup`).

What a forward contains is decided by `draft_policy`.

Shape suffixes: B rows, D draft length, K = D + 1 possible numbers of accepted tokens, C candidates, V
vocabulary, M flat selection of slots, N some of them, R some rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from ..modeling.kv_cache import DecodeCache, Packed
from ..modeling.slots import CLEAN
from .decode_config import DecodeConfig
from .decode_state import NO_PROCESSORS, DecodeState, Processors
from .draft_policy import DraftPlan, DraftPolicy
from .prompt_lookup import look_up
from .rollout import NEVER
from .unmasking import (
    ACCEPTANCE,
    DRAFT_TOKENS,
    choose_tokens,
    draw_tokens,
    is_sampled,
    noise_keys,
    scale_logits,
    uniform_ids,
    uniform_numbers,
    update_rows,
)

NUM_CANDIDATES = 128
"""Likeliest tokens that the draft head chooses among, so that the LM head runs once for the whole draft, and
whose probabilities rejection keeps.
"""


def lossless_step(
    model: DiffusionLM,
    state: DecodeState,
    cache: DecodeCache,
    config: DecodeConfig,
    policy: DraftPolicy,
    processors: Processors = NO_PROCESSORS,
    *,
    is_closed: bool = False,
) -> None:
    """Accept the valid prefix of each draft and one more token, and write the next draft into `state`.
    `is_closed`: no other row will join.
    """
    rejects = config.draft_sampling == "rejection" and bool(is_sampled(state.sampling_B3).any())
    mask_id, draft_length = model.spec.mask_token_id, state.draft_BD.shape[1]
    frontier_B = state.frontier(mask_id)
    plans = policy.plan(state, is_closed=is_closed)
    num_verified_B = torch.tensor([plan.num_verified for plan in plans])
    column_D = torch.arange(draft_length)
    is_verified_BD = column_D < num_verified_B[:, None]
    state.tokens_BL.scatter_(
        1, frontier_B[:, None] + column_D, torch.where(is_verified_BD, state.draft_BD, mask_id)
    )
    clean_from_B = torch.minimum(state.committed_B, frontier_B - 1)
    packed, verify_from, draft_from = pack_slots(
        state, clean_from_B.tolist(), frontier_B.tolist(), plans, model.spec
    )
    hidden_NH, num_forwards = model.packed_hidden(packed, len(state), cache)
    state.num_forwards_B = state.num_forwards_B + num_forwards
    state.num_steps_B = state.num_steps_B + 1

    row_M, place_M = (torch.arange(draft_length + 1) <= num_verified_B[:, None]).nonzero(as_tuple=True)
    position_M = frontier_B[row_M] + place_M
    logits_MV = logits_at(model, hidden_NH, torch.tensor(verify_from)[row_M] + place_M, is_clean=True)
    processed_MV = state.process(logits_MV, row_M, position_M, processors)
    if rejects:
        chosen_M = accept_or_replace(processed_MV, state, row_M, place_M, position_M, num_verified_B)
    else:
        chosen_M = choose_at(processed_MV, state, row_M, position_M)
    ar_BK = torch.full((len(state), draft_length + 1), mask_id)
    ar_BK[row_M, place_M] = chosen_M.cpu()
    agrees_BD = is_verified_BD & (ar_BK[:, :draft_length] == state.draft_BD)
    accepted_B = agrees_BD.long().cumprod(1).sum(1)
    accepted = accepted_B.tolist()
    policy.learn(state, plans, accepted, num_forwards)
    if state.has_logprobs_B.any():
        logprob_M = logits_MV.log_softmax(-1).gather(-1, chosen_M[:, None])[:, 0].cpu()
        state.logprob_BL[row_M, position_M] = logprob_M
    write_accepted(state, frontier_B, ar_BK, accepted_B, mask_id)
    draft_next(model, state, hidden_NH, draft_from, plans, accepted, rejects=rejects)
    if config.lookup_length:
        copy_drafts(state, config.lookup_length, policy)


def pack_slots(
    state: DecodeState,
    clean_from: list[int],
    frontier: list[int],
    plans: list[DraftPlan],
    spec: DiffusionSpec,
) -> tuple[Packed, list[int], list[int]]:
    """The slots of one forward: for each row the newly known tokens and the draft to verify as clean slots,
    then for each row its groups of masks, or of uniformly drawn ids in their place.

    Also returns, for each row, the packed slot that predicts the first draft token and the first packed slot
    of its groups.
    """
    clean: list[tuple[int, int, int, int]] = []  # row, position, visible_until, group
    noised: list[tuple[int, int, int, int]] = []
    verify_from, draft_from = [], []
    for row, (first, known, plan) in enumerate(zip(clean_from, frontier, plans, strict=True)):
        verify_from.append(len(clean) + known - 1 - first)
        draft_from.append(len(noised))
        clean += [(row, place, place, CLEAN) for place in range(first, known + plan.num_verified)]
        for k in plan.groups:
            anchor = known - 1 + k
            noised += [(row, anchor + 1 + i, anchor, spec.first_group + k) for i in range(plan.length)]
    num_clean = len(clean)
    row_N, position_N, visible_until_N, group_N = torch.tensor(clean + noised).unbind(1)
    ids_N = state.tokens_BL[row_N, position_N]
    ids_N[num_clean:] = spec.mask_token_id
    if spec.noise_vocab_size is not None:
        seed_N = state.seed_B[row_N[num_clean:]]
        ids_N[num_clean:] = uniform_ids(seed_N, position_N[num_clean:], spec.noise_vocab_size)
    packed = Packed(num_clean, row_N, ids_N, position_N, visible_until_N, group_N)
    return packed, verify_from, [num_clean + first for first in draft_from]


def write_accepted(
    state: DecodeState, frontier_B: Tensor, ar_BK: Tensor, accepted_B: Tensor, mask_token_id: int
) -> None:
    """Write the accepted tokens and the AR token after them; the rest of the draft becomes [MASK] again."""
    column_K = torch.arange(ar_BK.shape[1])
    position_BK = frontier_B[:, None] + column_K
    is_new_BK = column_K <= accepted_B[:, None]
    state.tokens_BL.scatter_(1, position_BK, torch.where(is_new_BK, ar_BK, mask_token_id))
    steps_BK = torch.where(is_new_BK, state.num_steps_B[:, None], NEVER)
    state.unmask_step_BL.scatter_(1, position_BK, steps_BK)
    state.committed_B = frontier_B + accepted_B
    state.final_B = state.committed_B + 1


def draft_next(
    model: DiffusionLM,
    state: DecodeState,
    hidden_NH: Tensor,
    draft_from: list[int],
    plans: list[DraftPlan],
    accepted: list[int],
    *,
    rejects: bool,
) -> None:
    """Write the draft of the group of the actual number of accepted tokens, or none if it is absent.

    The policy decides by the confidences what is verified. With `rejects` that must not depend on what was
    drawn, or the accepted tokens would be a biased sample: a confidence is that of the likeliest token then.
    """
    first_slot, num_draft = draft_from[:], [0] * len(plans)
    for row, (plan, num_accepted) in enumerate(zip(plans, accepted, strict=True)):
        if num_accepted in plan.groups:
            first_slot[row] += plan.groups.index(num_accepted) * plan.length
            num_draft[row] = plan.length
    state.num_draft_B = torch.tensor(num_draft)
    column_D = torch.arange(state.draft_BD.shape[1])
    row_M, place_M = (column_D < state.num_draft_B[:, None]).nonzero(as_tuple=True)
    if not len(row_M):
        return
    if model.draft_head is not None:
        draft_in_sequence(model, state, hidden_NH, torch.tensor(first_slot), rejects=rejects)
        return
    logits_MV = logits_at(model, hidden_NH, torch.tensor(first_slot)[row_M] + place_M, is_clean=False)
    position_M = state.final_B[row_M] + place_M
    if rejects:
        likely = logits_MV.topk(min(NUM_CANDIDATES, logits_MV.shape[-1]))
        ids_M, probs_MC = sample_draft(state, row_M, position_M, likely.values, likely.indices)
        confidence_M = logits_MV.softmax(-1).amax(-1)
        state.candidates_BDC[row_M, place_M, : probs_MC.shape[-1]] = likely.indices.cpu()
        state.candidate_probs_BDC[row_M, place_M, : probs_MC.shape[-1]] = probs_MC.cpu()
    else:
        ids_M = choose_at(logits_MV, state, row_M, position_M)
        confidence_M = logits_MV.softmax(-1).gather(-1, ids_M[:, None])[:, 0]
    state.draft_BD[row_M, place_M] = ids_M.cpu()
    state.draft_confidence_BD[row_M, place_M] = confidence_M.cpu()


def copy_drafts(state: DecodeState, length: int, policy: DraftPolicy) -> None:
    """Replace drafts by what followed the last tokens earlier, where the policy expects more of that. No copy
    reaches beyond the end of the response.
    """
    ids_BD, match_B = look_up(state, length)
    column_D = torch.arange(length)
    left_B = state.num_prompt_B + state.limit_B - state.final_B
    is_copied_BD = (match_B[:, None] > 0) & (column_D < left_B[:, None])
    match_BD = torch.where(is_copied_BD, match_B[:, None] + column_D, 0)
    state.draft_match_BD.zero_()
    match_BD = torch.cat([match_BD, state.draft_match_BD[:, length:]], 1)
    row_R = torch.tensor(policy.prefers_copy(state, match_BD)).nonzero()[:, 0]
    state.draft_BD[row_R, :length] = ids_BD[row_R]
    state.draft_match_BD[row_R] = match_BD[row_R]
    state.num_draft_B[row_R] = is_copied_BD[row_R].sum(1)
    if state.candidates_BDC.shape[-1]:  # rejection: a copy has probability 1
        state.candidates_BDC[row_R, :length, 0] = ids_BD[row_R]
        state.candidate_probs_BDC[row_R] = 0
        state.candidate_probs_BDC[row_R, :length, 0] = 1


def draft_in_sequence(
    model: DiffusionLM, state: DecodeState, hidden_NH: Tensor, first_slot_B: Tensor, *, rejects: bool
) -> None:
    """Write drafts token by token: the draft head reads each before the next is chosen, from the candidates
    that its mask finds most likely by itself. `first_slot_B`: the packed slot of each draft's first mask.
    """
    assert model.draft_head is not None
    row_R = state.num_draft_B.nonzero()[:, 0]
    length = int(state.num_draft_B.max())
    # a shorter draft repeats its last mask
    place_RD = torch.arange(length).minimum(state.num_draft_B[row_R, None] - 1)
    slot_RD = (first_slot_B[row_R, None] + place_RD).to(model.device)
    logits_RDV = model.logits(hidden_NH[slot_RD])
    likely = logits_RDV.topk(min(NUM_CANDIDATES, logits_RDV.shape[-1]))
    position_R = state.final_B[row_R]
    token_R, state_RW = state.tokens_BL[row_R, position_R - 1].to(model.device), None
    tokens, confidences, probs = [], [], []  # read by the CPU once, at the end
    for place in range(length):
        state_RW = model.draft_head.advance(model.embed(model.student, token_R), state_RW)
        hidden_RH = model.draft_head(hidden_NH[slot_RD[:, place]], state_RW)
        ids_RC = likely.indices[:, place]
        scores_RC = model.candidate_logits(hidden_RH, ids_RC)
        scores_RC.masked_fill_(likely.values[:, place] == -torch.inf, -torch.inf)  # banned ids
        if rejects:
            token_R, probs_RC = sample_draft(state, row_R, position_R + place, scores_RC, ids_RC)
            probs.append(probs_RC)
            confidences.append(likely.values[:, place].softmax(-1)[:, 0])  # the head has read drawn tokens
        else:
            column_R1 = choose_at(scores_RC, state, row_R, position_R + place, ids_RC)[:, None]
            token_R = ids_RC.gather(-1, column_R1)[:, 0]
            confidences.append(scores_RC.softmax(-1).gather(-1, column_R1)[:, 0])
        tokens.append(token_R)
    state.draft_BD[row_R, :length] = torch.stack(tokens, 1).cpu()
    state.draft_confidence_BD[row_R, :length] = torch.stack(confidences, 1).cpu()
    if rejects:
        num_candidates = likely.indices.shape[-1]
        state.candidates_BDC[row_R, :length, :num_candidates] = likely.indices.cpu()
        state.candidate_probs_BDC[row_R, :length, :num_candidates] = torch.stack(probs, 1).cpu()


def choose_at(
    logits_MV: Tensor, state: DecodeState, row_M: Tensor, position_M: Tensor, ids_MV: Tensor | None = None
) -> Tensor:
    """The token `[M]` of each position; with `ids_MV`, the tokens of the columns, the column. The noise
    depends on seed, position and token only: draft and AR model share it.
    """
    if not state.sampling_B3[:, 0].any():  # saves computing the noise keys
        return logits_MV.argmax(-1)
    key_M = noise_keys(state.seed_B[row_M], position_M, 0).to(logits_MV.device)
    return choose_tokens(logits_MV, state.sampling_B3[row_M], key_M, ids_MV)


def sample_draft(
    state: DecodeState, row_M: Tensor, position_M: Tensor, scores_MC: Tensor, ids_MC: Tensor
) -> tuple[Tensor, Tensor]:
    """Draft tokens `[M]`, sampled with noise of their own, and probabilities `[M, C]` of the candidates."""
    sampling_M3 = state.sampling_B3[row_M]
    scaled_MC = scale_logits(scores_MC, sampling_M3)
    key_M = noise_keys(state.seed_B[row_M], position_M, DRAFT_TOKENS).to(ids_MC.device)
    choice_M = draw_tokens(scaled_MC, sampling_M3, key_M)
    return ids_MC.gather(-1, choice_M[:, None])[:, 0], scaled_MC.softmax(-1)


def accept_or_replace(
    logits_MV: Tensor,
    state: DecodeState,
    row_M: Tensor,
    place_M: Tensor,
    position_M: Tensor,
    num_verified_B: Tensor,
) -> Tensor:
    """The token `[M]` at each place of the drafts: the draft token d with probability min(1, p(d) / q(d)),
    else a sample of max(p - q, 0), which is never d; after the verified ones, a sample of p.
    """
    seed_M, sampling_M3 = state.seed_B[row_M], state.sampling_B3[row_M]

    def accept(scaled_NV: Tensor, index_N: Tensor) -> Tensor:
        """Logits of what replaces the draft token, which has infinite ones where it is accepted."""
        at_N = row_M[index_N], place_M[index_N]
        p_NV = scaled_NV.softmax(-1)
        q_NV = torch.zeros_like(p_NV)
        q_NV.scatter_add_(
            -1, state.candidates_BDC[at_N].to(p_NV.device), state.candidate_probs_BDC[at_N].to(p_NV)
        )
        draft_N1 = state.draft_BD[at_N][:, None].to(p_NV.device)
        uniform_N = uniform_numbers(noise_keys(seed_M[index_N], position_M[index_N], ACCEPTANCE))
        is_accepted_N1 = uniform_N[:, None].to(p_NV) * q_NV.gather(-1, draft_N1) < p_NV.gather(-1, draft_N1)
        left_NV = (p_NV - q_NV).clamp_(min=0)
        left_NV = torch.where(left_NV.any(-1, keepdim=True), left_NV, p_NV)  # rounding may leave nothing
        logits_NV = left_NV.log_()
        of_draft_N1 = torch.where(is_accepted_N1, torch.inf, logits_NV.gather(-1, draft_N1))
        return logits_NV.scatter_(-1, draft_N1, of_draft_N1)

    is_tried_M = (place_M < num_verified_B[row_M]) & is_sampled(sampling_M3)
    scores_MV = update_rows(scale_logits(logits_MV, sampling_M3), is_tried_M, accept)
    key_M = noise_keys(seed_M, position_M, 0).to(logits_MV.device)
    return draw_tokens(scores_MV, sampling_M3, key_M)


def logits_at(model: DiffusionLM, hidden_NH: Tensor, slot_M: Tensor, is_clean: bool) -> Tensor:
    """Logits `[M, V]` of packed slots, which are either all clean or all noised."""
    slot_M = slot_M.to(model.device)
    return model.logits(hidden_NH[slot_M], torch.ones_like(slot_M, dtype=torch.bool) if is_clean else None)
