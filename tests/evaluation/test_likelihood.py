"""Likelihoods against enumeration, the stock model and the sampler; the distance to the teacher."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from tiny_models import BLOCK, GRIDS, KINDS, STOP, make_lm, make_prompts, make_rollout, qwen3, record_sampler
from torch import Tensor

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout
from opdlm.evaluation.likelihood import (
    agreement_report,
    ar_response_nll,
    likelihood_report,
    masked_cross_entropy,
    masks_of_order,
    nll_bound,
    score_text,
)
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.slots import GridKind
from opdlm.objectives.states import BlockTable, text_to_rollout

VOCABULARY, SIZE = 6, 3
PROMPT = (1, 2, 3)


def left_to_right(table: BlockTable) -> Tensor:
    return table.positions_BNT


def right_to_left(table: BlockTable) -> Tensor:
    return -table.positions_BNT


@torch.no_grad()
def chain_nll(model: DiffusionLM, rows: Sequence[Rollout], order: Callable[[BlockTable], Tensor]) -> Tensor:
    """Exact negative log-likelihood of revealing one token at a time in this order, in nats: `[B]`."""
    given = score_text(model, rows)
    masks_BCNT = masks_of_order(given.table, order(given.table))
    later_BCNT = torch.cat([masks_BCNT[:, 1:], torch.zeros_like(masks_BCNT[:, :1])], 1)
    return (masked_cross_entropy(model, given, masks_BCNT) * (masks_BCNT & ~later_BCNT)).sum((1, 2, 3))


def fixed_order(offsets: tuple[int, ...]) -> Callable[[BlockTable], Tensor]:
    ranks_T = torch.tensor(offsets).argsort()
    return lambda table: ranks_T.expand(table.ids_BNT.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_every_order_is_a_distribution_and_the_bound_lies_above_their_mixture(kind: str) -> None:
    """All 5^3 responses of one block, all 3! orders: exact likelihood, exact bound, Monte-Carlo bound."""
    model = make_lm(kind, base=qwen3(VOCABULARY), block_size=SIZE, noise=0.3)
    responses = list(itertools.product(range(VOCABULARY - 1), repeat=SIZE))
    rows = [text_to_rollout(PROMPT, response, model.spec) for response in responses]
    orders = list(itertools.permutations(range(SIZE)))
    nll_OB = torch.stack([chain_nll(model, rows, fixed_order(order)) for order in orders]).double()
    torch.testing.assert_close((-nll_OB).exp().sum(1), torch.ones(len(orders)).double(), atol=1e-5, rtol=0)
    assert (nll_OB[0] - nll_OB[-1]).abs().max() > 0.1  # the order matters: the bound has something to bound
    exact_B = -((-nll_OB).exp().mean(0).log())
    exact_bound_B = nll_OB.mean(0)
    assert (exact_bound_B > exact_B - 1e-6).all() and (exact_bound_B - exact_B).max() > 0.01

    bound = nll_bound(model, rows, num_samples=32)
    error_B = (bound.nats_B - exact_bound_B) / bound.standard_error_B.clamp_min(1e-5)
    assert error_B.abs().max() < 5 and error_B.square().mean() < 2
    assert (bound.nats_B > exact_B - 4 * bound.standard_error_B - 1e-5).all()
    assert bound.standard_error_B.mean() < 0.5 * nll_OB.std(0).mean() / 32**0.5  # better than drawing orders


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_ar_likelihood_is_the_stock_models(kind: str, grid: GridKind) -> None:
    model, base = make_lm(kind, grid), qwen3()
    rollouts = [make_rollout(p, r, grid, stop=True) for p, r in ((5, 6), (4, 9), (7, 1))]
    rows = [text_to_rollout(r.prompt_ids, r.text_ids, model.spec) for r in rollouts]
    nll_B = ar_response_nll(model, rows)
    for row, nll in zip(rows, nll_B, strict=True):
        ids_L = torch.tensor(row.prompt_ids + row.text_ids)
        logits_LV = base(ids_L[None]).logits[0].detach()
        logits_LV[:, -1] = -torch.inf  # [MASK]
        log_probs_L = logits_LV.log_softmax(-1)[:-1].gather(-1, ids_L[1:, None])[:, 0]
        torch.testing.assert_close(nll, -log_probs_L[len(row.prompt_ids) - 1 :].sum(), rtol=1e-4, atol=1e-4)
    if kind != "sdar":
        torch.testing.assert_close(chain_nll(model, rows, left_to_right), nll_B, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(chain_nll(model, rows, right_to_left), nll_B, atol=0.1)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_in_the_samplers_order_is_what_the_sampler_saw(kind: str, grid: GridKind) -> None:
    """Static decoding reveals one token a step; its logits are recorded and give the likelihood."""
    model = make_lm(kind, grid)
    object.__setattr__(model.spec, "stop_token_ids", ())  # whole blocks to the end
    prompts = make_prompts([8, 12])
    with record_sampler() as seen:
        rollouts = generate(
            model, prompts, DecodeConfig(mode="static", max_new_tokens=2 * BLOCK, ar_accept_threshold=0)
        )
    expected = torch.zeros(len(prompts))
    for place in seen:
        rollout = rollouts[place.row]
        num_prompt = len(rollout.prompt_ids)
        num_masked = place.tokens.count(model.spec.mask_token_id)
        step = rollout.unmask_step[place.target - num_prompt]
        block = (place.target - num_prompt) // BLOCK
        if step == 1 + block * BLOCK + BLOCK - num_masked:
            token = rollout.response_ids[place.target - num_prompt]
            expected[place.row] -= place.logits_V.log_softmax(-1)[token]
    actual = chain_nll(model, rollouts, lambda table: table.step_BNT)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_likelihood_alone_and_in_a_batch(kind: str) -> None:
    model = make_lm(kind)
    rows = [text_to_rollout(p, (*p[:3], STOP), model.spec) for p in make_prompts([3, 6, 9])]
    together = chain_nll(model, rows, right_to_left)
    alone = torch.cat([chain_nll(model, [row], right_to_left) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_report_is_per_token_and_reproducible(kind: str) -> None:
    model = make_lm(kind)
    rollouts = generate(model, make_prompts([3, 6, 9]), DecodeConfig(mode="static", max_new_tokens=10))
    report = likelihood_report(model, rollouts, num_samples=4, batch_size=2)
    assert report == likelihood_report(model, rollouts, num_samples=4, batch_size=2)
    nll = sum(
        float(ar_response_nll(model, [text_to_rollout(r.prompt_ids, r.text_ids, model.spec)]))
        for r in rollouts
    )
    assert report["num_tokens"] == sum(r.num_response for r in rollouts)
    assert report["teacher_nll_per_token"] == pytest.approx(nll / report["num_tokens"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_agreement_counts_arg_maxes_and_the_profile_averages_to_the_mean(kind: str) -> None:
    model = make_lm(kind)
    prompts = make_prompts([3, 6, 9])
    decoder = model.teacher_decoder()
    by_teacher = generate(decoder, prompts, DecodeConfig(mode="ar", max_new_tokens=10))
    assert agreement_report(model, by_teacher, 2)["argmax_agreement"] == 1.0
    drafted = generate(model, prompts, DecodeConfig(mode="static", max_new_tokens=10))
    report = agreement_report(model, drafted, 2)
    agreed = 0
    for rollout in drafted:
        ids_L = torch.tensor(rollout.prompt_ids + rollout.text_ids)
        logits_LV = qwen3()(ids_L[None]).logits[0].detach()
        logits_LV[:, -1] = -torch.inf
        best_L = logits_LV.argmax(-1)[len(rollout.prompt_ids) - 1 : -1]
        agreed += int((best_L == torch.tensor(rollout.text_ids)).sum())
    assert report["argmax_agreement"] == pytest.approx(agreed / sum(r.num_response for r in drafted))
    num = sum(cell["num"] for cell in report["profile"])
    assert num == report["num_states"]
    assert report["teacher_kl"] == pytest.approx(
        sum(cell["kl"] * cell["num"] for cell in report["profile"]) / num
    )
    assert report["teacher_kl"] > 0
