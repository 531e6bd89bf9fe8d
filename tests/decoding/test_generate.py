"""The engine is the simple loop: all modes, ragged batches that refill, every P mod b; and what users ask.

Shapes: M keys, V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from simple_loop import simple_ar, simple_denoise
from tiny_models import GRIDS, KINDS, MASK, STOP, make_lm, make_prompts, qwen3

from opdlm.decoding import generate as engine
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.decode_state import DecodeState, DecodeStats, Request
from opdlm.decoding.draft_policy import DraftPlan, DraftPolicy
from opdlm.decoding.generate import generate, make_requests
from opdlm.decoding.rollout import Rollout
from opdlm.decoding.unmasking import choose_tokens, choose_within_entropy, noise_keys
from opdlm.modeling.diffusion_lm import PackedForward
from opdlm.modeling.kv_cache import DecodeCache, PrefixCache
from opdlm.modeling.slots import GridKind

LENGTHS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 3, 20]
MODES = {
    "static": DecodeConfig(mode="static", denoising_steps=3, ar_accept_threshold=0.0),
    "threshold": DecodeConfig(mode="threshold", confidence_threshold=0.2, ar_accept_threshold=0.0),
    "entropy": DecodeConfig(mode="entropy", entropy_bound=2.0, ar_accept_threshold=0.0),
    "left_to_right": DecodeConfig(mode="left_to_right", denoising_steps=2, ar_accept_threshold=0.0),
}


AT_ONE = torch.tensor([[1.0, 0, 1]])
"""Sampling settings: temperature 1, no filter."""
OWN: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_new_tokens": 9},
    {"temperature": 1.0, "top_k": 5, "logprobs": True},
    {"temperature": 0.5, "top_p": 0.8, "max_new_tokens": 4},
    {"temperature": 1e-38, "logprobs": True},
    {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "max_new_tokens": 7},
]
"""Settings that requests of one batch may have for themselves."""


def seeds_of(prompts: list[tuple[int, ...]], seed: int) -> list[int]:
    return [
        request.seed
        for request in make_requests(prompts, torch.Generator().manual_seed(seed), DecodeConfig())
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "grid"), [("lora", "absolute"), ("copy", "response"), *(("sdar", grid) for grid in GRIDS)]
)
def test_the_engine_is_the_simple_loop_for_every_prompt_length_while_rows_come_and_go(
    kind: str, grid: GridKind, mode: str, temperature: float
) -> None:
    model, prompts = make_lm(kind, grid), make_prompts(LENGTHS)
    config = replace(MODES[mode], max_new_tokens=9, batch_size=4, temperature=temperature, top_k=9)
    rollouts = generate(model, prompts, config, torch.Generator().manual_seed(7))
    expected = [
        simple_denoise(model, p, config, s) for p, s in zip(prompts, seeds_of(prompts, 7), strict=True)
    ]
    assert [rollout.text_ids for rollout in rollouts] == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["ar", "lossless"])
@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_ar_and_lossless_are_the_simple_loop_sample_for_sample(
    kind: str, mode: str, temperature: float
) -> None:
    model = make_lm(kind, base=qwen3(vocabulary=6, initializer_range=0.15))
    prompts = make_prompts(LENGTHS, vocabulary=6)
    config = DecodeConfig(
        mode=mode, max_new_tokens=9, batch_size=4, temperature=temperature, forward_overhead=1e6
    )
    rollouts = generate(model, prompts, config, torch.Generator().manual_seed(7))
    expected = [simple_ar(model, p, config, s) for p, s in zip(prompts, seeds_of(prompts, 7), strict=True)]
    assert [rollout.text_ids for rollout in rollouts] == expected
    stats = DecodeStats.of(rollouts)
    assert mode == "ar" or stats.num_forwards < stats.num_tokens * (1 if kind == "lora" else 2)


@pytest.mark.parametrize("mode", [*MODES, "rejecting", "ar", "lossless"])
@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_different_settings_share_forwards_and_each_is_answered_as_alone(
    kind: str, mode: str
) -> None:
    if kind == "sdar" and mode in ("rejecting", "ar", "lossless"):
        pytest.skip("sdar has no AR model")
    model, prompts = make_lm(kind), make_prompts(LENGTHS)
    if mode in MODES:
        shared = MODES[mode]
    elif mode == "rejecting":
        shared = replace(MODES["static"], ar_accept_threshold=0.2)
    else:
        shared = DecodeConfig(mode=mode, forward_overhead=1e6)
    shared = replace(shared, max_new_tokens=9)
    configs = [replace(shared, **OWN[i % len(OWN)]) for i in range(len(prompts))]
    decoder = engine.Decoder(model, shared, 4, max(LENGTHS) + 9)
    for index, (ids, config) in enumerate(zip(prompts, configs, strict=True)):
        decoder.waiting.append(Request(index, ids, index // 2, config))
    found, num_steps = dict[int, Rollout](), 0
    while decoder.is_busy:
        found |= decoder.step()
        num_steps += 1
    assert num_steps < sum(rollout.num_steps for rollout in found.values()) / 2
    for index, (ids, config) in enumerate(zip(prompts, configs, strict=True)):
        (alone,) = generate(model, [ids], config, [index // 2])
        assert (found[index].text_ids, found[index].finish_reason) == (alone.text_ids, alone.finish_reason)
        assert found[index].logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert len(found[index].logprobs) == config.logprobs * alone.num_response
        if mode != "rejecting":
            simple = simple_ar if mode in ("ar", "lossless") else simple_denoise
            assert found[index].text_ids == simple(model, ids, config, index // 2)


@pytest.mark.parametrize("pairs", [1, 400, 4000])
@pytest.mark.parametrize("mode", ["threshold", "lossless", "ar"])
@pytest.mark.parametrize(
    ("kind", "grid"), [("lora", "absolute"), ("copy", "response"), *(("sdar", grid) for grid in GRIDS)]
)
def test_prompts_computed_in_parts_give_the_same_responses_in_smaller_forwards(
    kind: str, grid: GridKind, mode: Mode, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4000: two rows at once; 400: one row in parts; 1: block by block."""
    if kind == "sdar" and mode == "lossless":
        pytest.skip("sdar has no AR model to verify with")
    model, sizes = make_lm(kind, grid), list[int]()
    prompts = make_prompts([1, 3, 38, 40, 39, 4, 37])
    config = DecodeConfig(mode=mode, max_new_tokens=9, batch_size=4, temperature=1.0, forward_overhead=32.0)

    def run(forward: PackedForward) -> torch.Tensor:
        sizes.append(int(forward.cache.count_B.max()))
        return forward.run()

    model.run_packed = run
    whole = generate(model, prompts, config, torch.Generator().manual_seed(7))
    assert max(sizes) >= 38
    monkeypatch.setattr(engine, "PREFILL_PAIRS", pairs)
    sizes.clear()
    parts = generate(model, prompts, config, torch.Generator().manual_seed(7))
    assert [r.text_ids for r in parts] == [r.text_ids for r in whole]
    more = [a.num_forwards - b.num_forwards for a, b in zip(parts, whole, strict=True)]
    if pairs < 4000:
        assert max(sizes) <= max(pairs // 37, 24) and min(more[2:5]) > 2
    elif mode != "lossless":  # whose plans depend on what was decoded before
        assert max(more) == 1


@pytest.mark.parametrize("num_slots", [1, 10])
@pytest.mark.parametrize("mode", ["threshold", "lossless", "ar"])
@pytest.mark.parametrize(
    ("kind", "grid"), [("lora", "absolute"), ("copy", "response"), *(("sdar", grid) for grid in GRIDS)]
)
def test_a_long_prompt_is_computed_between_the_steps_of_the_others(
    kind: str, grid: GridKind, mode: Mode, num_slots: int
) -> None:
    """Each response is that of its prompt alone, and no step stands still for a prompt."""
    if kind == "sdar" and mode == "lossless":
        pytest.skip("sdar has no AR model to verify with")
    model = make_lm(kind, grid)
    prompts = make_prompts([3, 38, 1, 39, 37, 4, 33, 2, 40, 5])
    config = DecodeConfig(mode=mode, max_new_tokens=9, temperature=1.0, forward_overhead=32.0)
    alone = [generate(model, [ids], config, [seed])[0] for seed, ids in enumerate(prompts)]
    decoder = engine.Decoder(model, config, 4, 40 + 9, prefill_slots=num_slots)
    sizes, finished, num_together = list[int](), dict[int, Rollout](), 0

    def run(forward: PackedForward) -> torch.Tensor:
        sizes.append(int(forward.cache.count_B.max()))
        return forward.run()

    model.run_packed = run
    waiting = [Request(seed, ids, seed, config) for seed, ids in enumerate(prompts)]
    for index in (100, 101):  # they are dropped in the middle of their prompts, or of their responses
        waiting.insert(3, Request(index, prompts[3], 0, config))
    num_steps = 0
    while waiting or decoder.is_busy:
        decoder.waiting.extend(waiting[:1])
        del waiting[:1]
        before = dict(zip(decoder.state.index_B.tolist(), decoder.state.num_steps_B.tolist(), strict=True))
        num_together += bool(before) and bool(decoder.joining)
        finished |= decoder.step()
        after = dict(zip(decoder.state.index_B.tolist(), decoder.state.num_steps_B.tolist(), strict=True))
        assert all(index in finished or after[index] == before[index] + 1 for index in before)
        num_steps += 1
        if num_steps == 6:
            decoder.drop([100, 101])
    assert [finished[seed].text_ids for seed in range(len(prompts))] == [one.text_ids for one in alone]
    assert num_together > 5 and max(sizes) <= 25 + num_slots  # 25: drafts and what they verify
    assert max(finished) < 100


@pytest.mark.parametrize("mode", ["threshold", "lossless", "ar"])
@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_the_turns_of_a_chat_reuse_the_keys_of_earlier_ones(kind: str, mode: Mode) -> None:
    """Two chats that go on from the responses: each response is that of its prompt alone, though only the new
    tokens are computed.
    """
    model, prefixes = make_lm(kind, "response"), PrefixCache(150)
    config = DecodeConfig(mode=mode, max_new_tokens=9, temperature=1.0, forward_overhead=32.0)
    decoder = engine.Decoder(model, config, 3, 100, prefill_slots=12, prefixes=prefixes)
    chats = [[*ids] for ids in make_prompts([21, 19])]
    chats[1][:6] = chats[0][:6]
    num_clean = list[int]()

    def run(forward: PackedForward) -> torch.Tensor:
        num_clean.append(forward.packed.num_clean)
        return forward.run()

    model.run_packed = run
    for turn in range(4):
        before, reused = [len(ids) for ids in chats], prefixes.num_reused
        decoder.waiting.extend(Request(i, ids, turn, config) for i, ids in enumerate(chats))
        num_clean.clear()
        finished: dict[int, Rollout] = {}
        while decoder.is_busy:
            finished |= decoder.step()
        total = sum(num_clean)
        for index, ids in enumerate(chats):
            (alone,) = generate(model, [ids], config, [turn])
            assert finished[index].text_ids == alone.text_ids
            ids += [*alone.text_ids[:-1], 3 + turn, 4, 5]
        if turn:
            assert prefixes.num_reused - reused > sum(before) - 2 * 12
            assert total < sum(before) / 2 + 2 * 9 * (8 if mode == "lossless" else 2)
        assert prefixes.num_tokens == sum(map(len, prefixes.texts)) <= 150
    assert prefixes.num_hits >= 6


def test_no_more_texts_are_kept_than_fit_and_the_oldest_go_first() -> None:
    prefixes, cache = PrefixCache(10), DecodeCache(2, 8, torch.device("cpu"))
    keys, values = torch.randn(2, 2, 9, 1, 4).unbind(0)
    cache.layers[0] = (keys.clone(), values.clone())
    for ids in ((1, 2), (1, 2, 3), (4, 5, 6, 7), (8, 9)):
        prefixes.save(ids, cache, 0)
    assert [*prefixes.texts] == [(1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert prefixes.load((1, 2, 9), cache, 1) == 2 and prefixes.load((2,), cache, 1) == 0
    assert torch.equal(cache.layers[0][0][1, :2], keys[0, :2])
    assert torch.equal(cache.layers[0][1][1], torch.cat([values[0, :2], values[1, 2:]]))
    prefixes.save((7, 7), cache, 0)
    assert [*prefixes.texts] == [(8, 9), (1, 2, 3), (7, 7)] and prefixes.num_tokens == 7


@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_lossless_output_does_not_depend_on_what_was_planned(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_lm(kind, base=qwen3(vocabulary=6))
    prompts = make_prompts(LENGTHS, vocabulary=6)
    config = DecodeConfig(mode="lossless", max_new_tokens=12, batch_size=5, temperature=1.0)
    dice = random.Random(0)

    def random_plan(policy: DraftPolicy, state: DecodeState, *, is_closed: bool) -> list[DraftPlan]:
        plans = []
        for num_draft in state.num_draft_B.tolist():
            num_verified = dice.randint(0, num_draft)
            groups = tuple(k for k in range(num_verified + 1) if dice.random() < 0.4)
            plans.append(DraftPlan(num_verified, groups, dice.randint(1, policy.draft_length)))
        return plans

    expected = generate(model, prompts, replace(config, mode="ar"), torch.Generator().manual_seed(3))
    monkeypatch.setattr(DraftPolicy, "plan", random_plan)
    rollouts = generate(model, prompts, config, torch.Generator().manual_seed(3))
    assert [rollout.text_ids for rollout in rollouts] == [rollout.text_ids for rollout in expected]


@pytest.mark.parametrize("mode", ["static", "threshold", "lossless", "ar"])
def test_a_row_s_draws_do_not_depend_on_the_batch(mode: str) -> None:
    model, prompts = make_lm("lora"), make_prompts(LENGTHS)
    config = DecodeConfig(mode=mode, max_new_tokens=9, temperature=1.0)
    wide, narrow = (
        generate(model, prompts, replace(config, batch_size=size), torch.Generator().manual_seed(1))
        for size in (16, 2)
    )
    assert [rollout.text_ids for rollout in wide] == [rollout.text_ids for rollout in narrow]


def test_draws_follow_the_distribution() -> None:
    probs_V = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.02, 0.01])
    key_M = noise_keys(torch.arange(60_000), torch.tensor(5), 2)
    ids_M = choose_tokens(probs_V.log().expand(60_000, -1), AT_ONE.expand(60_000, 3), key_M)
    expected_V = 60_000 * probs_V.double()
    statistic = ((ids_M.bincount(minlength=6) - expected_V) ** 2 / expected_V).sum()
    assert float(torch.special.gammaincc(torch.tensor(2.5).double(), statistic / 2)) > 1e-3


def test_draws_of_neighbouring_positions_steps_and_seeds_are_independent() -> None:
    logits_MV = torch.zeros(40_000, 2)
    seed_M, position_M = torch.arange(40_000) % 200, torch.arange(40_000) // 200
    sampling_M3 = AT_ONE.expand(40_000, 3)
    first_M = choose_tokens(logits_MV, sampling_M3, noise_keys(seed_M, position_M, 0))
    for other in ((seed_M + 1, position_M, 0), (seed_M, position_M + 1, 0), (seed_M, position_M, 1)):
        second_M = choose_tokens(logits_MV, sampling_M3, noise_keys(*other))
        assert abs(float((first_M == second_M).double().mean()) - 0.5) < 0.012  # 4.8 standard deviations


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_tells_of_every_token_once(kind: str) -> None:
    model, prompts = make_lm(kind), make_prompts([3, 6, 5])
    seen: dict[tuple[int, int], int] = {}

    def on_step(index_B: torch.Tensor, tokens_BL: torch.Tensor, revealed_BL: torch.Tensor) -> None:
        for row, position in revealed_BL.nonzero().tolist():
            place = (int(index_B[row]), position)
            assert place not in seen
            seen[place] = int(tokens_BL[row, position])

    config = DecodeConfig(mode="threshold", max_new_tokens=9, batch_size=2, ar_accept_threshold=0.0)
    rollouts = generate(model, prompts, config, on_step=on_step)
    for index, rollout in enumerate(rollouts):
        first = len(rollout.prompt_ids)
        assert tuple(seen[index, first + i] for i in range(rollout.num_response)) == rollout.text_ids


@pytest.mark.parametrize("mode", ["ar", "lossless"])
def test_logprobs_are_the_base_model_s(mode: str) -> None:
    base, prompts = qwen3(), make_prompts([3, 6])
    config = DecodeConfig(mode=mode, max_new_tokens=9, temperature=1.0, logprobs=True)
    for rollout in generate(make_lm("lora"), prompts, config, torch.Generator().manual_seed(2)):
        ids = rollout.prompt_ids + rollout.text_ids
        logits_LV = base(torch.tensor([ids])).logits[0].detach()
        logits_LV[:, MASK] = -torch.inf
        first = len(rollout.prompt_ids) - 1
        expected = logits_LV.log_softmax(-1)[
            torch.arange(first, len(ids) - 1), torch.tensor(ids[first + 1 :])
        ]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_a_response_ends_where_find_end_says() -> None:
    model, prompts = make_lm("lora"), make_prompts([3, 6])
    config = DecodeConfig(mode="lossless", max_new_tokens=9)
    whole = generate(model, prompts, config)
    cut = generate(model, prompts, config, find_end=lambda ids: 3 if len(ids) >= 3 else None)
    assert [rollout.text_ids for rollout in cut] == [rollout.text_ids[:3] for rollout in whole]
    assert {rollout.finish_reason for rollout in cut} == {"stop"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_keeps_its_text_and_sdar_sees_what_follows_a_gap(kind: str) -> None:
    model = make_lm(kind)
    config = DecodeConfig(mode="static", ar_accept_threshold=0.0)
    template = (1, 2, 3, 4, 5, MASK, MASK, 7, 8, MASK, 9)
    other = (*template[:7], 6, *template[8:])  # differs in the gap's own block, after the gap
    first, second = (generate(model, [ids], config)[0] for ids in (template, other))
    for ids, rollout in ((template, first), (other, second)):
        filled = rollout.prompt_ids + rollout.text_ids
        assert len(filled) <= len(ids)
        assert MASK not in filled
        assert STOP in filled or len(filled) == len(ids)
        assert all(new == old for new, old in zip(filled, ids, strict=False) if old != MASK)


@pytest.mark.parametrize("mode", ["ar", "lossless", "static"])
def test_a_template_is_refused_where_its_text_would_be_lost(mode: Mode) -> None:
    config = DecodeConfig(mode=mode)  # static: the AR model may reject tokens
    with pytest.raises(ValueError, match="mask tokens"):
        generate(make_lm("lora"), [[1, 2, 3], [1, 2, MASK, 4]], config)


def test_entropy_bound_reveals_the_certain_ones_first_and_always_one() -> None:
    entropy = torch.tensor([[0.3, 0.1, 0.2, 0.0], [2.0, 3.0, 1.0, 9.0]])
    masked = torch.tensor([[True, True, True, False], [True, True, True, False]])
    revealed = choose_within_entropy(entropy, masked, 0.25)
    assert revealed.tolist() == [[False, True, True, False], [False, False, True, False]]
    assert choose_within_entropy(entropy * torch.nan, masked, 0.25).any(1).all()
