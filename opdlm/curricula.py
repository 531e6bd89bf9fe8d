"""What changes with the step: block size, selection of states, mask rates, whose responses, which rollouts.

Each is a function of the settings and the step (0-based), so a resumed run and a plan agree with the run.
Not here: the length curriculum (`rollout.length_cap`), which follows the block size given here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TypeVar

from opdlm.config import Config, FormatSection, Selection, StatesSection

Value = TypeVar("Value")


def scheduled(pairs: Sequence[tuple[int, Value]], step: int, default: Value) -> Value:
    """The value of the last pair (first step, value) that has begun; `default` without pairs."""
    return [value for first, value in pairs if first <= step][-1] if pairs else default


def block_size_at(section: FormatSection, step: int) -> int:
    return scheduled(section.block_growth, step, section.block_size)


def is_from_teacher(config: Config, step: int) -> bool:
    """Whose responses step `step` trains on."""
    return config.loss.objective in ("off_policy", "sft") or step < config.rollout.warm_start_steps


def selection_at(config: Config, step: int) -> Selection:
    """Teacher responses have no trajectory, and the baselines do not use one: they are masked at random."""
    if config.loss.objective != "opd" or is_from_teacher(config, step):
        return "random_mask"
    return scheduled(config.states.selection_schedule, step, config.states.selection)


def mask_rate_at(section: StatesSection, step: int) -> tuple[float, float]:
    """Range of random mask rates: the upper end rises linearly and is reached after the ramp."""
    low, high = section.mask_rate
    if step + 1 >= section.mask_rate_ramp_steps:
        return low, high
    return low, low + (high - low) * (step + 1) / section.mask_rate_ramp_steps


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
    per_pass = -(-config.rollout.prompts_per_step // config.train.rows_per_update)
    num_pools = sum(step - first_reused_step(config, step) + 1 for step in range(config.train.num_steps))
    return num_pools * config.train.passes_per_rollout * per_pass
