"""Logits processors of transformers act on the AR model's logits, in drafts that are verified as well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import make_lm, make_prompts, qwen3
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.generate import generate

LENGTH, VOCABULARY = 24, 12
LOSSLESS = DecodeConfig(
    mode="lossless",
    max_new_tokens=LENGTH,
    batch_size=5,
    forward_overhead=1e6,
    prompt_lookup_num_tokens=6,
)


def processors_of(prompts: list[list[int]], stops: tuple[int, ...]) -> list[LogitsProcessorList | None]:
    """Every third prompt has none."""
    return [
        LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(1.3),
                NoRepeatNGramLogitsProcessor(3),
                SequenceBiasLogitsProcessor({(4,): 1.5}),
                MinNewTokensLengthLogitsProcessor(len(ids), 8, list(stops)),
            ]
        )
        if place % 3
        else None
        for place, ids in enumerate(prompts)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_lossless_text_is_that_of_ar_decoding_with_the_same_processors(kind: str, temperature: float) -> None:
    model = make_lm(kind, base=qwen3(vocabulary=VOCABULARY), block_size=4)
    prompts = make_prompts([1 + i % 9 for i in range(24)], vocabulary=VOCABULARY)
    processors = processors_of(prompts, model.spec.stop_token_ids)
    config = replace(LOSSLESS, temperature=temperature)
    ours = generate(model, prompts, config, range(24), logits_processors=processors)
    ar = replace(config, mode="ar")
    expected = generate(model, prompts, ar, range(24), logits_processors=processors)
    assert [r.text_ids for r in ours] == [r.text_ids for r in expected]
    assert [r.text_ids for r in generate(model, prompts, ar, range(24))] != [r.text_ids for r in expected]
    stats = DecodeStats.of(ours)
    assert stats.num_steps < stats.num_tokens  # some drafts were accepted


def test_greedy_text_is_that_of_transformers_with_the_same_processors() -> None:
    base = qwen3(vocabulary=VOCABULARY)
    model = make_lm("lora", base=qwen3(vocabulary=VOCABULARY), block_size=4)
    prompts = make_prompts([1 + i % 9 for i in range(12)], vocabulary=VOCABULARY)
    stops = model.spec.stop_token_ids
    processors = processors_of(prompts, stops)
    for ids, processor, ours in zip(
        prompts, processors, generate(model, prompts, LOSSLESS, logits_processors=processors), strict=True
    ):
        settings = GenerationConfig(
            max_new_tokens=LENGTH,
            do_sample=False,
            suppress_tokens=list(model.spec.banned_token_ids),
            eos_token_id=list(stops),
            pad_token_id=0,
        )
        given = processor or LogitsProcessorList()
        ids_1P = torch.tensor([ids])
        mask_1P = torch.ones_like(ids_1P)
        output = base.generate(ids_1P, settings, logits_processor=given, attention_mask=mask_1P)
        assert ours.text_ids == tuple(output[0, len(ids) :].tolist())
        assert processor is None or ours.num_response >= 8


def test_the_student_alone_takes_none() -> None:
    model = make_lm("lora")
    with pytest.raises(ValueError, match="`mode=static` takes no logits processors"):
        generate(
            model,
            [[1]],
            DecodeConfig(mode="static"),
            logits_processors=[RepetitionPenaltyLogitsProcessor(2.0)],
        )
