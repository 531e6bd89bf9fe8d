"""Scaled dot-product attention, and the two changes that families make to its scores.

A *softcap* c turns a score s into c * tanh(s / c), before the mask is added (Gemma 2, arXiv 2408.00118). A
*sink* is one more score of every query, a learned number per head: it takes part in the softmax and has no
value (gpt-oss, arXiv 2508.10925). With either, the scores are computed explicitly; otherwise torch's kernels
compute the attention.

Shape suffixes: B batch, S heads of keys, H heads of queries, G heads of queries that share keys, Q stacked
queries (G for each position), K keys, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scoring(NamedTuple):
    """How an attention layer turns products of queries and keys into scores."""

    scale: float | None = None
    """None: 1 / sqrt(head_dim)."""
    softcap: float | None = None
    sinks_H: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the scores are scaled products and nothing else."""
        return self.softcap is None and self.sinks_H is None


def dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring
) -> Tensor:
    """The output `[B, S, Q, D]` for queries `[B, S, Q, D]`, stacked head by head, keys and values
    `[B, S, K, D]` and an additive mask `[B, 1, Q, K]`.
    """
    scale, softcap, sinks_H = scoring
    if scoring.is_plain:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    products_BSQK = query @ key.transpose(2, 3)
    # float16 could not hold the sum of a score and a mask
    precision = torch.promote_types(query.dtype, torch.float32)
    scores_BSQK = products_BSQK.to(precision) * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores_BSQK = softcap * torch.tanh(scores_BSQK / softcap)
    scores_BSQK = scores_BSQK + mask
    if sinks_H is not None:
        sinks_SG1 = sinks_H.view(key.shape[1], -1, 1)
        sinks_SQ1 = sinks_SG1.repeat_interleave(query.shape[2] // sinks_SG1.shape[1], 1)
        sinks_BSQ1 = sinks_SQ1.expand(query.shape[0], -1, -1, -1).to(precision)
        scores_BSQK = torch.cat([scores_BSQK, sinks_BSQ1], 3)
    weights_BSQK = scores_BSQK.softmax(3)[..., : key.shape[2]]
    return weights_BSQK.to(value.dtype) @ value
