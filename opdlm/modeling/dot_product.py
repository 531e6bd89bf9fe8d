"""Scaled dot-product attention, and the two changes that families make to its scores.

A *softcap* c turns a score s into c * tanh(s / c), before the mask is added (Gemma 2, arXiv 2408.00118). A *sink*
is one more score of every query, a learned number per head: it takes part in the softmax and has no value
(gpt-oss, arXiv 2508.10925). With either, the scores are computed explicitly; otherwise torch's kernels compute
the attention.

Shape suffixes: B batch, S heads of keys, H heads of queries, Q queries, K keys.
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
    """The output `[B, S, G * Q, D]` for queries `[B, S, G * Q, D]`, where the G query heads that share keys are
    stacked, for keys and values `[B, S, K, D]` and for an additive mask `[B, 1, G * Q, K]`.
    """
    scale, softcap, sinks_H = scoring
    if scoring.is_plain:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    products_BSQK = query @ key.transpose(2, 3)
    precision = torch.promote_types(
        query.dtype, torch.float32
    )  # half precision cannot hold a score and a mask
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
