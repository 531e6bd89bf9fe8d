"""Logits of the sampler equal those of training rows; AR decoding and clean slots equal the base model.

Shapes: B rows, L row, S slots, V vocabulary, H hidden.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import (
    BLOCK,
    CPU,
    GRIDS,
    KINDS,
    MASK,
    SLIDING,
    STOP,
    Seen,
    make_lm,
    make_prompts,
    make_rollout,
    qwen3,
    record_sampler,
)
from torch import Tensor
from transformers import PreTrainedModel

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import NEVER, Rollout
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.kv_cache import DecodeCache
from opdlm.modeling.slots import CLEAN, GridKind, join_slots
from opdlm.objectives.states import select_states
from opdlm.objectives.targets import score_rows

MODES = {
    "static": DecodeConfig(mode="static", max_new_tokens=10, ar_accept_threshold=0.0),
    "two_steps": DecodeConfig(mode="static", max_new_tokens=10, denoising_steps=2, ar_accept_threshold=0.0),
    "threshold": DecodeConfig(
        mode="threshold", max_new_tokens=10, confidence_threshold=0.2, ar_accept_threshold=0.0
    ),
    "sampling": DecodeConfig(
        mode="threshold",
        max_new_tokens=10,
        temperature=1.0,
        confidence_threshold=0.15,
        ar_accept_threshold=0.0,
    ),
}


def training_logits(model: DiffusionLM, rollouts: list[Rollout]) -> dict[tuple[object, ...], Tensor]:
    """(row, first position of the state, masked positions among its slots, target) -> logits of training."""
    states = select_states(rollouts, model.spec, "all", torch.Generator().manual_seed(0))
    scored = score_rows(model, states.text)
    with torch.no_grad():
        logits_BSV = model.logits(model.student_hidden(states.slots, scored.cache))
    found = {}
    noised = states.slots
    for row, column in states.is_supervised_BS.nonzero().tolist():
        in_group_S = noised.group_BS[row] == noised.group_BS[row, column]
        masked_S = in_group_S & (noised.ids_BS[row] == model.spec.mask_token_id)
        masked = tuple(noised.positions_BS[row, masked_S].tolist())
        found[row, masked, int(states.target_BS[row, column])] = logits_BSV[row, column]
    return found


def sampler_logits(
    seen: list[Seen], rollouts: list[Rollout], model: DiffusionLM
) -> dict[tuple[object, ...], Tensor]:
    """The same for the sampler, where the student predicts a response token.

    In `preserve` the teacher predicts the first masked position and the last position of a block is never an
    input, so two states that differ only there are equal for the student.
    """
    is_preserve = model.spec.format == "preserve"
    found = {}
    for one in seen:
        rollout = rollouts[one.row]
        masked = [i for i, token in enumerate(one.tokens) if token == model.spec.mask_token_id]
        is_response = one.target < len(rollout.prompt_ids) + rollout.num_response
        if is_response and not (is_preserve and one.target == masked[0]):
            inputs = [i for i in masked if not (is_preserve and i == len(one.tokens) - 1)]
            found[one.row, tuple(inputs), one.target] = one.logits_V
    return found


def check_training_rows(model: DiffusionLM, prompts: list[tuple[int, ...]], config: DecodeConfig) -> int:
    """Training and sampling agree on every state; how many tokens were revealed beside another one."""
    with record_sampler() as seen:
        rollouts = generate(model, prompts, config, torch.Generator().manual_seed(3))
    sampled, trained = sampler_logits(seen, rollouts, model), training_logits(model, rollouts)
    assert len(sampled) > len(prompts)
    assert sampled.keys() == trained.keys()
    for key, logits_V in sampled.items():
        torch.testing.assert_close(
            trained[key], logits_V, atol=1e-4, rtol=1e-4, msg=lambda m, key=key: f"{key} {m}"
        )
    steps = [[step for step in rollout.unmask_step if step != NEVER] for rollout in rollouts]
    return sum(len(row) - len(set(row)) for row in steps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_row_logits_equal_cached_decoding_for_every_prompt_length(
    kind: str, grid: GridKind, mode: str
) -> None:
    prompts = make_prompts([*range(1, 9), 3, 4])
    num_together = check_training_rows(make_lm(kind, grid), prompts, MODES[mode])
    assert (num_together > 0) == (mode != "static")  # the other modes reveal several tokens in one step


@pytest.mark.parametrize("family", SLIDING)
@pytest.mark.parametrize("kind", KINDS)
def test_training_row_logits_equal_cached_decoding_beyond_a_sliding_window(kind: str, family: str) -> None:
    model = make_lm(kind, base=SLIDING[family](8))
    check_training_rows(model, make_prompts([9, 14, 10, 12]), MODES["two_steps"])


@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_preserve_predicts_the_first_unknown_token_as_the_base_model_does(kind: str) -> None:
    base, model = qwen3(), make_lm(kind)
    with record_sampler() as seen:
        generate(model, make_prompts([5, 6, 7, 8]), MODES["threshold"])
    firsts = [one for one in seen if one.tokens.index(MASK) == one.target]
    assert len(firsts) > 8
    for one in firsts:
        with torch.no_grad():
            expected_V = base(torch.tensor([one.tokens[: one.target]])).logits[0, -1]
        expected_V[MASK] = -torch.inf
        torch.testing.assert_close(one.logits_V, expected_V, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind in KINDS for mode in ("static", "threshold")]
    + [(kind, mode) for kind in ("lora", "copy") for mode in ("ar", "lossless")],
)
def test_a_ragged_batch_decodes_as_its_rows_do_alone(kind: str, mode: str) -> None:
    model, prompts = make_lm(kind), make_prompts([1, 9, 4, 6, 6, 2])
    config = DecodeConfig(
        mode=mode,
        max_new_tokens=12,
        confidence_threshold=0.2,
        ar_accept_threshold=0.0,
        forward_overhead=1e9,  # every draft pays, so what is drafted depends on no running average
    )
    together = generate(model, prompts, config)
    alone = [rollout for prompt in prompts for rollout in generate(model, [prompt], config)]
    assert [rollout.text_ids for rollout in together] == [rollout.text_ids for rollout in alone]
    assert [rollout.unmask_step for rollout in together] == [rollout.unmask_step for rollout in alone]
    cost, cost_alone = (DecodeStats.of(rollouts).num_forwards for rollouts in (together, alone))
    if kind == "copy":  # a row that has nothing noised waits for the second pass of those that have
        assert cost >= cost_alone
    else:
        assert cost == cost_alone


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_block_never_moves_an_earlier_logit(kind: str, grid: GridKind) -> None:
    model, rollout = make_lm(kind, grid), make_rollout(6, 11, grid)
    later_block = -(-10 // BLOCK) * BLOCK + (6 % BLOCK if grid == "response" else 0)
    changed = list(rollout.response_ids)
    for i in range(later_block - 6, len(changed)):
        changed[i] = (changed[i] + 1) % STOP
    before, after = (
        training_logits(model, [one]) for one in (rollout, replace(rollout, response_ids=tuple(changed)))
    )
    assert before.keys() == after.keys()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert moved and min(target for _, _, target in moved) >= later_block


def base_generate(base: PreTrainedModel, prompt: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
    ids_BL = base.generate(
        torch.tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False, suppress_tokens=[MASK]
    )
    return tuple(ids_BL[0, len(prompt) :].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_ar_mode_is_transformers_generate_on_the_base_model(kind: str) -> None:
    base, prompts = qwen3(), make_prompts([1, 5, 8, 3])
    rollouts = generate(make_lm(kind).teacher_decoder(), prompts, DecodeConfig(mode="ar", max_new_tokens=16))
    assert [rollout.text_ids for rollout in rollouts] == [base_generate(base, p, 16) for p in prompts]
    assert all(rollout.num_forwards == rollout.num_response for rollout in rollouts)


@pytest.mark.parametrize("family", SLIDING)
def test_cached_decoding_beyond_a_sliding_window_is_the_family_s_own_forward(family: str) -> None:
    base = SLIDING[family](8)
    model = DiffusionLM(copy.deepcopy(base), make_lm("lora").spec).teacher_decoder()
    prompts = make_prompts([1, 12])
    with record_sampler() as seen:
        rollouts = generate(model, prompts, DecodeConfig(mode="ar", max_new_tokens=24))
    assert max(rollout.num_response for rollout in rollouts) > 16
    for one in seen:
        with torch.no_grad():
            expected_V = base(torch.tensor([one.tokens[: one.target]])).logits[0, -1]
        expected_V[MASK] = -torch.inf
        torch.testing.assert_close(one.logits_V, expected_V, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_clean_slots_are_the_base_model_bitwise_beside_noised_ones(kind: str) -> None:
    model = make_lm(kind)
    untouched = DiffusionLM(qwen3(), model.spec)
    states = select_states(
        [make_rollout(6, 9, "absolute"), make_rollout(3, 8, "absolute")],
        model.spec,
        "all",
        torch.Generator().manual_seed(0),
    )
    clean = states.text
    slots = join_slots(clean, states.slots)
    with torch.no_grad():
        assert torch.equal(model.teacher_hidden(clean), untouched.student_hidden(clean))
        both_BSH, num_forwards = model.decode_hidden(slots, DecodeCache(2, 60, CPU))
        alone_BSH, _ = untouched.decode_hidden(slots, DecodeCache(2, 60, CPU))
    assert num_forwards == (1 if kind == "lora" else 2)
    is_clean_BS = slots.group_BS == CLEAN
    assert torch.equal(both_BSH[is_clean_BS], alone_BSH[is_clean_BS])
    assert (both_BSH - alone_BSH)[slots.is_noised_BS].abs().max(-1).values.min() > 1e-3
