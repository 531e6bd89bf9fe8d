"""Drafts copied from the text: what followed the last tokens where they occurred before.

Prompt lookup decoding (A. Saxena, 2023; `prompt_lookup_num_tokens` of transformers). Text that repeats its
prompt or itself, such as code, is drafted at no cost. Of the earlier places that match most of the last
tokens, the latest counts; where the draft reaches the end of the text, it goes on with its own tokens.

Shape suffixes: B rows, L row capacity, D draft length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decode_state import DecodeState

LONGEST_MATCH = 8
"""Of the last tokens, so many are compared."""


def look_up(state: DecodeState, length: int) -> tuple[Tensor, Tensor]:
    """For each row `length` tokens `[B, D]` after its last final token, and the number `[B]` of tokens that
    match there; where it is 0, there is no draft.
    """
    last_B = state.final_B - 1
    tokens_BL = state.tokens_BL[:, : int(last_B.max()) + 1]
    column_L = torch.arange(tokens_BL.shape[1])
    matches_BL = column_L < last_B[:, None]
    match_BL = torch.zeros_like(tokens_BL)
    for back in range(min(LONGEST_MATCH, tokens_BL.shape[1])):
        token_B1 = tokens_BL.gather(1, (last_B - back).clamp(min=0)[:, None])
        matches_BL[:, :back] = False
        matches_BL[:, back:] &= tokens_BL[:, : tokens_BL.shape[1] - back] == token_B1
        match_BL += matches_BL
    match_B = match_BL.amax(1)
    is_best_BL = (match_BL == match_B[:, None]) & (column_L < last_B[:, None])
    place_B = torch.where(is_best_BL, column_L, -1).amax(1)
    period_B1 = (last_B - place_B).clamp(min=1)[:, None]
    draft_BD = tokens_BL.gather(1, (place_B + 1)[:, None] + torch.arange(length) % period_B1)
    return draft_BD, match_B
