"""Which tokens a denoising step proposes, and which of them it reveals.

Filters (temperature, top-k, top-p) shape what is sampled; the confidence of a token is its *unfiltered*
probability. Static: the n_s most confident positions. Dynamic: every position above the threshold, and at
least the top n_s; n_s = block_size // denoising_steps, one more in the first block_size % denoising_steps
steps. METHOD part 3.

Shape suffixes: M masked positions (flat), V vocabulary, B rows, T positions of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Remasking = Literal["low_confidence_static", "low_confidence_dynamic"]
Rng: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, or one for each of its rows: then no row's draws depend on its neighbours."""


def filter_logits(logits_MV: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Keep the `top_k` largest and the smallest set of mass >= `top_p`; the rest becomes -inf."""
    if top_k is not None and top_k < logits_MV.shape[-1]:
        smallest_M1 = logits_MV.topk(top_k, -1).values[:, -1:]
        logits_MV = logits_MV.masked_fill(logits_MV < smallest_M1, -torch.inf)
    if top_p is not None and top_p < 1.0:
        sorted_MV, order_MV = logits_MV.sort(-1, descending=True)
        probs_MV = sorted_MV.softmax(-1)
        drop_MV = probs_MV.cumsum(-1) - probs_MV >= top_p
        logits_MV = logits_MV.masked_fill(drop_MV.scatter(-1, order_MV, drop_MV), -torch.inf)
    return logits_MV


def sampling_probs(logits_MV: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The distribution that tokens are drawn from; temperature 0 puts everything on the arg-max."""
    if temperature == 0:
        return torch.zeros_like(logits_MV).scatter_(-1, logits_MV.argmax(-1, keepdim=True), 1.0)
    return filter_logits(logits_MV / temperature, top_k, top_p).softmax(-1)


def draw(probs_MV: Tensor, rng: Rng) -> Tensor:
    """One token per row of `probs_MV` (need not be normalised); a list of generators names one per row."""
    if not isinstance(rng, Sequence):
        return torch.multinomial(probs_MV, 1, generator=rng)[:, 0]
    noise_MV = torch.empty_like(probs_MV)
    for generator, same in groupby(range(len(rng)), key=rng.__getitem__):
        rows = list(same)
        noise_MV[rows[0] : rows[-1] + 1].exponential_(generator=generator)
    return (probs_MV / noise_MV).argmax(-1)  # as torch.multinomial draws one sample


def propose_tokens(
    logits_MV: Tensor, temperature: float, top_k: int | None, top_p: float | None, rng: Rng
) -> tuple[Tensor, Tensor]:
    """Tokens `[M]` and their confidences `[M]` for float32 logits whose banned ids are -inf."""
    if temperature == 0:
        ids_M = logits_MV.argmax(-1)
    else:
        ids_M = draw(sampling_probs(logits_MV, temperature, top_k, top_p), rng)
    confidence_M = logits_MV.softmax(-1).gather(-1, ids_M[:, None])[:, 0]
    return ids_M, confidence_M


def num_to_reveal(step: Tensor, block_size: int, denoising_steps: int) -> Tensor:
    """n_s of a block's `step` (0-based, any shape)."""
    return block_size // denoising_steps + (step < block_size % denoising_steps).long()


def choose_revealed(
    confidence_BT: Tensor, masked_BT: Tensor, num_B: Tensor, remasking: Remasking, threshold: float
) -> Tensor:
    """Bool `[B, T]`: positions revealed now, always a subset of `masked_BT`; ties go to the leftmost."""
    ranked_BT = confidence_BT.masked_fill(~masked_BT, -1.0)
    rank_BT = ranked_BT.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    revealed_BT = rank_BT < num_B[:, None]
    if remasking == "low_confidence_dynamic":
        revealed_BT = revealed_BT | (confidence_BT > threshold)
    return revealed_BT & masked_BT
