"""Drafts that are copied from the text before them: found as by hand, and lossless."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny_models import make_lm, make_prompts, qwen3
from transformers import GPT2Config, GPT2LMHeadModel

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import DecodeState, DecodeStats, Request
from opdlm.decoding.generate import generate
from opdlm.decoding.prompt_lookup import LONGEST_MATCH, look_up


def by_hand(tokens: Sequence[int], length: int) -> tuple[list[int], int]:
    """The tokens after the last of the longest matches, repeated with its period; and the match's length."""
    best, place = 0, 0
    for end in range(1, len(tokens)):
        match = 0
        while match < min(end, LONGEST_MATCH) and tokens[end - 1 - match] == tokens[-1 - match]:
            match += 1
        if match and match >= best:
            best, place = match, end
    text = list(tokens)
    for _ in range(length):
        text.append(text[len(text) - (len(tokens) - place)])
    return (text[len(tokens) :] if best else []), best


@pytest.mark.parametrize("num_ids", [1, 2, 3, 30])
def test_the_longest_and_latest_match_is_continued(num_ids: int) -> None:
    dice = random.Random(num_ids)
    rows = [[dice.randrange(num_ids) for _ in range(dice.randint(1, 40))] for _ in range(60)]
    config = DecodeConfig(mode="lossless")
    state = DecodeState.start([Request(i, row, 0, config) for i, row in enumerate(rows)], 60, 99, 5)
    state.final_B = torch.tensor([len(row) for row in rows])
    draft_BD, match_B = look_up(state, 5)
    for row, draft, match in zip(rows, draft_BD.tolist(), match_B.tolist(), strict=True):
        expected, length = by_hand(row, 5)
        assert match == length
        assert not match or draft == expected
    assert match_B.max() > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("overhead", [0.0, 32.0, 1e6, None])
@pytest.mark.parametrize("num_tokens", [1, 3, 12])
def test_copied_drafts_are_lossless(num_tokens: int, overhead: float | None, temperature: float) -> None:
    """Drafts of a random student are never right here, and the responses repeat themselves."""
    model = make_lm("lora", base=qwen3(vocabulary=6), noise=3.0, block_size=4)
    prompts = make_prompts([1 + i % 9 for i in range(32)], vocabulary=6)
    config = DecodeConfig(
        mode="lossless",
        max_new_tokens=30,
        batch_size=20,
        temperature=temperature,
        forward_overhead=overhead,
        prompt_lookup_num_tokens=num_tokens,
    )
    rollouts = generate(model, prompts, config, range(len(prompts)))
    expected = generate(
        model,
        prompts,
        DecodeConfig(mode="ar", max_new_tokens=30, temperature=temperature),
        range(len(prompts)),
    )
    assert [r.text_ids for r in rollouts] == [r.text_ids for r in expected]
    if overhead == 1e6 and temperature == 0:
        without = generate(model, prompts, replace(config, prompt_lookup_num_tokens=0), range(len(prompts)))
        assert DecodeStats.of(rollouts).num_steps < 0.9 * DecodeStats.of(without).num_steps


def test_no_draft_reaches_beyond_the_context() -> None:
    """Two blocks of it are left for drafts; learned positions end there."""
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=6, n_positions=48, n_embd=32, n_layer=2, n_head=2)
    model = make_lm("copy", base=GPT2LMHeadModel(config).eval(), block_size=4)
    model.spec = replace(model.spec, stop_token_ids=())
    prompts = [[1, 2, 3, 1, 2, 3, 1, 2, 3, 1]] * 2
    lossless = DecodeConfig(
        mode="lossless", max_new_tokens=30, forward_overhead=1e6, prompt_lookup_num_tokens=30
    )
    rollouts = generate(model, prompts, lossless)
    expected = generate(model, prompts, DecodeConfig(mode="ar", max_new_tokens=30))
    assert [r.text_ids for r in rollouts] == [r.text_ids for r in expected]
    assert {r.num_response for r in rollouts} == {30}


def test_without_a_number_text_is_copied_but_not_in_repeatable_decoding() -> None:
    """Reports and rollouts measure and train what the student drafts."""
    config = DecodeConfig(mode="lossless")
    assert config.lookup_length > 0
    assert config.repeatable().lookup_length == 0
    assert replace(config, prompt_lookup_num_tokens=3).repeatable().lookup_length == 3
    assert DecodeConfig(mode="threshold").lookup_length == 0


def test_a_length_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt_lookup_num_tokens \(-1\) must lie between 0 and"):
        DecodeConfig(mode="lossless", prompt_lookup_num_tokens=-1)
