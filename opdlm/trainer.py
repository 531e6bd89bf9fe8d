"""The loop: roll out, score, select states, learn. Everything a reader needs to follow is in `train_step`.

    rollouts = student(prompts)                      on-policy (or the teacher's responses: the baselines)
    targets  = teacher(prompt, rollout)              once per rollout
    states   = masked versions of the rollout        those the sampler visited
    loss     = D(teacher token | student at state)   at supervised positions only

`accelerate` places the model, syncs gradients and runs trackers. The loss is normalised over the whole
update, so micro-batching and the number of ranks change no gradient. METHOD parts 3 to 7.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Event, current_thread, main_thread
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from opdlm.adapter import adapter_dropout
from opdlm.blocks import join_slots
from opdlm.checkpoint import find_checkpoints, load_checkpoint, save_checkpoint
from opdlm.config import Config, LossSection, OptimizerSection
from opdlm.data import PromptStream
from opdlm.diffusion import DiffusionLM
from opdlm.errors import ConfigError, DataError
from opdlm.losses import LossOutput, chunked_divergence
from opdlm.metrics import MetricsLog
from opdlm.models import head_of
from opdlm.optimizer import checkpoint_layers, make_optimizer
from opdlm.records import Prompt, Rollout
from opdlm.rollout import generate_rollouts, generator_for
from opdlm.states import Selection, StateBatch, select_states
from opdlm.targets import TeacherPass, score_rows, targets_at_supervised


class StudentLoss(nn.Module):
    """The student's forward and its loss as one module, so that wrappers (DDP) see every use of the
    weights.
    """

    def __init__(self, model: DiffusionLM, section: LossSection) -> None:
        super().__init__()
        self.model, self.section = model, section

    def forward(self, states: StateBatch, scored: TeacherPass, weights_M: Tensor) -> LossOutput:
        hidden_BSH = noised_hidden(self.model, states, scored)
        row_M, column_M = states.is_supervised_BS.nonzero(as_tuple=True)
        banned = torch.tensor(self.model.spec.banned_token_ids, dtype=torch.long, device=hidden_BSH.device)
        return chunked_divergence(
            hidden_BSH[row_M, column_M],
            head_of(self.model.student, banned),
            targets_at_supervised(self.model, states, scored, self.section),
            weights_M,
            divergence="cross_entropy" if self.section.objective == "sft" else self.section.divergence,
            beta=self.section.jsd_beta,
            reverse_weight=self.section.reverse_weight,
        )


def noised_hidden(model: DiffusionLM, states: StateBatch, scored: TeacherPass) -> Tensor:
    """Student states of the noised slots `[B, S, H]`.

    `preserve` reads the teacher's keys and values: no clean pass, no gradient through clean text. `sdar`
    computes the clean half with the student.
    """
    if scored.cache is not None:
        return model.student_hidden(states.noised, scored.cache)
    clean = model.clean_slots(states.ids_BL, states.lengths_B, states.num_prompt_B)
    return model.student_hidden(join_slots(clean, states.noised))[:, states.ids_BL.shape[1] :]


@dataclass(slots=True)
class Run:
    """What one training run holds."""

    config: Config
    model: DiffusionLM
    student_loss: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    prompts: PromptStream
    num_updates: int = 0
    totals: dict[str, float] = field(default_factory=lambda: {"rollout_tokens": 0.0, "loss_tokens": 0.0})


def train(model: DiffusionLM, prompts: Sequence[Prompt], config: Config, log: MetricsLog) -> Run:
    """Train to `train.num_steps`, continuing from the newest checkpoint in `output_dir` if there is one."""
    run = start_run(model, prompts, config)
    first_step = resume(run)
    log.start(config.train.num_steps, first_step)
    with deferred_interrupt(log) as interrupted:
        for step in range(first_step, config.train.num_steps):
            metrics = train_step(run, step)
            log.step(step + 1, metrics)
            run.accelerator.log(metrics, step=step + 1)
            is_last = step + 1 == config.train.num_steps
            is_asked_to_stop = any_rank(run, interrupted.is_set())
            if (step + 1) % config.train.save_every == 0 or is_last or is_asked_to_stop:
                save(run, step + 1)
            if is_asked_to_stop:
                raise KeyboardInterrupt
    run.accelerator.end_training()
    return run


@contextmanager
def deferred_interrupt(log: MetricsLog) -> Iterator[Event]:
    """Ctrl-C lets the step end, so that what is saved continues bit for bit; a second does not wait."""
    interrupted = Event()

    def ask(_signal: int, _frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.note("finishing this step and saving; Ctrl-C again stops at once")

    # Threads cannot set handlers; a process that ignores Ctrl-C (nohup) or handles it itself keeps its way.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_ours or current_thread() is not main_thread():
        yield interrupted
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def any_rank(run: Run, flag: bool) -> bool:
    return bool(run.accelerator.reduce(torch.tensor(float(flag), device=run.accelerator.device), "sum"))


def check_trackers(config: Config) -> None:
    for tracker in config.train.report_to:
        if find_spec(tracker) is None:
            raise ConfigError(
                f"train.report_to names {tracker}, which is not installed: pip install 'opdlm[track]'."
            )


def start_accelerator(config: Config) -> Accelerator:
    """Device, precision and trackers. A second run in one process may choose another precision."""
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        log_with=list(config.train.report_to) or None,
        project_dir=config.output_dir,
    )
    if config.train.report_to:
        settings = {key: str(value) for key, value in config.flat().items()}
        accelerator.init_trackers("opdlm", config=settings)
    return accelerator


def start_run(model: DiffusionLM, prompts: Sequence[Prompt], config: Config) -> Run:
    accelerator = start_accelerator(config)
    model.to(accelerator.device)
    if config.train.gradient_checkpointing:
        checkpoint_layers(model.student, config.train.gradient_checkpointing_every)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, config.optimizer)
    student_loss, optimizer = accelerator.prepare(StudentLoss(model, config.loss), optimizer)
    stream = PromptStream(
        prompts, config.rollout.prompts_per_step * accelerator.num_processes, config.train.seed
    )
    return Run(config, model, student_loss, optimizer, accelerator, stream)


def train_step(run: Run, step: int) -> dict[str, float]:
    """One rollout step (0-based): generate, then `passes_per_rollout` passes of updates over the rollouts."""
    config, started = run.config, time.perf_counter()
    prompts = rank_share(run, run.prompts.at(step))
    from_teacher = is_from_teacher(config, step)
    rollouts, decoding = generate_rollouts(
        run.model,
        prompts,
        config.rollout,
        step=step + 1,
        seed=config.train.seed,
        rank=run.accelerator.process_index,
        from_teacher=from_teacher,
    )
    rollout_seconds = time.perf_counter() - started
    rng = generator_for(config.train.seed, step + 1, run.accelerator.process_index, 10**6)
    on_trajectory = config.loss.objective == "opd" and not from_teacher
    selection: Selection = config.states.selection if on_trajectory else "random_mask"
    sums = UpdateSums()
    for chosen in update_order(len(rollouts), config, rng):
        sums += update(run, rollouts, chosen, selection, rng)
    return step_metrics(run, rollouts, decoding, sums, rollout_seconds, time.perf_counter() - started)


def is_from_teacher(config: Config, step: int) -> bool:
    """Whose responses step `step` (0-based) trains on."""
    return config.loss.objective in ("off_policy", "sft") or step < config.rollout.warm_start_steps


def rank_share(run: Run, prompts: list[Prompt]) -> list[Prompt]:
    return prompts[run.accelerator.process_index :: run.accelerator.num_processes]


def update_order(num_rollouts: int, config: Config, rng: torch.Generator) -> Iterator[list[int]]:
    """Which rollouts each optimiser update uses."""
    rows = config.train.rows_per_update
    for _ in range(config.train.passes_per_rollout):
        order = torch.randperm(num_rollouts, generator=rng).tolist()
        for first in range(0, num_rollouts, rows):
            yield order[first : first + rows]


@dataclass(slots=True)
class UpdateSums:
    """Sums over updates for the step's metrics."""

    loss: float = 0.0
    grad_norm: float = 0.0
    num_updates: int = 0
    positions: int = 0
    divergence: float = 0.0

    def __iadd__(self, other: UpdateSums) -> UpdateSums:
        self.loss += other.loss
        self.grad_norm += other.grad_norm
        self.num_updates += other.num_updates
        self.positions += other.positions
        self.divergence += other.divergence
        return self


def update(
    run: Run,
    rollouts: Sequence[Rollout],
    chosen: list[int],
    selection: Selection,
    rng: torch.Generator,
) -> UpdateSums:
    """One optimiser update on the chosen rollouts, in micro-batches of similar length."""
    config, device = run.config, run.accelerator.device
    chosen = sorted(chosen, key=lambda i: len(rollouts[i].prompt_ids) + rollouts[i].num_response)
    size = config.train.micro_batch_rows
    micro_batches = [chosen[first : first + size] for first in range(0, len(chosen), size)]
    states = [
        select_states([rollouts[i] for i in batch], run.model.spec, selection, rng, device)
        for batch in micro_batches
    ]
    weights = normalized_weights(run, states)
    sums = UpdateSums(num_updates=1)
    with adapter_dropout(run.model, rng.initial_seed() + run.num_updates):
        for batch_states, weights_M in zip(states, weights, strict=True):
            teacher_pass = score_rows(
                run.model, batch_states.ids_BL, batch_states.lengths_B, batch_states.num_prompt_B
            )
            output = run.student_loss(batch_states, teacher_pass, weights_M)
            run.accelerator.backward(output.loss)
            sums.loss += float(output.loss.detach())
            sums.divergence += float(output.per_position_M.sum())
            sums.positions += len(weights_M)
    if not math.isfinite(sums.loss):
        raise DataError(
            f"the loss became {sums.loss} at update {run.num_updates + 1}. Lower optimizer.learning_rate "
            f"({config.optimizer.learning_rate:g}) and start again from the last checkpoint."
        )
    grad_norm = run.accelerator.clip_grad_norm_(run.student_loss.parameters(), config.optimizer.max_grad_norm)
    sums.grad_norm = float(grad_norm)
    set_learning_rate(run)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.num_updates += 1
    return sums


def normalized_weights(run: Run, states: list[StateBatch]) -> list[Tensor]:
    """Weight of every supervised slot so that the update's loss is the mean over the global batch.

    `token`: over supervised positions. `row`: over rows, of the mean over each row (the paper). `sft` weights
    a position by 1 / (masked fraction of its block) first.
    """
    per_batch, total = [], torch.zeros((), device=run.accelerator.device)
    for batch in states:
        is_supervised_BS = batch.is_supervised_BS
        weights_BS = is_supervised_BS.float()
        if run.config.loss.objective == "sft":
            weights_BS = weights_BS / batch.masked_fraction_BS.clamp_min(1e-6)
        if run.config.loss.normalization == "row":
            counts_B1 = is_supervised_BS.sum(1, keepdim=True)
            weights_BS = weights_BS / counts_B1.clamp_min(1)
            total = total + (counts_B1 > 0).sum()
        else:
            total = total + is_supervised_BS.sum()
        per_batch.append(weights_BS[is_supervised_BS])
    total = run.accelerator.reduce(total, "sum").clamp_min(1)
    return [weights_M * (run.accelerator.num_processes / total) for weights_M in per_batch]


def num_updates_of(config: Config) -> int:
    """Optimiser updates in a whole run."""
    per_pass = -(-config.rollout.prompts_per_step // config.train.rows_per_update)
    return config.train.num_steps * config.train.passes_per_rollout * per_pass


def learning_rate_scale(update_index: int, total: int, section: OptimizerSection) -> float:
    """Linear warm-up, then a cosine to `min_learning_rate_ratio`."""
    if update_index < section.warmup_steps:
        return update_index / section.warmup_steps
    progress = (update_index - section.warmup_steps) / max(1, total - section.warmup_steps)
    floor = section.min_learning_rate_ratio
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(run: Run) -> None:
    scale = learning_rate_scale(run.num_updates, num_updates_of(run.config), run.config.optimizer)
    for group in run.optimizer.param_groups:
        group["lr"] = run.config.optimizer.learning_rate * scale


def step_metrics(
    run: Run,
    rollouts: Sequence[Rollout],
    decoding: Any,
    sums: UpdateSums,
    rollout_seconds: float,
    seconds: float,
) -> dict[str, float]:
    """What is logged for one step; totals grow over the run."""
    run.totals["rollout_tokens"] += decoding.num_tokens
    run.totals["loss_tokens"] += sums.positions
    return {
        "loss": sums.loss / sums.num_updates,
        "divergence": sums.divergence / max(1, sums.positions),
        "grad_norm": sums.grad_norm / sums.num_updates,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "tokens_per_forward": decoding.tokens_per_forward,
        "tokens_per_step": decoding.tokens_per_step,
        "response_length": decoding.num_tokens / len(rollouts),
        "stop_rate": sum(r.finish_reason == "stop" for r in rollouts) / len(rollouts),
        "rollout_tokens_per_second": decoding.num_tokens / rollout_seconds,
        "rollout_share_of_time": rollout_seconds / seconds,
        "seconds": seconds,
        **run.totals,
    }


def save(run: Run, step: int) -> None:
    if run.accelerator.is_main_process:
        save_checkpoint(
            Path(run.config.output_dir),
            step,
            run.model,
            run.optimizer,
            {"num_updates": run.num_updates, "totals": run.totals},
            run.config.train.save_total_limit,
        )
    run.accelerator.wait_for_everyone()


def resume(run: Run) -> int:
    """Continue from the newest checkpoint, or delete them all; the number of steps already done."""
    found = find_checkpoints(Path(run.config.output_dir))
    if not run.config.train.resume_from_checkpoint:
        if run.accelerator.is_main_process:
            for folder in found:
                shutil.rmtree(folder)  # else a later one would outlive those of this run
        return 0
    if not found:
        return 0
    progress = load_checkpoint(found[-1], run.model, run.optimizer)
    run.num_updates, run.totals = progress["num_updates"], progress["totals"]
    return progress["step"]
