"""What changes with the step: block size, response length, selection of states, source of the rollouts.

Each is a function of the settings and the step (0-based), so a resumed run and a plan agree with the run.
Not here: mask rates (`objectives/masking.py`).
"""

from __future__ import annotations

import math
from functools import cache

from opdlm.config.sections import Config, FormatSection, RolloutSection, RunConfig, Selection, scheduled

FROM_TEACHER = ("off_policy", "sft", "draft")
"""Objectives that train on the teacher's responses."""


def block_size_at(section: FormatSection, step: int) -> int:
    return scheduled(section.block_growth, step, section.block_size)


def length_cap(section: RolloutSection, step: int, block_size: int) -> int:
    """Maximum response tokens in rollout step `step` (counted from 1). During the ramp it is a multiple of
    the block size.
    """
    if section.start_new_tokens is None or step >= section.ramp_steps:
        return section.decode.max_new_tokens
    progress = step / section.ramp_steps
    share = 1 - math.cos(math.pi / 2 * progress) if section.ramp == "cosine" else progress
    length = section.start_new_tokens + share * (section.decode.max_new_tokens - section.start_new_tokens)
    return max(block_size, round(length / block_size) * block_size)


def is_from_teacher(config: Config, step: int) -> bool:
    """Whose responses step `step` trains on."""
    return config.loss.objective in FROM_TEACHER or step < config.rollout.warm_start_steps


def selection_at(config: Config, step: int) -> Selection:
    """Teacher responses have no trajectory, and the baselines do not use one: they are masked at random."""
    if config.loss.objective != "opd" or is_from_teacher(config, step):
        return "random_mask"
    return scheduled(config.states.selection_schedule, step, config.states.selection)


def last_change(config: RunConfig, step: int) -> int:
    """The last step, up to `step`, at which losses before and after are of different kinds."""
    if step < config.masking.ramp_steps:
        return step
    starts = [config.masking.ramp_steps, *dict(config.masking.schedule)]
    if isinstance(config, Config):
        starts += [config.rollout.warm_start_steps, *dict(config.format.block_growth)]
        starts += [*dict(config.states.selection_schedule), *dict(config.loss.divergence_schedule)]
    return max(start for start in [0, *starts] if start <= step)


def first_reused_step(config: Config, step: int) -> int:
    """The oldest step whose rollouts step `step` trains on.

    None is older than `max_staleness`, and none has another block size or another author than the newest.
    """
    oldest = step
    while oldest > max(0, step - config.train.max_staleness) and is_alike(config, oldest - 1, step):
        oldest -= 1
    return oldest


def is_alike(config: Config, step: int, other: int) -> bool:
    same_size = block_size_at(config.format, step) == block_size_at(config.format, other)
    return same_size and is_from_teacher(config, step) == is_from_teacher(config, other)


@cache
def num_updates_of(config: Config) -> int:
    """Optimiser updates in a whole run."""
    prompts, rows = config.rollout.prompts_per_step, config.train.rows_per_update
    pools = (step - first_reused_step(config, step) + 1 for step in range(config.train.num_steps))
    return config.train.epochs_per_rollout * sum(-(-prompts * pool // rows) for pool in pools)
