"""One denoising step: a forward over [new clean slots | slots of the block being denoised].

The clean slots commit what the last step completed, so the commit costs no forward of its own, and a joining
prompt's prefill is simply its first commit. AR decoding is `preserve` with blocks of one token, where nothing
is ever noised. `preserve` predicts the first unknown token of a block from a clean slot, so that prediction
*is* the AR model's. METHOD part 3.

Shape suffixes: B rows, L row capacity, S slots, T positions of a block, M masked positions, N chosen ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling.diffusion_lm import DiffusionLM
from ..modeling.kv_cache import DecodeCache
from ..modeling.slots import CLEAN, Format, Grid, Slots, join_slots
from .decode_config import DecodeConfig
from .decode_state import DecodeState
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
    model: DiffusionLM, rows: DecodeState, cache: DecodeCache, config: DecodeConfig, grid: Grid, fmt: Format
) -> None:
    """Commit what is newly known, propose tokens for each row's block, reveal some of them."""
    mask_id, block_size = model.spec.mask_token_id, grid.block_size
    frontier_B = rows.frontier(mask_id)
    start_B = grid.block_start(frontier_B, rows.num_prompt_B)
    if fmt == "preserve":  # slot i-1 predicts token i; the frontier's prediction comes from a clean slot
        clean_from_B = torch.minimum(rows.committed_B, frontier_B - 1)
        clean_to_B, noised_from_B, noised_to_B = frontier_B, frontier_B, start_B + block_size - 1
    else:
        clean_from_B, clean_to_B = rows.committed_B, start_B
        noised_from_B, noised_to_B = start_B, start_B + block_size
    clean = rows.span(clean_from_B, clean_to_B, grid, fmt, group=CLEAN)
    noised = rows.span(noised_from_B, noised_to_B, grid, fmt, group=1)
    hidden_BSH, num_forwards = model.decode_hidden(join_slots(clean, noised), cache)
    rows.committed_B = clean_to_B
    rows.num_forwards_B = rows.num_forwards_B + num_forwards
    rows.num_steps_B = rows.num_steps_B + 1
    rejected_B = torch.zeros_like(frontier_B, dtype=torch.bool)
    checks = fmt == "preserve" and config.mode != "ar" and config.ar_accept_threshold > 0
    if checks:
        rejected_B = veto(model, rows, clean, hidden_BSH, frontier_B, config)

    positions_BT = start_B[:, None] + torch.arange(block_size)
    masked_BT = (rows.tokens_BL.gather(1, positions_BT) == mask_id) & ~rejected_B[:, None]
    row_M, offset_M = masked_BT.nonzero(as_tuple=True)
    target_M = positions_BT[row_M, offset_M]
    num_clean = clean.ids_BS.shape[1]
    if fmt == "preserve":
        from_noised_M = num_clean + target_M - 1 - frontier_B[row_M]
        from_clean_M = (clean_to_B - clean_from_B)[row_M] - 1
        column_M = torch.where(target_M == frontier_B[row_M], from_clean_M, from_noised_M)
    else:
        column_M = num_clean + offset_M
    is_clean_M = (target_M == frontier_B[row_M]) if model.spec.format == "preserve" else None
    logits_MV = slot_logits(model, hidden_BSH, row_M, column_M, is_clean_M)
    step_M = rows.num_steps_B[row_M] if config.mode != "ar" else 0  # AR and lossless draw alike
    key_M = noise_keys(rows.seed_B[row_M], target_M, step_M).to(model.device)
    ids_M, confidence_M = propose_tokens(logits_MV, config.temperature, config.top_k, config.top_p, key_M)

    confidence_BT = torch.zeros(masked_BT.shape)
    confidence_BT[row_M, offset_M] = confidence_M.cpu()
    revealed_BT = choose(rows, masked_BT, confidence_BT, logits_MV, config)
    reveal(rows, (row_M, offset_M, target_M), ids_M.cpu(), confidence_BT, revealed_BT)
    is_block_done_B = (revealed_BT == masked_BT).all(1)
    rows.block_step_B = torch.where(is_block_done_B, 0, rows.block_step_B + 1)
    unjudged_B = frontier_B + 1 if checks else rows.frontier(mask_id)
    rows.final_B = torch.where(rejected_B, rows.final_B, unjudged_B)


def slot_logits(
    model: DiffusionLM, hidden_BSH: Tensor, row_M: Tensor, column_M: Tensor, is_clean_M: Tensor | None = None
) -> Tensor:
    """Logits `[M, V]` of the slots named by row and column: the LM head runs on no others."""
    row_M, column_M = row_M.to(model.device), column_M.to(model.device)
    return model.logits(
        hidden_BSH[row_M, column_M], is_clean_M if is_clean_M is None else is_clean_M.to(model.device)
    )


def choose(
    rows: DecodeState, masked_BT: Tensor, confidence_BT: Tensor, logits_MV: Tensor, config: DecodeConfig
) -> Tensor:
    """Bool `[B, T]`: which masked positions are revealed now."""
    remasking, block_size = REMASKING[config.mode], masked_BT.shape[1]
    if remasking == "entropy_bounded":
        entropy_BT = torch.zeros(masked_BT.shape)
        entropy_BT[masked_BT] = entropies(logits_MV).cpu()
        return choose_within_entropy(entropy_BT, masked_BT, config.entropy_bound)
    steps = min(config.denoising_steps or block_size, block_size)
    num_B = num_to_reveal(rows.block_step_B, block_size, steps)
    return choose_revealed(confidence_BT, masked_BT, num_B, remasking, config.confidence_threshold)


def reveal(
    rows: DecodeState,
    places: tuple[Tensor, Tensor, Tensor],
    ids_M: Tensor,
    confidence_BT: Tensor,
    revealed_BT: Tensor,
) -> None:
    """Write the chosen tokens. `places`: row, offset in the block and position of every masked token."""
    row_M, offset_M, position_M = places
    chosen_M = revealed_BT[row_M, offset_M]
    row_N, position_N = row_M[chosen_M], position_M[chosen_M]
    rows.tokens_BL[row_N, position_N] = ids_M[chosen_M]
    rows.unmask_step_BL[row_N, position_N] = rows.num_steps_B[row_N]
    rows.logprob_BL[row_N, position_N] = confidence_BT[row_N, offset_M[chosen_M]].log()


def veto(
    model: DiffusionLM,
    rows: DecodeState,
    clean: Slots,
    hidden_BSH: Tensor,
    frontier_B: Tensor,
    config: DecodeConfig,
) -> Tensor:
    """Take back what the AR model does not believe; bool `[B]`: rows where that happened.

    The clean slot of token t - 1 holds the AR model's prediction of token t, so committing a draft also
    judges it. The first token below the floor is replaced by the AR model's own, and everything after it is
    masked again.
    """
    mask_id = model.spec.mask_token_id
    judged_BS = clean.positions_BS + 1
    is_draft_BS = (clean.group_BS == CLEAN) & (judged_BS < frontier_B[:, None])
    is_draft_BS &= judged_BS >= rows.num_prompt_B[:, None]
    row_M, column_M = is_draft_BS.nonzero(as_tuple=True)
    if not len(row_M):
        return torch.zeros_like(frontier_B, dtype=torch.bool)
    position_M = judged_BS[row_M, column_M]
    logits_MV = slot_logits(model, hidden_BSH, row_M, column_M, torch.ones_like(row_M, dtype=torch.bool))
    token_M = rows.tokens_BL[row_M, position_M]
    probs_MV = logits_MV.softmax(-1)
    likelihood_M = probs_MV.gather(-1, token_M.to(model.device)[:, None])[:, 0].cpu()
    is_bad_M = (likelihood_M < config.ar_accept_threshold) & (token_M != logits_MV.argmax(-1).cpu())
    bad_BL = torch.zeros_like(rows.tokens_BL, dtype=torch.bool)
    bad_BL[row_M[is_bad_M], position_M[is_bad_M]] = True
    rejected_B = bad_BL.any(1)
    first_B = bad_BL.long().argmax(1)
    is_first_M = is_bad_M & (position_M == first_B[row_M])
    row_N, position_N = row_M[is_first_M], position_M[is_first_M]
    key_N = noise_keys(rows.seed_B[row_N], position_N, -rows.num_steps_B[row_N]).to(model.device)
    own_NV = logits_MV[is_first_M.to(model.device)]
    ids_N = choose_tokens(own_NV, config.temperature, config.top_k, config.top_p, key_N)

    column_L = torch.arange(rows.tokens_BL.shape[1])
    retract_BL = rejected_B[:, None] & (column_L >= first_B[:, None])
    rows.tokens_BL = rows.tokens_BL.masked_fill(retract_BL, mask_id)
    rows.unmask_step_BL = rows.unmask_step_BL.masked_fill(retract_BL, NEVER)
    rows.tokens_BL[row_N, position_N] = ids_N.cpu()
    rows.unmask_step_BL[row_N, position_N] = rows.num_steps_B[row_N]
    rows.logprob_BL[row_N, position_N] = own_NV.log_softmax(-1).gather(-1, ids_N[:, None])[:, 0].cpu()
    rows.committed_B = torch.where(rejected_B, first_B, rows.committed_B)
    rows.final_B = torch.where(rejected_B, first_B + 1, rows.final_B)
    return rejected_B
