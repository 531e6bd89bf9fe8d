"""The rows that decode together, and how: settings, costs, and the bookkeeping of every row.

All of it lives on the CPU as small integer tensors: a step sends its slots to the device and fetches the
tokens that came out, and nothing else travels. Rows come and go; the first rows of the cache are the active
ones, so the last rows move into the places of those that left.

Shape suffixes: B rows, L row capacity, S slots, D draft length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..modeling.kv_cache import DecodeCache
from ..modeling.slots import CLEAN, Format, Grid, Slots, clean_visible_until, make_slots
from .rollout import NEVER, Rollout


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """What decoding cost. `num_forwards` counts every forward pass that a row took part in, prefill
    included.
    """

    num_tokens: int
    num_forwards: int
    num_steps: int
    """Denoising steps (forwards that revealed tokens of the block), summed over rows."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> DecodeStats:
        """What these rollouts cost when they were decoded."""
        return cls(
            sum(r.num_response for r in rollouts),
            sum(r.num_forwards for r in rollouts),
            sum(r.num_steps for r in rollouts),
        )

    @property
    def tokens_per_forward(self) -> float:
        return self.num_tokens / max(1, self.num_forwards)

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / max(1, self.num_steps)


@dataclass(frozen=True, slots=True)
class Request:
    """What a row is to answer."""

    index: int
    """Names the request."""
    ids: Sequence[int]
    seed: int
    max_new_tokens: int


@dataclass(slots=True)
class DecodeState:
    """The active rows. Unknown positions of `tokens_BL` hold the mask id."""

    index_B: Tensor
    """Which prompt the row answers."""
    tokens_BL: Tensor
    unmask_step_BL: Tensor
    logprob_BL: Tensor
    num_prompt_B: Tensor
    limit_B: Tensor
    """Response tokens at most."""
    seed_B: Tensor
    committed_B: Tensor
    """Positions whose clean keys and values are in the cache."""
    final_B: Tensor
    """Positions that no later step can take back."""
    block_step_B: Tensor
    num_forwards_B: Tensor
    num_steps_B: Tensor
    draft_BD: Tensor
    """Lossless: proposed tokens after the last known one, `num_draft_B` of them."""
    draft_confidence_BD: Tensor
    num_draft_B: Tensor

    @classmethod
    def start(
        cls,
        requests: Sequence[Request],
        capacity: int,
        mask_token_id: int,
        draft_length: int,
    ) -> DecodeState:
        """A row for each request. A prompt that holds masks is a template: its gaps are the unknown, and the
        row ends where the template does.
        """
        num_rows = len(requests)
        tokens_BL = torch.full((num_rows, capacity), mask_token_id)
        unmask_step_BL = torch.full((num_rows, capacity), NEVER)
        num_prompt, limits = [], []
        for row, request in enumerate(requests):
            ids = request.ids
            tokens_BL[row, : len(ids)] = torch.tensor(ids)
            unmask_step_BL[row, : len(ids)].masked_fill_(tokens_BL[row, : len(ids)] != mask_token_id, 0)
            known = list(ids).index(mask_token_id) if mask_token_id in ids else len(ids)
            num_prompt.append(known)
            limits.append(len(ids) - known or request.max_new_tokens)
        zeros_B = torch.zeros(num_rows, dtype=torch.long)
        return cls(
            index_B=torch.tensor([request.index for request in requests], dtype=torch.long),
            tokens_BL=tokens_BL,
            unmask_step_BL=unmask_step_BL,
            logprob_BL=torch.zeros(num_rows, capacity),
            num_prompt_B=torch.tensor(num_prompt, dtype=torch.long),
            limit_B=torch.tensor(limits, dtype=torch.long),
            seed_B=torch.tensor([request.seed for request in requests], dtype=torch.long),
            committed_B=zeros_B,
            final_B=zeros_B.clone(),
            block_step_B=zeros_B.clone(),
            num_forwards_B=zeros_B.clone(),
            num_steps_B=zeros_B.clone(),
            draft_BD=torch.zeros((num_rows, draft_length), dtype=torch.long),
            draft_confidence_BD=torch.zeros((num_rows, draft_length)),
            num_draft_B=zeros_B.clone(),
        )

    def __len__(self) -> int:
        return len(self.index_B)

    def join(self, other: DecodeState) -> None:
        """Append rows that start."""
        for field in fields(self):
            joined = torch.cat([getattr(self, field.name), getattr(other, field.name)])
            setattr(self, field.name, joined)

    def keep(self, keep_B: Tensor, cache: DecodeCache) -> None:
        """Drop every other row; the last rows move into their places, here and in the cache."""
        num_kept = int(keep_B.sum())
        order_B = torch.arange(num_kept)
        free_N = (~keep_B[:num_kept]).nonzero()[:, 0]
        moved_N = num_kept + keep_B[num_kept:].nonzero()[:, 0]
        order_B[free_N] = moved_N
        if len(moved_N):
            cache.move(moved_N, free_N)
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[order_B])

    def frontier(self, mask_token_id: int) -> Tensor:
        """First unknown position of each row `[B]`: everything before it is known."""
        return (self.tokens_BL == mask_token_id).long().argmax(1)

    def span(self, from_B: Tensor, to_B: Tensor, grid: Grid, fmt: Format, group: int) -> Slots:
        """Slots for the positions [from, to) of each row, left-aligned, padded to the widest row."""
        width = max(int((to_B - from_B).max()), 0)
        positions_BS = from_B[:, None] + torch.arange(width)
        valid_BS = positions_BS < to_B[:, None]
        positions_BS = torch.where(valid_BS, positions_BS, 0)
        if group == CLEAN:
            visible_until_BS = clean_visible_until(positions_BS, self.num_prompt_B[:, None], grid, fmt)
        else:
            visible_until_BS = (from_B - 1)[:, None].expand_as(positions_BS)
        group_BS = torch.full_like(positions_BS, group)
        return make_slots(
            self.tokens_BL.gather(1, positions_BS), positions_BS, visible_until_BS, group_BS, valid_BS
        )
