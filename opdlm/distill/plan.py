"""`convert --dry-run`: what a run will hold, compute and write. The numbers come from `costs`."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from opdlm.config.schedules import (
    block_size_at,
    is_from_teacher,
    num_updates_of,
    selection_at,
)
from opdlm.config.sections import Config
from opdlm.distill.costs import (
    Sizes,
    fixed_memory,
    kept_bytes,
    longest_row,
    measure_sizes,
    response_cap,
    rollout_memory,
    step_flops,
    training_memory,
    weight_element,
)
from opdlm.distill.self_prompts import SELF_PROMPTS_FILE
from opdlm.training.checkpoint import find_checkpoints

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    sizes: Sizes
    memory: dict[str, float]
    """Bytes per device by purpose; what starts with `rollout:` is gone when training begins, unless it is
    asynchronous or vLLM's.
    """
    activations: tuple[float, float]
    """Bytes without and with gradient checkpointing."""
    peak: float
    step_flops: dict[str, float]
    """Of the last step, by purpose."""
    total_flops: float
    response_tokens: int


def make_plan(config: Config) -> Plan:
    """Everything about the run that can be known before it starts. Reads config.json, writes nothing."""
    sizes = measure_sizes(config)
    last = config.train.num_steps - 1
    fixed = fixed_memory(config, sizes)
    row = longest_row(config, sizes, last)
    rollout, training = rollout_memory(config, sizes, row), training_memory(config, sizes, row)
    stays = config.rollout.asynchronous or config.rollout.engine == "vllm"
    together = operator.add if stays else max
    steps = range(config.train.num_steps)
    return Plan(
        sizes=sizes,
        memory=fixed | rollout | training,
        activations=(kept_bytes(config, sizes, row, False), kept_bytes(config, sizes, row, True)),
        peak=sum(fixed.values()) + together(sum(rollout.values()), sum(training.values())),
        step_flops=step_flops(config, sizes, last),
        total_flops=sum(sum(step_flops(config, sizes, step).values()) for step in steps),
        response_tokens=sum(config.rollout.prompts_per_step * response_cap(config, step) for step in steps),
    )


def describe_plan(config: Config, plan: Plan) -> str:
    """The plan as lines of text."""
    sizes = plan.sizes
    without, with_checkpointing = (f"{x / GIB:.2f} GiB" for x in plan.activations)
    flops = "  ".join(f"{name} {value:.2e}" for name, value in plan.step_flops.items())
    lines = [
        f"{config.model.path}: {sizes.family}, {sizes.total / 1e6:,.1f} M parameters, "
        f"{sizes.trained / 1e6:,.1f} M trained ({'LoRA' if config.lora.enabled else 'full copy'}), "
        f"format {config.format.name}",
        "",
        "memory per device, at most (estimate; each process holds all of it)",
        *(f"  {name:30} {size / GIB:8.2f} GiB" for name, size in plan.memory.items()),
        f"  {'peak':30} {plan.peak / GIB:8.2f} GiB",
        f"  activations are {without} without and {with_checkpointing} with train.gradient_checkpointing",
        "",
        "work per process, at most (every response at its cap)",
        f"  last step  {sum(plan.step_flops.values()):.2e} FLOPs: {flops}",
        f"  whole run  {plan.total_flops:.2e} FLOPs, {plan.response_tokens:,} response tokens, "
        f"{num_updates_of(config):,} updates",
        "",
        "schedule",
        *(f"  {line}" for line in schedule_lines(config)),
        "",
        "written",
        *(f"  {line}" for line in file_lines(config, sizes)),
    ]
    return "\n".join(lines)


def schedule_lines(config: Config) -> list[str]:
    """One line for each stretch of steps that differ in nothing but the length cap."""

    def kind(step: int) -> tuple[str, int, str]:
        author = "the teacher's" if is_from_teacher(config, step) else "the student's"
        author = f"recorded ({config.rollout.path})" if config.rollout.path else author
        return author, block_size_at(config.format, step), selection_at(config, step)

    lines = []
    for (author, size, selection), group in groupby(range(config.train.num_steps), kind):
        steps = list(group)
        caps = [str(response_cap(config, step)) for step in (steps[0], steps[-1])]
        lines.append(
            f"steps {steps[0]}-{steps[-1]}: {author} responses, block size {size}, states {selection}, "
            f"at most {' to '.join(dict.fromkeys(caps))} tokens"
        )
    peak, section = config.optimizer.learning_rate, config.optimizer
    lines.append(
        f"learning rate {peak:g} after {section.warmup_steps} updates, cosine to "
        f"{peak * section.min_learning_rate_ratio:g}"
    )
    return lines


def file_lines(config: Config, sizes: Sizes) -> list[str]:
    """What the run writes, with sizes where they matter, and what it would continue."""
    folder = Path(config.output_dir)
    average = 0 if config.train.ema_decay is None else 4 * sizes.trained
    checkpoint = 3 * sizes.trained_bytes + average
    model = sizes.weight_bytes if config.format.name == "preserve" else weight_element(config) * sizes.total
    lines = [
        f"{folder / 'config.yaml'}, {folder / 'metrics.jsonl'}",
        f"{folder / 'checkpoint-N'}: every {config.train.save_every} steps, {checkpoint / GIB:.2f} GiB each, "
        f"the last {config.train.save_total_limit} kept",
        f"{folder / 'model'}: {model / GIB:.2f} GiB"
        + (", with retention.json" if config.eval.path else ", not evaluated (eval.path is empty)"),
    ]
    if config.data.self_prompts:
        lines.append(
            f"{folder / SELF_PROMPTS_FILE}: {config.data.self_prompts} prompts that the model writes"
        )
    found = find_checkpoints(folder)
    if found and config.train.resume_from_checkpoint:
        lines.append(f"{found[-1]} exists: the run would continue from it")
    return lines
