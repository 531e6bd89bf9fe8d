"""Divergence between teacher and student at the supervised positions, without a tensor [M, V].

The LM head and the loss run over chunks of positions. The gradient of each chunk is computed in closed form
and added to those of the hidden states and the head, so only one [chunk, V] exists at a time. Outcomes k are
the vocabulary, or the teacher's top-K tokens and one more for the tail. With p teacher, q student, z logits:
    a_k = dD / dlog q_k       forward_kl: -p_k     reverse_kl: q_k (log q_k - log p_k + 1)
                              jsd: (1-beta) q_k (log q_k - log m_k),  m = beta p + (1-beta) q
                              total_variation: q_k sign(q_k - p_k) / 2
    dD / dz_v = [v = k] a_k + [v in tail] (q_v / q_tail) a_tail - q_v sum_k a_k
The caller chooses positions, weights and normalisation. Sources: OPDLM (arXiv 2606.06712); docs/concepts.md,
"Targets and losses".

Shape suffixes: C positions of one chunk, H hidden, K top-k (in helpers: any set of outcomes), M supervised
positions, N positions to score, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from opdlm.modeling.cpu_linear import linear
from opdlm.modeling.diffusion_lm import head_constants

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "total_variation", "cross_entropy"]
OutcomeDivergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(teacher log p_CK, student log q_CK) -> (D_C, slopes a_CK); may overwrite log p."""

CHUNK_BYTES = {"cpu": 128 * 2**20}
"""Size of the temporary tensors of one chunk, by device."""
CHUNK_BYTES_ELSEWHERE = 2**30
"""The same on GPUs, where larger chunks pay: every chunk reads the head once."""
WEIGHT_SLICE = 8192
"""Rows of the head whose gradient is converted to float32 at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The LM head: logits = softcap * tanh(scale * (weight @ hidden + bias) / softcap)."""

    weight: Tensor
    """[V, H]; the matrix products run in its dtype."""
    bias: Tensor | None = None
    softcap: float | None = None
    """Cap of the logits in Gemma 2; None = none."""
    scale: float = 1.0
    """Factor of the logits: `logit_scale` in Cohere, 1 / `logits_scaling` in Granite."""
    banned: Tensor | None = None
    """Ids (int64) whose logit is -inf: [MASK], unused rows. Teacher and student must ban the same ids,
    because a token that only one of them can produce makes the divergence infinite."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V] in float32, or float64 for a float64 product."""
        logits = linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.banned is None else logits.index_fill_(-1, self.banned, -math.inf)

    def slope(self, logits_CV: Tensor) -> Tensor | None:
        """Derivative of the capped logits by the uncapped ones; None without a cap."""
        return None if self.softcap is None else (logits_CV / self.softcap).square_().neg_().add_(1)

    def backpropagate_(self, grad_CV: Tensor, slope_CV: Tensor | None) -> Tensor:
        """Turn d loss / d logits, in place, into d loss / d (weight @ hidden + bias)."""
        if slope_CV is not None:
            grad_CV *= slope_CV
        if self.scale != 1.0:
            grad_CV *= self.scale
        return grad_CV if self.banned is None else grad_CV.index_fill_(-1, self.banned, 0.0)


def lm_head_of(model: PreTrainedModel, banned: Tensor | None = None) -> Head:
    """The LM head of a model as tensors. Banned ids outside the vocabulary have no logit."""
    softcap, scale = head_constants(model)
    linear = model.get_output_embeddings()
    if banned is not None:
        banned = banned[banned < linear.weight.shape[0]]
    return Head(
        weight=linear.weight, bias=getattr(linear, "bias", None), softcap=softcap, scale=scale, banned=banned
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTargets:
    """The teacher's full distribution as hidden states, from which each chunk computes its logits."""

    hidden_MH: Tensor
    head: Head


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKTargets:
    """The teacher's K most probable tokens and their log-probabilities."""

    ids_MK: Tensor
    logprobs_MK: Tensor
    tail: bool = True
    """Treat the rest of the mass as one more outcome. False: the sparse variant of the paper, whose value may
    be negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTargets:
    """Hard targets for cross_entropy."""

    ids_M: Tensor


Targets = HiddenTargets | TopKTargets | TokenTargets


class LossOutput(NamedTuple):
    """The loss. A tuple, because wrappers such as DDP and ZeRO look for tensors inside the output."""

    loss: Tensor
    """Scalar, differentiable."""
    per_position_M: Tensor
    """D at each position, unweighted and detached."""
    acceptance_M: Tensor | None = None
    """Sum of min(p, q) at each position, where asked for: the share of draft tokens that speculative sampling
    accepts at temperature 1."""


def num_temporaries(divergence: Divergence, *shares: float) -> int:
    """Number of [C, V] float32 tensors that exist at the peak of one chunk. `shares` are those of other
    divergences that are mixed in.
    """
    return 7 if divergence == "jsd" else 4 + sum(share > 0 for share in shares)


def default_chunk_size(
    vocabulary: int, hidden: int, temporaries: int, *, trains_head: bool, device: str = "cpu"
) -> int:
    """Positions per chunk, at least 16. The temporaries of a chunk take at most the CHUNK_BYTES of the
    device, or the size of the head's float32 gradient if the head is trained and that is larger.

    Larger chunks are faster, because every chunk reads both heads and updates the whole gradient.
    """
    gradient = 4 * vocabulary * hidden if trains_head else 0
    budget = max(CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE), gradient)
    return max(16, budget // (4 * temporaries * vocabulary))


@torch.no_grad()
def top_k_targets(
    hidden_NH: Tensor, head: Head, k: int, tail: bool = True, chunk: int | None = None
) -> TopKTargets:
    """The teacher's `k` most likely tokens, with log-probabilities normalised over the full vocabulary."""
    ids_NK = torch.empty(len(hidden_NH), k, dtype=torch.long, device=hidden_NH.device)
    logprobs_NK = torch.empty_like(ids_NK, dtype=_loss_dtype(hidden_NH))
    vocabulary, hidden = head.weight.shape
    chunk = chunk or default_chunk_size(
        vocabulary, hidden, 2, trains_head=False, device=hidden_NH.device.type
    )
    for rows in _row_chunks(len(hidden_NH), chunk):
        logits_CV = head.logits(hidden_NH[rows])
        top_CK, ids_NK[rows] = logits_CV.topk(k, dim=-1)
        logprobs_NK[rows] = top_CK - logits_CV.logsumexp(-1, keepdim=True)
    return TopKTargets(ids_MK=ids_NK, logprobs_MK=logprobs_NK, tail=tail)


def chunked_divergence(
    student_hidden_MH: Tensor,
    student_head: Head,
    targets: Targets,
    weights_M: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    reverse_weight: float = 0.0,
    variation_weight: float = 0.0,
    with_acceptance: bool = False,
    chunk_size: int | None = None,
) -> LossOutput:
    """sum_i weights_i * D(teacher_i, student_i) in nats, differentiable in the student's hidden states and
    head.

    `beta` in (0, 1) is the teacher's weight in the mixture (jsd only). `reverse_weight` replaces forward_kl
    by (1 - reverse_weight) * forward_kl + reverse_weight * reverse_kl, and `variation_weight` likewise mixes
    total_variation into the result. Targets and weights get no gradient. M may be 0.
    """
    assert (divergence == "cross_entropy") == isinstance(targets, TokenTargets)
    assert reverse_weight == variation_weight == 0.0 or divergence == "forward_kl"
    measures: dict[Divergence, OutcomeDivergence] = {
        "forward_kl": _forward_kl,
        "cross_entropy": _forward_kl,
        "reverse_kl": _reverse_kl,
        "jsd": partial(_jsd, beta=beta),
        "total_variation": _total_variation,
    }
    measure = measures[divergence]
    for other, share in ((_reverse_kl, reverse_weight), (_total_variation, variation_weight)):
        if share:
            measure = partial(_mixed, first=measure, second=other, share=share)
    accepted: list[Tensor] = []
    if with_acceptance:
        measure = partial(_recording_acceptance, measure=measure, accepted=accepted)
    # The forward computes the gradients that are required: detach where autograd is off.
    hidden_MH, weight_VH, bias_V = (
        x if x is None or torch.is_grad_enabled() else x.detach()
        for x in (student_hidden_MH, student_head.weight, student_head.bias)
    )
    weight = student_head.weight
    vocabulary, hidden = weight.shape
    chunk_size = chunk_size or default_chunk_size(
        vocabulary,
        hidden,
        num_temporaries(divergence, reverse_weight, variation_weight),
        trains_head=torch.is_grad_enabled() and weight.requires_grad,
        device=weight.device.type,
    )
    loss, per_position_M = _ChunkedDivergence.apply(
        hidden_MH, weight_VH, bias_V, student_head, targets, weights_M, measure, chunk_size
    )
    acceptance_M = torch.cat([per_position_M[:0], *accepted]) if with_acceptance else None
    return LossOutput(loss=loss, per_position_M=per_position_M, acceptance_M=acceptance_M)


class _ChunkedDivergence(torch.autograd.Function):
    """Computes the gradients of the sum in its forward and scales them in its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: Head,
        targets: Targets,
        weights_M: Tensor,
        measure: OutcomeDivergence,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = _loss_dtype(hidden_MH)
        weights_M = weights_M.to(dtype)
        per_position_M = torch.empty(len(hidden_MH), dtype=dtype, device=hidden_MH.device)
        grad_hidden_MH = torch.zeros_like(hidden_MH) if ctx.needs_input_grad[0] else None
        # A sum over chunks would lose precision in bfloat16.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=dtype) if ctx.needs_input_grad[1] else None
        grad_bias_V = None
        if bias_V is not None and ctx.needs_input_grad[2]:
            grad_bias_V = torch.zeros_like(bias_V, dtype=dtype)
        for rows in _row_chunks(len(hidden_MH), chunk_size):
            logits_CV = head.logits(hidden_MH[rows])
            slope_CV = head.slope(logits_CV)
            per_position_M[rows], grad_CV = _divergence_and_gradient(logits_CV, targets, rows, measure)
            if not any(ctx.needs_input_grad):
                continue
            grad_CV = head.backpropagate_(grad_CV, slope_CV).mul_(weights_M[rows, None])
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(weight_VH.dtype)
            if grad_hidden_MH is not None:
                grad_hidden_MH[rows] = linear(grad_CV, weight_VH.T)
            if grad_weight_VH is not None:
                _add_product_(grad_weight_VH, grad_CV.T, hidden_MH[rows].to(weight_VH.dtype))
            del logits_CV, slope_CV, grad_CV  # before the next chunk allocates its own
        grads = (grad_hidden_MH, grad_weight_VH, grad_bias_V)
        inputs = (hidden_MH, weight_VH, bias_V)
        ctx.grads = [g if g is None else g.to(x) for g, x in zip(grads, inputs, strict=True)]
        ctx.mark_non_differentiable(per_position_M)
        return weights_M.dot(per_position_M), per_position_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.grads
        if grads is None:
            raise RuntimeError(
                "a second backward through chunked_divergence needs retain_graph=True in the first."
            )
        if torch._C._autograd._get_current_graph_task_keep_graph():
            grads = [g if g is None else g.clone() for g in grads]
        else:
            ctx.grads = None  # scaled in place: a second tensor of the head's size would cost memory
        grads = (g if g is None else g.mul_(grad_loss) for g in grads)
        return *grads, None, None, None, None, None


def _divergence_and_gradient(
    logits_CV: Tensor,
    targets: Targets,
    rows: slice,
    measure: OutcomeDivergence,
) -> tuple[Tensor, Tensor]:
    """D_C and d D / d logits_CV of one chunk; overwrites the logits."""
    logq_CV = _log_softmax_(logits_CV)
    match targets:
        case HiddenTargets():
            logp_CV = _log_softmax_(targets.head.logits(targets.hidden_MH[rows])).to(logq_CV)
            loss_C, slopes_CV = measure(logp_CV, logq_CV)
            total_C1 = slopes_CV.sum(-1, keepdim=True)
            return loss_C, slopes_CV.addcmul_(logq_CV.exp_(), total_C1, value=-1)
        case TopKTargets():
            logp_CK = targets.logprobs_MK[rows].to(logq_CV, copy=True)
            return _sparse_divergence(logq_CV, targets.ids_MK[rows], logp_CK, targets.tail, measure)
        case TokenTargets():
            ids_C1 = targets.ids_M[rows, None]
            certain_C1 = torch.zeros_like(ids_C1, dtype=logq_CV.dtype)
            return _sparse_divergence(logq_CV, ids_C1, certain_C1, False, measure)


def _sparse_divergence(
    logq_CV: Tensor, ids_CK: Tensor, logp_CK: Tensor, tail: bool, measure: OutcomeDivergence
) -> tuple[Tensor, Tensor]:
    """D_C and its gradient for the outcomes of K ids and, optionally, a tail; overwrites logq_CV."""
    num_top, num_vocabulary = ids_CK.shape[-1], logq_CV.shape[-1]
    logq_CK = logq_CV.gather(-1, ids_CK)
    q_CK = logq_CK.exp()
    q_CV = logq_CV.exp_()
    if not tail or num_top == num_vocabulary:
        loss_C, slopes_CK = measure(logp_CK, logq_CK)
        total_C1 = slopes_CK.sum(-1, keepdim=True)
        return loss_C, q_CV.mul_(-total_C1).scatter_(-1, ids_CK, slopes_CK - q_CK * total_C1)
    # The student's tail is summed: 1 - sum(q_CK) would be inexact, and the gradient divides by it.
    q_tail_C1 = q_CV.scatter_(-1, ids_CK, 0.0).sum(-1, keepdim=True).clamp_min_(torch.finfo(q_CV.dtype).tiny)
    loss_C, slopes = measure(
        torch.cat([logp_CK, _log_rest(logp_CK)], -1), torch.cat([logq_CK, q_tail_C1.log()], -1)
    )
    total_C1 = slopes.sum(-1, keepdim=True)
    slopes_CK, slope_tail_C1 = slopes.split([num_top, 1], -1)
    q_CV *= slope_tail_C1 / q_tail_C1 - total_C1
    return loss_C, q_CV.scatter_(-1, ids_CK, slopes_CK - q_CK * total_C1)


def _log_softmax_(logits_CV: Tensor) -> Tensor:
    return logits_CV.sub_(logits_CV.logsumexp(-1, keepdim=True))


def _forward_kl(logp_CK: Tensor, logq_CK: Tensor) -> tuple[Tensor, Tensor]:
    p_CK = logp_CK.exp()
    return _times(p_CK, logp_CK.sub_(logq_CK)).sum(-1), p_CK.neg_()


def _reverse_kl(logp_CK: Tensor, logq_CK: Tensor) -> tuple[Tensor, Tensor]:
    q_CK = logq_CK.exp()
    terms_CK = _times(q_CK, logp_CK.neg_().add_(logq_CK))
    return terms_CK.sum(-1), terms_CK.add_(q_CK)


def _total_variation(logp_CK: Tensor, logq_CK: Tensor) -> tuple[Tensor, Tensor]:
    q_CK = logq_CK.exp()
    gap_CK = logp_CK.exp_().neg_().add_(q_CK)
    return torch.linalg.vector_norm(gap_CK, ord=1, dim=-1) / 2, gap_CK.sign_().mul_(q_CK).div_(2)


def _mixed(
    logp_CK: Tensor, logq_CK: Tensor, first: OutcomeDivergence, second: OutcomeDivergence, share: float
) -> tuple[Tensor, Tensor]:
    """(1 - share) * first + share * second."""
    first_C, first_slopes_CK = first(logp_CK.clone(), logq_CK)
    second_C, second_slopes_CK = second(logp_CK, logq_CK)
    return first_C.lerp(second_C, share), first_slopes_CK.lerp_(second_slopes_CK, share)


def _recording_acceptance(
    logp_CK: Tensor, logq_CK: Tensor, measure: OutcomeDivergence, accepted: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The measure; appends the sum of min(p, q) of the chunk to `accepted`."""
    accepted.append(torch.minimum(logp_CK, logq_CK).exp_().sum(-1))
    return measure(logp_CK, logq_CK)


def _jsd(logp_CK: Tensor, logq_CK: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    logm_CK = torch.logaddexp(logp_CK + math.log(beta), logq_CK + math.log1p(-beta))
    slopes_CK = _times(logq_CK.exp(), logq_CK - logm_CK).mul_(1 - beta)
    terms_CK = _times(logp_CK.exp(), logp_CK - logm_CK).mul_(beta)
    return terms_CK.sum(-1) + slopes_CK.sum(-1), slopes_CK


def _times(p_CK: Tensor, log_ratio_CK: Tensor) -> Tensor:
    """p * log_ratio, and 0 where p = 0, even if log_ratio is infinite or NaN; overwrites log_ratio."""
    return log_ratio_CK.mul_(p_CK).masked_fill_(p_CK == 0, 0.0)


def _log_rest(logp_CK: Tensor) -> Tensor:
    """log(1 - sum_k p_k), [C, 1]; a rest below the precision counts as one unit of it and stays finite."""
    log_mass_C1 = logp_CK.logsumexp(-1, keepdim=True).clamp_max_(-torch.finfo(logp_CK.dtype).eps)
    return torch.where(log_mass_C1 > -math.log(2), (-log_mass_C1.expm1()).log(), (-log_mass_C1.exp()).log1p())


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right. A product of another dtype is converted in slices that fit into the CPU
    cache.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for first in range(0, len(total), WEIGHT_SLICE):
        total[first : first + WEIGHT_SLICE] += left[first : first + WEIGHT_SLICE] @ right


def _row_chunks(num_rows: int, chunk_size: int) -> Iterator[slice]:
    return (slice(start, start + chunk_size) for start in range(0, num_rows, chunk_size))


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
