"""Prompts -> rollouts: the student's own reverse trajectories, or the teacher's responses for the baselines.

The length cap grows over the first steps (length curriculum), METHOD part 3. Random draws derive from (seed,
step, place of the prompt in the step), never from what ran before, what is decoded beside it, or where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from opdlm.config.sections import RolloutSection
from opdlm.decoding.generate import DecodeConfig, OnStep, generate
from opdlm.decoding.rollout import Prompt, Rollout
from opdlm.modeling.compiled import compiled_decoding
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.seeds import seed_of
from opdlm.vllm.engine import VllmStudent, VllmTeacher


def length_cap(section: RolloutSection, step: int, block_size: int) -> int:
    """Response tokens allowed in rollout step `step` (counted from 1), a multiple of the block size while it
    grows.
    """
    if section.start_new_tokens is None or step >= section.ramp_steps:
        return section.max_new_tokens
    progress = step / section.ramp_steps
    share = 1 - math.cos(math.pi / 2 * progress) if section.ramp == "cosine" else progress
    length = section.start_new_tokens + share * (section.max_new_tokens - section.start_new_tokens)
    return max(block_size, round(length / block_size) * block_size)


def decode_config(section: RolloutSection, max_new_tokens: int, *, from_teacher: bool) -> DecodeConfig:
    return DecodeConfig(
        mode="ar" if from_teacher else section.remasking,
        max_new_tokens=max_new_tokens,
        batch_size=section.batch_size,
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        denoising_steps=section.denoising_steps,
        confidence_threshold=section.confidence_threshold,
        veto_below=0.0,  # states must be the student's own
    )


def generate_rollouts(
    model: DiffusionLM,
    prompts: Sequence[Prompt],
    section: RolloutSection,
    *,
    step: int,
    seed: int,
    places: Sequence[int] | None = None,
    from_teacher: bool = False,
    vllm: VllmTeacher | VllmStudent | None = None,
    on_step: OnStep | None = None,
) -> list[Rollout]:
    """One response per prompt, in the order of the prompts. `step` counts from 1; `places` of the prompts in
    the step decide the random draws (None: they are the step's first). `vllm` generates, if given.
    """
    config = decode_config(
        section, length_cap(section, step, model.spec.block_size), from_teacher=from_teacher
    )
    places = range(len(prompts)) if places is None else places
    seeds = [seed_of(seed, step, place) for place in places]
    ids = [prompt.ids for prompt in prompts]
    match vllm:
        case VllmTeacher():
            return vllm.responses(ids, config, seeds)
        case VllmStudent():
            return vllm.rollouts(ids, config.max_new_tokens, seeds)
    with compiled_decoding(model, section.compile):
        return generate(model.teacher_decoder() if from_teacher else model, ids, config, seeds, on_step)
