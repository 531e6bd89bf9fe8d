"""One denoising step: a forward over [newly known tokens as clean slots | slots of the current block].

The clean slots commit the tokens that the previous step made known, so committing takes no forward of its
own, and the prefill of a new prompt is its first commit. In `preserve` the first unknown token of a block is
predicted by a clean slot, that is, by the AR model. AR decoding is `preserve` with blocks of one token, where
no slot is noised (docs/concepts.md, "Rollouts and remasking"; layout of BD3LM, arXiv 2503.09573).

Shape suffixes: B rows, L row capacity, S slots, T positions of a block, M masked positions, N chosen ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling.diffusion_lm import DiffusionLM
from ..modeling.kv_cache import DecodeCache
from ..modeling.slots import CLEAN, Format, Grid, Slots, join_slots
from .decode_config import DecodeConfig
from .decode_state import NO_PROCESSORS, DecodeState, Processors
from .rollout import NEVER
from .unmasking import (
    REMASKING,
    choose_revealed,
    choose_tokens,
    choose_within_entropy,
    entropies,
    noise_keys,
    num_to_reveal,
    propose_tokens,
)


def denoise_step(
    model: DiffusionLM,
    state: DecodeState,
    cache: DecodeCache,
    config: DecodeConfig,
    grid: Grid,
    fmt: Format,
    processors: Processors = NO_PROCESSORS,
) -> None:
    """Commit the newly known tokens, propose tokens for the block of each row and reveal some of them.

    Changes `state` and `cache`. Every row reveals at least one token, unless the AR model rejects one.
    `processors` are for mode `ar`.
    """
    mask_id = model.spec.mask_token_id
    frontier_B = state.frontier(mask_id)
    start_B = grid.block_start(frontier_B, state.num_prompt_B)
    clean_from_B, clean_to_B, noised_from_B, noised_to_B = slot_spans(
        state, frontier_B, start_B, grid.block_size, fmt
    )
    clean = state.span(clean_from_B, clean_to_B, grid, fmt, group=CLEAN)
    noised = state.span(noised_from_B, noised_to_B, grid, fmt, group=1)
    hidden_BSH, num_forwards = model.decode_hidden(join_slots(clean, noised), cache)
    state.committed_B = clean_to_B
    state.num_forwards_B = state.num_forwards_B + num_forwards
    state.num_steps_B = state.num_steps_B + 1
    rejected_B = torch.zeros_like(frontier_B, dtype=torch.bool)
    can_reject = fmt == "preserve" and config.mode != "ar" and config.ar_accept_threshold > 0
    if can_reject:
        rejected_B = reject_unlikely(model, state, clean, hidden_BSH, frontier_B, config)

    positions_BT = start_B[:, None] + torch.arange(grid.block_size)
    masked_BT = (state.tokens_BL.gather(1, positions_BT) == mask_id) & ~rejected_B[:, None]
    row_M, offset_M = masked_BT.nonzero(as_tuple=True)
    target_M = positions_BT[row_M, offset_M]
    num_clean = clean.ids_BS.shape[1]
    is_first_M = target_M == frontier_B[row_M]
    if fmt == "preserve":  # slot i - 1 predicts token i
        from_noised_M = num_clean + target_M - 1 - frontier_B[row_M]
        column_M = torch.where(is_first_M, (clean_to_B - clean_from_B)[row_M] - 1, from_noised_M)
    else:
        column_M = num_clean + offset_M
    is_clean_M = is_first_M if model.spec.format == "preserve" else None
    logits_MV = slot_logits(model, hidden_BSH, row_M, column_M, is_clean_M)
    step_M = state.num_steps_B[row_M] if config.mode != "ar" else 0  # `ar` shares its noise with `lossless`
    key_M = noise_keys(state.seed_B[row_M], target_M, step_M).to(model.device)
    processed_MV = state.process(logits_MV, row_M, target_M, processors)
    ids_M, confidence_M = propose_tokens(logits_MV, state.sampling_B3[row_M], key_M, processed_MV)

    confidence_BT = torch.zeros(masked_BT.shape)
    confidence_BT[row_M, offset_M] = confidence_M.cpu()
    revealed_BT = choose_positions(state, masked_BT, confidence_BT, logits_MV, config)
    reveal(state, (row_M, offset_M, target_M), ids_M.cpu(), confidence_BT, revealed_BT)
    is_block_done_B = (revealed_BT == masked_BT).all(1)
    state.block_step_B = torch.where(is_block_done_B, 0, state.block_step_B + 1)
    final_B = frontier_B + 1 if can_reject else state.frontier(mask_id)
    state.final_B = torch.where(rejected_B, state.final_B, final_B)


def slot_spans(
    state: DecodeState, frontier_B: Tensor, start_B: Tensor, block_size: int, fmt: Format
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First position and end (exclusive) of the clean slots, then of the noised slots; each `[B]`."""
    if (
        fmt == "preserve"
    ):  # the clean slot before the frontier predicts the frontier, so it is always computed
        clean_from_B = torch.minimum(state.committed_B, frontier_B - 1)
        return clean_from_B, frontier_B, frontier_B, start_B + block_size - 1
    return state.committed_B, start_B, start_B, start_B + block_size


def slot_logits(
    model: DiffusionLM, hidden_BSH: Tensor, row_M: Tensor, column_M: Tensor, is_clean_M: Tensor | None = None
) -> Tensor:
    """Logits `[M, V]` of the slots at these rows and columns; the LM head is computed for no others."""
    row_M, column_M = row_M.to(model.device), column_M.to(model.device)
    return model.logits(
        hidden_BSH[row_M, column_M], is_clean_M if is_clean_M is None else is_clean_M.to(model.device)
    )


def choose_positions(
    state: DecodeState, masked_BT: Tensor, confidence_BT: Tensor, logits_MV: Tensor, config: DecodeConfig
) -> Tensor:
    """Bool `[B, T]`: the masked positions that this step reveals, by the remasking rule of the mode."""
    remasking, block_size = REMASKING[config.mode], masked_BT.shape[1]
    if remasking == "entropy_bounded":
        entropy_BT = torch.zeros(masked_BT.shape)
        entropy_BT[masked_BT] = entropies(logits_MV).cpu()
        return choose_within_entropy(entropy_BT, masked_BT, config.entropy_bound)
    steps = min(config.denoising_steps or block_size, block_size)
    num_B = num_to_reveal(state.block_step_B, block_size, steps)
    return choose_revealed(confidence_BT, masked_BT, num_B, remasking, config.confidence_threshold)


def reveal(
    state: DecodeState,
    places: tuple[Tensor, Tensor, Tensor],
    ids_M: Tensor,
    confidence_BT: Tensor,
    revealed_BT: Tensor,
) -> None:
    """Write the revealed tokens. `places`: row, offset in the block and position of every masked token."""
    row_M, offset_M, position_M = places
    chosen_M = revealed_BT[row_M, offset_M]
    row_N, position_N = row_M[chosen_M], position_M[chosen_M]
    state.tokens_BL[row_N, position_N] = ids_M[chosen_M]
    state.unmask_step_BL[row_N, position_N] = state.num_steps_B[row_N]
    state.logprob_BL[row_N, position_N] = confidence_BT[row_N, offset_M[chosen_M]].log()


def reject_unlikely(
    model: DiffusionLM,
    state: DecodeState,
    clean: Slots,
    hidden_BSH: Tensor,
    frontier_B: Tensor,
    config: DecodeConfig,
) -> Tensor:
    """Reject tokens that the AR model finds unlikely; bool `[B]`: rows in which a token was rejected.

    The clean slot of token t - 1 predicts token t, so committing the revealed tokens also evaluates them.
    Consider the first token that is not the AR arg-max and whose AR probability is below
    `ar_accept_threshold`: it is replaced by a token of the AR model, which is final, and every token after it
    is masked again (docs/concepts.md, "Decoding modes").
    """
    mask_id = model.spec.mask_token_id
    target_BS = clean.positions_BS + 1
    is_draft_BS = (clean.group_BS == CLEAN) & (target_BS < frontier_B[:, None])
    is_draft_BS &= target_BS >= state.num_prompt_B[:, None]
    row_M, column_M = is_draft_BS.nonzero(as_tuple=True)
    if not len(row_M):
        return torch.zeros_like(frontier_B, dtype=torch.bool)
    position_M = target_BS[row_M, column_M]
    logits_MV = slot_logits(model, hidden_BSH, row_M, column_M, torch.ones_like(row_M, dtype=torch.bool))
    token_M = state.tokens_BL[row_M, position_M]
    probs_MV = logits_MV.softmax(-1)
    likelihood_M = probs_MV.gather(-1, token_M.to(model.device)[:, None])[:, 0].cpu()
    is_unlikely_M = (likelihood_M < config.ar_accept_threshold) & (token_M != logits_MV.argmax(-1).cpu())
    unlikely_BL = torch.zeros_like(state.tokens_BL, dtype=torch.bool)
    unlikely_BL[row_M[is_unlikely_M], position_M[is_unlikely_M]] = True
    rejected_B = unlikely_BL.any(1)
    first_B = unlikely_BL.long().argmax(1)
    is_first_M = is_unlikely_M & (position_M == first_B[row_M])
    row_N, position_N = row_M[is_first_M], position_M[is_first_M]
    key_N = noise_keys(state.seed_B[row_N], position_N, -state.num_steps_B[row_N]).to(model.device)
    ar_NV = logits_MV[is_first_M.to(model.device)]
    ids_N = choose_tokens(ar_NV, state.sampling_B3[row_N], key_N)

    column_L = torch.arange(state.tokens_BL.shape[1])
    masked_BL = rejected_B[:, None] & (column_L >= first_B[:, None])
    state.tokens_BL = state.tokens_BL.masked_fill(masked_BL, mask_id)
    state.unmask_step_BL = state.unmask_step_BL.masked_fill(masked_BL, NEVER)
    state.tokens_BL[row_N, position_N] = ids_N.cpu()
    state.is_replaced_BL[row_N, position_N] = True
    state.unmask_step_BL[row_N, position_N] = state.num_steps_B[row_N]
    state.logprob_BL[row_N, position_N] = ar_NV.log_softmax(-1).gather(-1, ids_N[:, None])[:, 0].cpu()
    state.committed_B = torch.where(rejected_B, first_B, state.committed_B)
    state.final_B = torch.where(rejected_B, first_B + 1, state.final_B)
    return rejected_B
