"""`opdlm convert --dry-run`: memory, FLOPs, schedule and files of a run. `costs` computes the numbers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from accelerate import PartialState

from opdlm.checkpoints.load import load_tokenizer, with_known_dtype
from opdlm.config.schedules import (
    block_size_at,
    is_from_teacher,
    num_updates_of,
    selection_at,
)
from opdlm.config.sections import Config
from opdlm.data.prompts import count_prompts, load_prompts
from opdlm.decoding.rollout import Prompt
from opdlm.distill.costs import (
    ModelSizes,
    fixed_memory,
    kept_bytes,
    longest_row,
    measure_sizes,
    optimizer_memory,
    response_cap,
    rollout_memory,
    step_flops,
    training_memory,
    weight_element,
)
from opdlm.environment import free_memory
from opdlm.training.checkpoint import find_checkpoints
from opdlm.training.devices import check_trackers
from opdlm.training.machine import measured_speed
from opdlm.training.run_folder import SELF_PROMPTS_FILE

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """Estimates for one process."""

    config: Config
    """With the precision that `model.dtype=auto` means."""
    sizes: ModelSizes
    memory: dict[str, float]
    """Bytes per device by purpose. Entries that start with `rollout:` are freed before training, unless
    rollouts are asynchronous or vLLM's.
    """
    activations: tuple[float, float]
    """Bytes without and with gradient checkpointing."""
    peak: float
    """Bytes."""
    step_flops: dict[str, float]
    """Of the last step, by purpose."""
    total_flops: float
    """Of the whole run."""
    response_tokens: int
    """Maximum of the whole run."""


def make_plan(config: Config, sizes: ModelSizes | None = None) -> ConversionPlan:
    """Plan a run from its config.json; writes nothing. `sizes`: of the model, where they are known. DataError
    if there is no config.json.
    """
    config = with_known_dtype(config)
    sizes = sizes or measure_sizes(config)
    last = config.train.num_steps - 1
    fixed = fixed_memory(config, sizes)
    row = longest_row(config, sizes, last)
    rollout, training = rollout_memory(config, sizes, row), training_memory(config, sizes, row)
    stays = config.rollout.asynchronous or config.rollout.engine == "vllm"
    together = operator.add if stays else max
    steps = range(config.train.num_steps)
    return ConversionPlan(
        config=config,
        sizes=sizes,
        memory=fixed | rollout | training,
        activations=(kept_bytes(config, sizes, row, False), kept_bytes(config, sizes, row, True)),
        peak=sum(fixed.values()) + together(sum(rollout.values()), sum(training.values())),
        step_flops=step_flops(config, sizes, last),
        total_flops=sum(sum(step_flops(config, sizes, step).values()) for step in steps),
        response_tokens=sum(config.rollout.prompts_per_step * response_cap(config, step) for step in steps),
    )


def describe_plan(plan: ConversionPlan, prompts: Sequence[Prompt] = ()) -> str:
    """The plan as lines of text. `prompts`: those of `data.path`; without any, all count as the longest."""
    config, sizes = plan.config, plan.sizes
    mean_prompt = sum(len(prompt.ids) for prompt in prompts) // len(prompts) if prompts else None
    counts = count_prompts(prompts, replace(config.data, self_prompts=0))
    without, with_checkpointing = (f"{x / GIB:.2f} GiB" for x in plan.activations)
    free = free_memory(PartialState().device)
    flops = "  ".join(f"{name} {value:.2e}" for name, value in plan.step_flops.items())
    lines = [
        f"{config.model.path}: {sizes.family}, {sizes.total / 1e6:,.1f} M parameters, "
        f"{sizes.trained / 1e6:,.1f} M trained ({'LoRA' if config.lora.enabled else 'full copy'}), "
        f"format {config.format.name}",
        "",
        "memory per device, at most (estimate; each process holds all of it)",
        *(f"  {name:30} {size / GIB:8.2f} GiB" for name, size in plan.memory.items()),
        f"  {'peak':30} {plan.peak / GIB:8.2f} GiB",
        f"  fits: {'yes' if plan.peak <= free else 'no'}, {plan.peak / GIB:.1f} of {free / GIB:.1f} GiB free",
        f"  activations are {without} without and {with_checkpointing} with train.gradient_checkpointing",
        "",
        "work per process, at most (every response at its cap)",
        f"  last step  {sum(plan.step_flops.values()):.2e} FLOPs: {flops}",
        f"  whole run  {plan.total_flops:.2e} FLOPs, {plan.response_tokens:,} response tokens, "
        f"{num_updates_of(config):,} updates",
        f"  {hours_line(config, sizes, mean_prompt)}",
        "",
        "schedule",
        *(f"  {line}" for line in schedule_lines(config)),
        *(("", "data", f"  {counts}") if prompts else ()),
        "",
        "written",
        *(f"  {line}" for line in file_lines(config, sizes)),
    ]
    return "\n".join(lines)


def check_prompts(config: Config) -> list[Prompt]:
    """The prompts of `data.path`. ConfigError or DataError where the run could not read its data or report to
    its trackers.
    """
    check_trackers(config)
    if not config.data.path:
        return []
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code, needs_weights=False)
    return load_prompts(config.data, tokenizer, mask_token_id=-1)


def hours_line(config: Config, sizes: ModelSizes, mean_prompt: int | None) -> str:
    """The time of the run on this device, by a measurement of seconds. `mean_prompt`: tokens of a prompt."""
    speed = measured_speed(config, slots_per_row=config.format.block_size + 1)
    if speed is None:
        return "hours here: unknown (no layer of this shape can be made without the weights)"
    decoding, training = speed
    if mean_prompt is not None:
        config = replace(config, data=replace(config.data, max_prompt_tokens=mean_prompt))
    flops = step_flops(config, sizes, config.train.num_steps - 1)
    rollout = flops["rollout"]
    seconds = rollout / decoding + (sum(flops.values()) - rollout) / training
    return (
        f"hours here: about {seconds * config.train.num_steps / 3600:.2g}, {seconds:.0f} s a step (measured: "
        f"{decoding / 1e9:.0f} GFLOP/s decoding, {training / 1e9:.0f} training)"
    )


def schedule_lines(config: Config) -> list[str]:
    """One line per range of steps that differ in the length cap only, and the learning rate."""

    def kind(step: int) -> tuple[str, int, str]:
        source = "the teacher's" if is_from_teacher(config, step) else "the student's"
        source = f"recorded ({config.rollout.path})" if config.rollout.path else source
        states = "drafts" if config.loss.objective == "draft" else f"states {selection_at(config, step)}"
        return source, block_size_at(config.format, step), states

    lines = []
    for (source, size, states), group in groupby(range(config.train.num_steps), kind):
        steps = list(group)
        caps = [str(response_cap(config, step)) for step in (steps[0], steps[-1])]
        lines.append(
            f"steps {steps[0]}-{steps[-1]}: {source} responses, block size {size}, {states}, "
            f"at most {' to '.join(dict.fromkeys(caps))} tokens"
        )
    peak, section = config.optimizer.learning_rate, config.optimizer
    lines.append(
        f"learning rate {peak:g} after {section.warmup_steps} updates, cosine to "
        f"{peak * section.min_learning_rate_ratio:g}"
    )
    return lines


def measured_line(config: Config) -> str:
    """What the result is measured on."""
    if config.eval.path:
        return f"with a report on {config.eval.path}"
    if config.eval.held_back:
        return f"with a report on at most {config.eval.held_back} prompts that are not trained on"
    return "not evaluated (eval.path is empty, eval.held_back is 0)"


def file_lines(config: Config, sizes: ModelSizes) -> list[str]:
    """Files that the run writes, and the checkpoint that it would resume from."""
    folder = Path(config.output_dir)
    average = 0 if config.train.ema_decay is None else 4 * sizes.trained
    checkpoint = sizes.trained_bytes + sum(optimizer_memory(config, sizes).values()) + average
    model = sizes.weight_bytes if config.format.name == "preserve" else weight_element(config) * sizes.total
    lines = [
        f"{folder / 'config.yaml'}, {folder / 'metrics.jsonl'}",
        f"{folder / 'checkpoint-N'}: every {config.train.save_every} steps, {checkpoint / GIB:.2f} GiB each, "
        f"the last {config.train.save_total_limit} kept",
        f"{folder / 'model'}: {model / GIB:.2f} GiB, {measured_line(config)}",
    ]
    if config.data.self_prompts:
        lines.append(
            f"{folder / SELF_PROMPTS_FILE}: {config.data.self_prompts} prompts that the model writes"
        )
    found = find_checkpoints(folder)
    if found and config.train.resume_from_checkpoint:
        lines.append(f"{found[-1]} exists: the run would resume from it")
    return lines
