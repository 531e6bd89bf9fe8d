"""The teacher's targets: one causal forward pass per rollout, whatever states are trained.

The teacher predicts the token at position t from its hidden state at t - 1. Only hidden states are kept; the
loss computes their log-probabilities chunk by chunk, so no tensor of all positions x V is stored. In
`preserve` the same pass fills the cache with the clean keys and values that the student reads
(docs/concepts.md, "Targets and losses"; OPDLM, arXiv 2606.06712).

Shape suffixes: B rows, L clean row, M supervised positions, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdlm.config.sections import LossSection
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.kv_cache import SlotCache
from opdlm.modeling.slots import Format, Slots
from opdlm.objectives.losses import HiddenTargets, Targets, TokenTargets, lm_head_of, top_k_targets
from opdlm.objectives.states import StateBatch


@dataclass(frozen=True, slots=True)
class TeacherPass:
    """The result of the teacher's forward pass over clean rows."""

    hidden_BLH: Tensor
    cache: SlotCache | None
    """Keys and values of the clean slots in `preserve`, else None."""


def needs_teacher(section: LossSection, fmt: Format) -> bool:
    """Whether training needs the teacher's pass: `sft` does not, unless it reads the cache of `preserve`."""
    return section.objective != "sft" or section.ar_weight > 0 or fmt == "preserve"


@torch.no_grad()
def score_rows(model: DiffusionLM, text: Slots) -> TeacherPass:
    """The teacher's causal pass over rows of clean text (`StateBatch.text`)."""
    cache = SlotCache(*text.ids_BS.shape) if model.spec.format == "preserve" else None
    return TeacherPass(model.teacher_hidden(text, cache), cache)


def targets_at_supervised(
    model: DiffusionLM, states: StateBatch, scored: TeacherPass | None, section: LossSection
) -> Targets:
    """Targets of the supervised slots, in the order of `is_supervised_BS.nonzero()`. `scored` may be None for
    `sft`, whose targets are the tokens themselves.
    """
    row_M, column_M = states.is_supervised_BS.nonzero(as_tuple=True)
    target_M = states.slots.start_BS[row_M, column_M] + states.target_BS[row_M, column_M]
    if section.objective == "sft":
        return TokenTargets(ids_M=states.text.ids_BS[row_M, target_M])
    assert scored is not None
    hidden_MH = scored.hidden_BLH[row_M, target_M - 1]
    banned = torch.tensor(model.spec.banned_token_ids, dtype=torch.long, device=hidden_MH.device)
    head = lm_head_of(model.teacher or model.student, banned)
    if section.top_k is None:
        return HiddenTargets(hidden_MH=hidden_MH, head=head)
    return top_k_targets(hidden_MH, head, section.top_k, tail=section.tail)
