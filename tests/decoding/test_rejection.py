"""Accept/reject sampling of drafts: the AR distribution whatever is drafted and verified, and more of it.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from exact_sampling import chi_square_p_value, exact_probabilities, filtered
from simple_loop import predict_ar, predict_block
from tiny_models import CPU, DRAFTS, add_draft_head, make_lm, make_prompts, qwen3

from opdlm.decoding import lossless
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import DecodeState, DecodeStats, Request
from opdlm.decoding.draft_policy import DraftPlan, DraftPolicy, ForwardCost
from opdlm.decoding.generate import Decoder, check_settings, generate
from opdlm.decoding.rollout import Rollout
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.kv_cache import DecodeCache

REJECTION = DecodeConfig(
    mode="lossless", draft_sampling="rejection", temperature=1.0, max_new_tokens=4, forward_overhead=1e6
)
AR: dict[str, Any] = {"mode": "ar", "draft_sampling": "shared_noise"}
NUM_SAMPLES = 4000
(PROMPT,) = make_prompts([3], vocabulary=6)


def small_lm(kind: str = "lora", *, has_head: bool = False, **changes: Any) -> DiffusionLM:
    """A student whose drafts are often wrong, over a vocabulary of 6."""
    model = make_lm(kind, base=qwen3(vocabulary=6, initializer_range=0.15), noise=0.3, **changes)
    return add_draft_head(model, 1.0) if has_head else model


def p_value_of(rollouts: list[Rollout], config: DecodeConfig) -> float:
    base = qwen3(vocabulary=6, initializer_range=0.15)
    return chi_square_p_value([r.text_ids for r in rollouts], exact_probabilities(base, PROMPT, config))


@pytest.mark.parametrize(
    ("kind", "has_head", "overhead", "changes", "drafts"),
    [
        ("lora", False, 1e6, {}, {}),
        ("copy", False, 1e6, {}, {}),
        ("lora", True, 1e6, {}, {}),
        ("lora", True, 256.0, {"max_new_tokens": 5}, {}),
        ("lora", False, 256.0, {"max_new_tokens": 5}, {}),
        ("lora", False, 0.0, {}, {}),
        ("lora", False, 1e6, {"prompt_lookup_num_tokens": 5}, {}),
        ("lora", True, 256.0, {"prompt_lookup_num_tokens": 2, "max_new_tokens": 5}, {}),
        ("lora", False, 1e6, {"temperature": 0.6, "top_k": 3}, {}),
        ("lora", True, 1e6, {"temperature": 1.5, "top_p": 0.7}, {}),
        ("lora", False, 1e6, {"top_k": 4, "top_p": 0.8}, DRAFTS["uniform_causal"]),
    ],
)
def test_samples_follow_the_distribution_of_the_base_model(
    kind: str, has_head: bool, overhead: float, changes: dict[str, Any], drafts: dict[str, Any]
) -> None:
    config = replace(REJECTION, forward_overhead=overhead, **changes)
    model = small_lm(kind, has_head=has_head, **drafts)
    rollouts = generate(model, [PROMPT] * NUM_SAMPLES, config, torch.Generator().manual_seed(5))
    stats = DecodeStats.of(rollouts)
    assert overhead == 0 or stats.num_steps < stats.num_tokens  # some drafts were accepted
    assert p_value_of(rollouts, config) > 1e-3


@pytest.mark.parametrize("has_head", [False, True])
def test_a_draft_of_few_candidates_is_corrected_to_the_whole_distribution(
    has_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lossless, "NUM_CANDIDATES", 2)
    model = small_lm(has_head=has_head)
    rollouts = generate(model, [PROMPT] * NUM_SAMPLES, REJECTION, torch.Generator().manual_seed(5))
    assert p_value_of(rollouts, REJECTION) > 1e-3


@pytest.mark.parametrize("has_head", [False, True])
def test_what_is_verified_depends_on_no_drawn_token_so_that_any_policy_is_exact(
    has_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verifying only tokens drawn with a high probability would favour them."""
    model = small_lm(has_head=has_head)
    confidences = list[float]()

    def plan(policy: DraftPolicy, state: DecodeState, *, is_closed: bool) -> list[DraftPlan]:
        plans = []
        for row, num_draft in enumerate(state.num_draft_B.tolist()):
            confidence_D = state.draft_confidence_BD[row, :num_draft]
            confidences.extend(confidence_D.tolist()[:1])
            num_verified = int((confidence_D > 0.5).long().cumprod(0).sum())
            plans.append(DraftPlan(num_verified, tuple(range(num_verified + 1)), policy.draft_length))
        return plans

    monkeypatch.setattr(DraftPolicy, "plan", plan)
    rollouts = generate(model, [PROMPT] * NUM_SAMPLES, REJECTION, torch.Generator().manual_seed(5))
    assert min(confidences) < 0.5 < max(confidences)
    assert p_value_of(rollouts, REJECTION) > 1e-3


def first_steps(model: DiffusionLM, num_rows: int, config: DecodeConfig, num_steps: int) -> DecodeState:
    """The state after so many forwards, of rows with the same prompt and different seeds."""
    requests = [Request(row, PROMPT, 1000 + row, config) for row in range(num_rows)]
    state = DecodeState.start(
        requests, 20, model.spec.mask_token_id, 3, num_candidates=lossless.NUM_CANDIDATES
    )
    policy, cache = DraftPolicy(3, ForwardCost.linear(1e6)), DecodeCache(num_rows, 60, CPU)
    with torch.inference_mode():
        for _ in range(num_steps):
            lossless.lossless_step(model, state, cache, config, policy)
    return state


@pytest.mark.parametrize("has_head", [False, True])
def test_the_confidences_of_a_draft_are_the_same_whatever_was_drawn(has_head: bool) -> None:
    state = first_steps(small_lm(has_head=has_head), 40, REJECTION, 1)
    assert len(state.draft_BD.unique(dim=0)) > 10
    torch.testing.assert_close(state.draft_confidence_BD, state.draft_confidence_BD[:1].expand(40, -1))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.8}])
def test_a_draft_token_is_accepted_with_probability_1_minus_the_total_variation(
    settings: dict[str, Any],
) -> None:
    """At the first place, where shared noise accepts fewer. p and q come from the training path."""
    model, config = small_lm(), replace(REJECTION, **settings)
    mask, num_rows = model.spec.mask_token_id, 6000

    def probabilities(logits_V: torch.Tensor) -> list[float]:
        return filtered((logits_V.double() / config.temperature).softmax(-1).tolist(), config)

    q = probabilities(predict_block(model, [*PROMPT, *[mask] * 4], len(PROMPT), len(PROMPT))[len(PROMPT) + 1])
    expected, least = 0.0, 0.0  # averaged over the token before the draft
    for token, share in enumerate(probabilities(predict_ar(model, PROMPT))):
        p = probabilities(predict_ar(model, (*PROMPT, token)))
        overlap = sum(map(min, p, q))
        expected += share * overlap
        least += share * overlap / (2 - overlap)
    error = (expected * (1 - expected) / num_rows) ** 0.5
    accepted = {}
    for sampling in ("rejection", "shared_noise"):
        state = first_steps(model, num_rows, replace(config, draft_sampling=sampling), 2)
        accepted[sampling] = float((state.committed_B > len(PROMPT) + 1).double().mean())
    assert abs(accepted["rejection"] - expected) < 3.5 * error
    assert least - 3.5 * error < accepted["shared_noise"] < expected - 3.5 * error


def test_rows_of_different_settings_share_a_batch_and_greedy_ones_are_those_of_the_ar_model() -> None:
    model = small_lm()
    own: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 3, "logprobs": True},
        {"temperature": 0.6, "max_new_tokens": 3},
        {"temperature": 1.5, "top_p": 0.8},
    ]
    decoder = Decoder(model, REJECTION, 400, len(PROMPT) + 4)
    configs = [replace(REJECTION, **own[i % 4]) for i in range(2 * NUM_SAMPLES)]
    decoder.waiting.extend(Request(i, PROMPT, 1000 + i, config) for i, config in enumerate(configs))
    found = dict[int, Rollout]()
    while decoder.is_busy:
        found |= decoder.step()
    (greedy,) = generate(model, [PROMPT], DecodeConfig(mode="ar", max_new_tokens=4))
    assert {found[i].text_ids for i in range(0, len(configs), 4)} == {greedy.text_ids}
    for kind in (1, 2, 3):
        rollouts = [found[i] for i in range(kind, len(configs), 4)]
        assert p_value_of(rollouts, configs[kind]) > 1e-3
        assert not any(rollout.num_replaced for rollout in rollouts)
    for rollout in (found[i] for i in range(1, 201, 4)):
        ids = (*PROMPT, *rollout.text_ids)
        for place, logprob in enumerate(rollout.logprobs, len(PROMPT)):  # of the AR model, unfiltered
            expected = predict_ar(model, ids[:place]).log_softmax(-1)[ids[place]]
            assert logprob == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("has_head", [False, True])
def test_greedy_rejection_is_greedy_decoding(has_head: bool) -> None:
    model, prompts = small_lm(has_head=has_head), make_prompts([1 + i % 9 for i in range(24)], vocabulary=6)
    config = replace(REJECTION, temperature=0.0, max_new_tokens=14, batch_size=10)
    found = generate(model, prompts, config)
    assert found == generate(model, prompts, replace(config, draft_sampling="shared_noise"))


def test_samples_repeat_with_the_same_drafts_and_blocks_of_one_token_are_ar_decoding() -> None:
    model, prompts = small_lm(), make_prompts([1 + i % 9 for i in range(24)], vocabulary=6)
    config = replace(REJECTION, max_new_tokens=14, batch_size=10)
    first = generate(model, prompts, config, range(24))
    assert first == generate(model, prompts, config, range(24))
    assert {rollout.finish_reason for rollout in first} == {"stop", "length"}
    model = small_lm(block_size=1)
    found, expected = (
        generate(model, prompts, replace(config, **changes), range(24)) for changes in ({}, AR)
    )
    assert [one.text_ids for one in found] == [one.text_ids for one in expected]


def test_rejection_is_refused_where_it_has_no_effect() -> None:
    with pytest.raises(ValueError, match="draft_sampling \\(rejection\\) has no effect with `mode=ar`"):
        check_settings(replace(REJECTION, mode="ar"), small_lm().spec)
    with pytest.raises(ValueError, match="draft_sampling \\('noise'\\) must be one of shared_noise, rej"):
        DecodeConfig(draft_sampling="noise")  # type: ignore[arg-type]
