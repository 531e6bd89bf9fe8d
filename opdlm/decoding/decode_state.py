"""The state of the rows that decode together, and what their decoding cost.

The state consists of small CPU tensors. A step copies its slots to the device and the chosen tokens back, and
nothing else. The active rows are the first rows of the cache: when rows finish, the last active rows take
their places.

Shape suffixes: B rows, L row capacity, S slots, D draft length, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..modeling.kv_cache import DecodeCache
from ..modeling.slots import CLEAN, Format, Grid, Slots, clean_visible_until, make_slots
from .decode_config import DecodeConfig
from .rollout import NEVER, Rollout
from .unmasking import sampling_of

LogitsProcessor = Callable[[Any, Any], Tensor]
"""(prompt and response so far `[1, L]`, float32 logits `[1, V]`) -> logits `[1, V]`: as in transformers, but
without memory of earlier calls, since some are about drafts that are not accepted.
"""
Processors = Mapping[int, LogitsProcessor]
"""By index of the request."""
NO_PROCESSORS: Processors = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """The cost of decoding, summed over rows."""

    num_tokens: int
    num_forwards: int
    """Forward passes in which a row took part, the prefill included."""
    num_steps: int
    """Denoising steps; a step takes two forwards where student and teacher are separate models."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> DecodeStats:
        """The cost of these rollouts."""
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
    """A prompt that waits to be decoded."""

    index: int
    """Identifies the request."""
    ids: Sequence[int]
    """Token ids of the prompt."""
    seed: int
    config: DecodeConfig
    """Its max_new_tokens, temperature, top_k, top_p and logprobs count; the rest is that of the batch."""
    ignore_eos: bool = False
    """Whether stop tokens of the checkpoint do not end the response."""
    logits_processor: LogitsProcessor | None = None
    """Changes the AR model's logits, in modes `ar` and `lossless`."""


@dataclass(slots=True)
class DecodeState:
    """The active rows."""

    index_B: Tensor
    """Index of the request that the row decodes."""
    tokens_BL: Tensor
    """Prompt and response; unknown positions hold the mask id."""
    unmask_step_BL: Tensor
    """Denoising step that revealed the token: 0 for the prompt, NEVER where the token is unknown."""
    logprob_BL: Tensor
    is_replaced_BL: Tensor
    """Whether the AR model put the token in place of the student's."""
    num_prompt_B: Tensor
    limit_B: Tensor
    """Largest number of response tokens."""
    seed_B: Tensor
    sampling_B3: Tensor
    """Temperature, top_k and top_p (`unmasking.sampling_of`)."""
    ignore_eos_B: Tensor
    has_logprobs_B: Tensor
    """Whether the log-probabilities of the tokens are recorded."""
    committed_B: Tensor
    """Number of positions whose clean keys and values are in the cache."""
    final_B: Tensor
    """Number of positions whose tokens no later step can change."""
    block_step_B: Tensor
    """Denoising steps that the current block has taken."""
    num_forwards_B: Tensor
    num_steps_B: Tensor
    draft_BD: Tensor
    """`lossless`: proposed tokens after the last known one, of which the first `num_draft_B` count."""
    draft_confidence_BD: Tensor
    """Probability of each proposed token under the student; with `draft_sampling=rejection` that of the
    likeliest token.
    """
    draft_match_BD: Tensor
    """Of a draft that was copied from the text: how many tokens before each matched there; else 0."""
    candidates_BDC: Tensor
    """`draft_sampling=rejection`: the ids that each proposed token was drawn from."""
    candidate_probs_BDC: Tensor
    num_draft_B: Tensor

    @classmethod
    def start(
        cls,
        requests: Sequence[Request],
        capacity: int,
        mask_token_id: int,
        draft_length: int,
        num_candidates: int = 0,
    ) -> DecodeState:
        """One row of `capacity` positions per request. A prompt that contains the mask id is a template: its
        masks are the unknown tokens, and the row ends where the template does.
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
            limits.append(len(ids) - known or request.config.max_new_tokens)
        zeros_B = torch.zeros(num_rows, dtype=torch.long)
        return cls(
            index_B=torch.tensor([request.index for request in requests], dtype=torch.long),
            tokens_BL=tokens_BL,
            unmask_step_BL=unmask_step_BL,
            logprob_BL=torch.zeros(num_rows, capacity),
            is_replaced_BL=torch.zeros(num_rows, capacity, dtype=torch.bool),
            num_prompt_B=torch.tensor(num_prompt, dtype=torch.long),
            limit_B=torch.tensor(limits, dtype=torch.long),
            seed_B=torch.tensor([request.seed for request in requests], dtype=torch.long),
            sampling_B3=torch.tensor(
                [sampling_of(request.config) for request in requests], dtype=torch.float64
            ).view(-1, 3),
            ignore_eos_B=torch.tensor([request.ignore_eos for request in requests], dtype=torch.bool),
            has_logprobs_B=torch.tensor([request.config.logprobs for request in requests], dtype=torch.bool),
            committed_B=zeros_B,
            final_B=zeros_B.clone(),
            block_step_B=zeros_B.clone(),
            num_forwards_B=zeros_B.clone(),
            num_steps_B=zeros_B.clone(),
            draft_BD=torch.zeros((num_rows, draft_length), dtype=torch.long),
            draft_confidence_BD=torch.zeros((num_rows, draft_length)),
            draft_match_BD=torch.zeros((num_rows, draft_length), dtype=torch.long),
            candidates_BDC=torch.zeros((num_rows, draft_length, num_candidates), dtype=torch.long),
            candidate_probs_BDC=torch.zeros((num_rows, draft_length, num_candidates)),
            num_draft_B=zeros_B.clone(),
        )

    def __len__(self) -> int:
        return len(self.index_B)

    def join(self, other: DecodeState) -> None:
        """Append the rows of another state."""
        for field in fields(self):
            joined = torch.cat([getattr(self, field.name), getattr(other, field.name)])
            setattr(self, field.name, joined)

    def keep(self, keep_B: Tensor, cache: DecodeCache) -> None:
        """Keep the rows where `keep_B` is true; the last of them take the places of dropped rows, here and in
        the cache.
        """
        num_kept = int(keep_B.sum())
        order_B = torch.arange(num_kept)
        free_N = (~keep_B[:num_kept]).nonzero()[:, 0]
        moved_N = num_kept + keep_B[num_kept:].nonzero()[:, 0]
        order_B[free_N] = moved_N
        if len(moved_N):
            cache.move(moved_N, free_N)
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[order_B])

    def process(self, logits_MV: Tensor, row_M: Tensor, position_M: Tensor, processors: Processors) -> Tensor:
        """The logits of these positions after the processors of their requests, which read the tokens before
        each position.
        """
        index_M = self.index_B[row_M].tolist()
        chosen = [place for place, index in enumerate(index_M) if index in processors]
        if not chosen:
            return logits_MV
        processed = []
        for place in chosen:
            ids_1L = self.tokens_BL[row_M[place], : position_M[place]][None].to(logits_MV.device)
            processed.append(processors[index_M[place]](ids_1L, logits_MV[place][None])[0])
        place_N = torch.tensor(chosen, device=logits_MV.device)
        return logits_MV.index_copy(0, place_N, torch.stack(processed).to(logits_MV))

    def frontier(self, mask_token_id: int) -> Tensor:
        """First unknown position of each row `[B]`."""
        return (self.tokens_BL == mask_token_id).long().argmax(1)

    def max_steps(self, block_size: int) -> Tensor:
        """Upper bound on the denoising steps of each row `[B]`, which holds for every model.

        A row writes at most n = limit + block_size positions. A step reveals at least one token, or the AR
        model rejects one. A rejection makes one more token final and masks at most block_size - 1 others
        again, so there are at most n rejections and n * block_size steps that reveal.
        """
        return (self.limit_B + block_size) * (block_size + 1)

    def span(self, from_B: Tensor, to_B: Tensor, grid: Grid, fmt: Format, group: int) -> Slots:
        """Slots `[B, S]` of the positions [from, to) of each row, left-aligned, padded to the widest row."""
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
