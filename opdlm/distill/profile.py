"""The profile: the settings that `opdlm convert MODEL` chooses for a model and a machine.

What a user gives comes first, then the profile, then the defaults. `opdlm study profile` compares the choices
with others (docs/studies.md). The learning rate falls with the root of the width: 1.4e-3 for LoRA at hidden
size 576. A full copy of the weights moves much further at the same rate, and gets a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from opdlm.config.loader import build_section, flat, override_of, read_settings, set_value
from opdlm.config.rules import check_config
from opdlm.config.schedules import num_updates_of
from opdlm.config.sections import Config, MaskSection, TrainSection
from opdlm.distill.costs import ModelSizes, measure_sizes
from opdlm.distill.plan import make_plan
from opdlm.environment import free_memory
from opdlm.errors import OpdlmError
from opdlm.training.devices import join_launch

LORA_RATE, LORA_WIDTH = 3e-3, 128
"""Peak learning rate of an adapter, at this hidden size."""
FULL_RATE, FULL_WIDTH = 1e-5, 2560
"""Peak learning rate of all weights (OPDLM, arXiv 2606.06712), at this hidden size."""
DRAFT_HEAD = 512
"""Width of the draft head."""
CPU_STEPS, CPU_PARAMETERS, CPU_MOST_STEPS = 24, 135e6, 100
"""Steps for a model of so many parameters on a CPU, fewer by the root of its size, and the most."""
MEMORY_SHARE = 0.8
"""Of the free memory, what the estimate may reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One setting of the profile."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


def profile(model_path: str, overrides: Sequence[str]) -> list[Choice]:
    """The settings that `overrides` leave open, chosen for the checkpoint and this machine. All ranks take
    those of the first, since the free memory of others differs.
    """
    join_launch()
    values = read_settings(None, [override_of("model.path", model_path), *overrides])
    given = set(flat(values))
    try:
        sizes = measure_sizes(build_section(Config, values))
    except OpdlmError:  # nothing that can be converted: the run says why
        return []
    chosen: list[Choice] = []
    for choose in CHOOSERS:
        for choice in choose(build_section(Config, values), sizes):
            if choice.key not in given:
                set_value(values, choice.key, choice.value)
                chosen.append(choice)
    chosen += memory_choices(build_section(Config, values), sizes, given)
    (of_first_rank,) = broadcast_object_list([chosen])
    return of_first_rank


def objective_choices(config: Config, _: ModelSizes) -> list[Choice]:
    """What the student learns. In `preserve` all text is the model's own."""
    if config.format.name != "preserve":
        return []
    if config.masking != MaskSection() and config.format.can_denoise:  # masks of the user's choice
        return [Choice(key="loss.objective", value="off_policy", reason="masks in text of the AR mode")]
    return [Choice(key="loss.objective", value="draft", reason="drafts in text of the AR mode")]


def method_choices(config: Config, _: ModelSizes) -> list[Choice]:
    """How the student learns."""
    chosen = [
        Choice(key="format.block_size", value=8, reason="tokens drafted together"),
        Choice(key="train.epochs_per_rollout", value=2, reason="responses cost more than updates"),
    ]
    if config.format.noise == "mask":
        reason = "zero multiplies the first gradients by fifty"
        chosen.append(Choice(key="format.mask_init", value="noise", reason=reason))
    if config.loss.objective == "draft" and config.format.can_denoise:  # other engines know no draft head
        reason = "a draft token knows those before it"
        chosen.append(Choice(key="format.draft_head", value=DRAFT_HEAD, reason=reason))
    if config.loss.objective == "opd":
        reason = "of each block, another in each pass"
        chosen.append(Choice(key="states.selection", value="one_per_block", reason=reason))
    return chosen


def size_choices(config: Config, sizes: ModelSizes) -> list[Choice]:
    """How much one core does: about half an hour with 135 M parameters, one to two hours with 630 M."""
    if PartialState().device.type != "cpu":
        return []
    steps = min(CPU_MOST_STEPS, max(1, round(CPU_STEPS * (CPU_PARAMETERS / sizes.total) ** 0.5)))
    rows = config.train.rows_per_update
    return [
        Choice(key="train.num_steps", value=steps, reason=f"{sizes.total / 1e6:,.0f} M parameters on a CPU"),
        Choice(key="rollout.prompts_per_step", value=math.ceil(16 / rows) * rows, reason="the same"),
        Choice(key="rollout.decode.max_new_tokens", value=128, reason="the same"),
        Choice(key="rollout.decode.batch_size", value=16, reason="rows decoded at once"),
    ]


def row_choices(config: Config, _: ModelSizes) -> list[Choice]:
    """Rows of an update that divide the prompts of a step."""
    prompts, rows = config.rollout.prompts_per_step, config.train.rows_per_update
    if prompts % rows == 0:
        return []
    reason = f"divides {prompts} prompts a step"
    return [Choice(key="train.rows_per_update", value=math.gcd(prompts, rows), reason=reason)]


def optimizer_choices(config: Config, sizes: ModelSizes) -> list[Choice]:
    """The learning rate by training mode and width, and its warm-up."""
    width = sizes.hidden
    rate = LORA_RATE * (LORA_WIDTH / width) ** 0.5 if config.lora.enabled else FULL_RATE * FULL_WIDTH / width
    mode = "LoRA" if config.lora.enabled else "all weights"
    warmup = max(1, min(20, num_updates_of(config) // 20))
    return [
        Choice(key="optimizer.learning_rate", value=float(f"{rate:.2g}"), reason=f"{mode}, width {width}"),
        Choice(key="optimizer.warmup_steps", value=warmup, reason="5 % of the updates, at most 20"),
    ]


def memory_choices(config: Config, sizes: ModelSizes, given: Collection[str]) -> list[Choice]:
    """The largest micro-batch whose estimate fits, with recomputed activations where one row needs them; what
    the user gave stays.
    """
    check_config(config)
    free = free_memory(PartialState().device)
    for micro, recomputes in memory_options(config.train, given):
        train = replace(config.train, micro_batch_rows=micro, gradient_checkpointing=recomputes)
        peak = make_plan(replace(config, train=train), sizes).peak
        if peak <= MEMORY_SHARE * free:
            break
    reason = f"estimate {peak / 2**30:.1f} of {free / 2**30:.1f} GiB free"
    fitting = {"train.micro_batch_rows": micro, "train.gradient_checkpointing": recomputes}
    return [Choice(key=key, value=value, reason=reason) for key, value in fitting.items() if key not in given]


def memory_options(train: TrainSection, given: Collection[str]) -> list[tuple[int, bool]]:
    """Rows of a micro-batch and whether activations are recomputed, the fastest first."""
    rows = train.rows_per_update
    halves = [n for n in (rows, rows // 2, rows // 4) if n]
    options = [*((n, False) for n in halves), (halves[-1], True), (1, True)]
    if "train.gradient_checkpointing" in given:
        options = [(n, train.gradient_checkpointing) for n in (*halves, 1)]
    if "train.micro_batch_rows" in given:
        both = dict.fromkeys(recomputes for _, recomputes in options)
        options = [(train.micro_batch_rows, recomputes) for recomputes in both]
    return options


CHOOSERS = (
    objective_choices,
    method_choices,
    size_choices,
    row_choices,
    optimizer_choices,
)
"""In this order: each knows what those before it chose."""


def describe_profile(chosen: Sequence[Choice]) -> str:
    """The choices, a line each."""
    lines = [f"  {choice!s:42} {choice.reason}" for choice in chosen]
    return "\n".join(["chosen for this model and machine (section.key=value changes one):", *lines])
