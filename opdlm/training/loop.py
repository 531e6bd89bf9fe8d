"""The training loop of conversion and text training: steps, updates, evaluation, early stopping, checkpoints.

`distill.trainer` (rollouts) and `text.trainer` (text) define one step; this module runs the steps, stops,
saves and resumes. The loss of an update is normalised over the whole update, so gradients depend neither on
micro-batches nor on the number of ranks. Not here: models, data, losses.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from opdlm.config.schedules import last_change
from opdlm.config.sections import MeasureSection, RunConfig, seconds_of
from opdlm.errors import DataError, TimeLimitReached
from opdlm.interrupts import on_stop_signals
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.objectives.losses import LossOutput
from opdlm.seeds import Stream, generator_for
from opdlm.training.activation_checkpointing import checkpoint_layers
from opdlm.training.checkpoint import (
    checkpoint_of,
    find_checkpoints,
    load_average,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    set_aside_damaged,
    trainable_weights,
)
from opdlm.training.deepspeed import whole_weights, zero_stage
from opdlm.training.devices import (
    clip_and_step,
    deterministic_kernels,
    gathered_weights,
    is_sharded,
    leave_ranks,
    place,
    start_accelerator,
    sum_over_ranks,
    without_sync,
    wrap,
)
from opdlm.training.dropout import training_dropout
from opdlm.training.ema import Average, averaged_weights, start_average, update_average, use_average
from opdlm.training.metrics import Doing, MetricsLog
from opdlm.training.optimizer import make_optimizer, make_scheduler

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
BAND, BAND_STEPS = 2.0, 3
"""A run ends where the losses of so many steps are each so many times the largest of as many first ones."""
EvalCallback = Callable[[DiffusionLM], dict[str, float]]
"""Evaluates a model, identically on every rank. `eval.patience` compares its `score`; higher is better."""


@dataclass(slots=True, kw_only=True)
class Loop:
    """The state of one training run."""

    config: RunConfig
    model: DiffusionLM
    loss: nn.Module
    """(batch, weight of each supervised position) -> LossOutput, wrapped for the devices."""
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    num_planned: int
    """Updates of the whole run, for the learning-rate schedule."""
    num_updates: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    average: Average = field(default_factory=dict)
    """EMA of the trained weights."""
    data_digest: str = ""
    """`digest_of` the training data; a run does not resume on other data."""
    scores: list[float] = field(default_factory=list)
    """Scores of the evaluations during training so far."""
    best_step: int = 0
    """The step with the best of them, if `eval.load_best_model_at_end`; 0: none."""
    best_score: float = -math.inf
    losses: list[float] = field(default_factory=list)
    """Of every step so far."""
    doing: Doing = field(default=lambda _: None)
    """Is told what a step is at."""
    scheduler: LambdaLR = field(init=False)
    micro_batch_rows: int = field(init=False)
    """`train.micro_batch_rows`, halved whenever the memory did not suffice."""

    def __post_init__(self) -> None:
        self.micro_batch_rows = self.config.train.micro_batch_rows
        self.scheduler = make_scheduler(self.optimizer, self.config.optimizer, self.num_planned)

    def progress(self, step: int) -> dict[str, Any]:
        """The `progress.json` of a checkpoint after `step` steps."""
        kept = {"num_updates": self.num_updates, "num_planned": self.num_planned, "totals": self.totals}
        kept |= {"scores": self.scores, "losses": self.losses, "data_digest": self.data_digest}
        kept |= {"measured_by": self.measured_by()}
        return kept | {"best": [self.best_step, self.best_score] if self.best_step else None}

    def measured_by(self) -> dict[str, Any]:
        """The settings on which a score depends, as JSON holds them."""
        when = {field.name for field in fields(MeasureSection)}
        section: dict[str, Any] = json.loads(json.dumps(self.config.to_dict()["eval"]))
        return {name: value for name, value in section.items() if name not in when}

    def restore(self, progress: dict[str, Any]) -> None:
        """Inverse of `progress`, without the scores of measurements by other settings."""
        self.num_updates, self.totals = progress["num_updates"], progress["totals"]
        self.losses = progress.get("losses", [])
        is_comparable = progress.get("measured_by", self.measured_by()) == self.measured_by()
        self.scores = progress["scores"] if is_comparable else []
        if is_comparable and self.config.eval.load_best_model_at_end and progress.get("best"):
            self.best_step, self.best_score = progress["best"]
        self.scheduler = make_scheduler(
            self.optimizer, self.config.optimizer, self.num_planned, self.num_updates
        )


def start(model: DiffusionLM, loss: nn.Module, config: RunConfig) -> dict[str, Any]:
    """Place the model on its devices and create the optimiser; returns the fields of a `Loop`."""
    accelerator = start_accelerator(config)
    place(model.eval(), accelerator)  # `training_dropout` activates dropout
    if config.train.gradient_checkpointing:
        checkpoint_layers(model.student, config.train.gradient_checkpointing_every)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, config.optimizer, masters=not zero_stage())
    loss, optimizer = wrap(loss, optimizer, accelerator, config)
    return {
        "config": config,
        "model": model,
        "loss": loss,
        "optimizer": optimizer,
        "accelerator": accelerator,
        "average": start_average(model, config.train.ema_decay),
    }


def run_steps(
    loop: Loop,
    step: Callable[[int], dict[str, float]],
    log: MetricsLog,
    eval_callback: EvalCallback | None = None,
    every: int = 0,
) -> None:
    """Call `step` (0-based; returns metrics) until `train.num_steps`, or until the score stalls. Resumes from
    the newest checkpoint in `output_dir` if there is one. `eval_callback` is called every `every` steps.

    After a checkpoint, raises KeyboardInterrupt(signal number) if a signal asked to stop, and
    TimeLimitReached if the next step would end after `train.time_limit`; one step is always made.
    """
    config, is_main = loop.config, loop.accelerator.is_main_process
    first_step = resume(loop, log)
    loop.doing = log.doing
    if is_main:
        log.start(config.train.num_steps, first_step)
    deadline = log.opened + (seconds_of(config.train.time_limit) or math.inf)
    longest_step = longest_save = 0.0
    with deferred_interrupt(log) as signals:
        for number in range(first_step, config.train.num_steps):
            if has_stalled(loop):
                log.note(
                    f"no improvement in {config.eval.patience} evaluations (eval.patience): stopped at step "
                    f"{number}"
                )
                break
            started = time.monotonic()
            metrics = step(number)
            check_band(loop, metrics["loss"])
            if eval_callback is not None and every and (number + 1) % every == 0:
                metrics |= measure(loop, eval_callback, number + 1)
            if is_main:
                log.step(number + 1, metrics)
            loop.accelerator.log(metrics, step=number + 1)
            stepped = time.monotonic()
            longest_step = max(longest_step, stepped - started)
            is_late = stepped + longest_step + 2 * (longest_save or longest_step) > deadline
            is_last = number + 1 == config.train.num_steps or has_stalled(loop)
            is_due = (number + 1) % config.train.save_every == 0 or number + 1 == loop.best_step
            num_signals, num_late = sum_over_ranks(loop.accelerator, len(signals), is_late)
            if is_due or is_last or num_signals or num_late:
                save(loop, number + 1)
                longest_save = max(longest_save, time.monotonic() - stepped)
            if num_signals:
                raise KeyboardInterrupt(*signals[:1])
            if num_late and not is_last:
                raise TimeLimitReached(
                    f"train.time_limit ({config.train.time_limit}) leaves no time for another step: saved "
                    f"after step {number + 1} of {config.train.num_steps}. The same command continues."
                )


def finish(loop: Loop, log: MetricsLog) -> None:
    """Close trackers and the process group, and put the weights of the result into the model, unless it is
    sharded: those of the best step or the last, averaged if the run averages.
    """
    leave_ranks(loop.accelerator)
    if loop.best_step:
        result = result_checkpoint(loop)
        log.note(
            f"the result is {result.name}: its score is the best of {len(loop.scores)} "
            "(eval.load_best_model_at_end)"
        )
        if not is_sharded(loop.model):
            load_weights(result, loop.model)
            if loop.average:
                load_average(result, loop.average)
    use_average(loop.average, loop.model)


def result_checkpoint(loop: Loop) -> Path:
    """The checkpoint of the result: of the best step, if the run looks for it, else the newest."""
    output_dir = Path(loop.config.output_dir)
    return checkpoint_of(output_dir, loop.best_step) if loop.best_step else find_checkpoints(output_dir)[-1]


@contextmanager
def deferred_interrupt(log: MetricsLog) -> Iterator[list[int]]:
    """Collect the signals that ask to stop (Ctrl-C, SIGTERM, SIGUSR1), so that the step finishes and the
    checkpoint resumes bit for bit. A second Ctrl-C raises KeyboardInterrupt.
    """
    received: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        log.note("finishing this step and saving; Ctrl-C again stops at once")

    with on_stop_signals(handle):
        yield received


@dataclass(slots=True)
class UpdateSums:
    """Sums over the updates of a step, for its metrics."""

    loss: float = 0.0
    learning_rate: float = 0.0
    """Of the last update."""
    grad_norm: float = 0.0
    num_updates: int = 0
    positions: int = 0
    divergence: float = 0.0

    def __iadd__(self, other: UpdateSums) -> UpdateSums:
        self.loss += other.loss
        self.learning_rate = other.learning_rate
        self.grad_norm += other.grad_norm
        self.num_updates += other.num_updates
        self.positions += other.positions
        self.divergence += other.divergence
        return self


def update_weights(
    loop: Loop,
    batches: Iterable[tuple[Any, Tensor]],
    num_batches: int,
    observe: Callable[[Any, LossOutput], None] | None = None,
) -> UpdateSums:
    """One optimiser update on this rank's micro-batches: (batch, weight of each supervised position).

    `observe` is called with each batch and its losses. DataError if the loss is not finite.
    """
    config, rank = loop.config, loop.accelerator.process_index
    loss = divergence = num_positions = 0.0
    dropout_seed = generator_for(config.train.seed, Stream.DROPOUT + loop.num_updates, rank).initial_seed()
    with deterministic_kernels(loop.accelerator.device), training_dropout(loop.model, dropout_seed):
        for number, (batch, weights_M) in enumerate(batches):
            part = f", part {number + 1} of {num_batches}" if num_batches > 1 else ""
            loop.doing(f"update {loop.num_updates + 1}/{loop.num_planned}{part}")
            with without_sync(loop.loss, is_last=number == num_batches - 1), loop.accelerator.autocast():
                output: LossOutput = loop.loss(batch, weights_M)
                loop.accelerator.backward(output.loss)
            if observe is not None:
                observe(batch, output)
            loss += float(output.loss.detach())
            divergence += float(output.per_position_M.sum())
            num_positions += len(weights_M)
    loss, divergence, positions = sum_over_ranks(loop.accelerator, loss, divergence, num_positions)
    sums = UpdateSums(
        loss=loss / loop.accelerator.num_processes,
        learning_rate=float(loop.scheduler.get_last_lr()[0]),
        num_updates=1,
        positions=int(positions),
        divergence=divergence,
    )
    check_finite(loop, "loss", sums.loss)
    max_norm = config.optimizer.max_grad_norm
    try:
        sums.grad_norm = clip_and_step(loop.loss, loop.optimizer, loop.accelerator, max_norm)
    except RuntimeError as error:
        if is_out_of_memory(error):  # some weights may have changed: the update cannot be repeated
            raise DataError(
                "memory does not suffice for the optimiser's step: train fewer weights (lora.r), or set "
                "optimizer.name=adamw8bit."
            ) from error
        raise
    check_finite(loop, "norm of the gradients", sums.grad_norm)
    loop.scheduler.step()
    loop.num_updates += 1
    update_average(loop.average, loop.model, config.train.ema_decay, loop.num_updates)
    return sums


def with_enough_memory(loop: Loop, attempt: Callable[[], Result]) -> Result:
    """The result of `attempt`, which calls `update_weights` once. Where an allocation fails, it is called
    again with half the `micro_batch_rows`: without dropout the same numbers up to rounding. DataError where
    that cannot help, and on several ranks, since the others would wait for this one.
    """
    while True:
        try:
            return attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if loop.accelerator.num_processes > 1 or loop.micro_batch_rows == 1:
                raise DataError(
                    f"memory does not suffice for train.micro_batch_rows ({loop.micro_batch_rows}): lower "
                    "it, or set train.gradient_checkpointing=true; the same command then continues."
                ) from error
        loop.micro_batch_rows //= 2  # after the block, which holds the tensors of the failure
        loop.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory: the update is repeated with train.micro_batch_rows=%d, and so are all after it",
            loop.micro_batch_rows,
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; torch raises a plain RuntimeError for it on CPUs."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def check_finite(loop: Loop, name: str, value: float) -> None:
    """DataError for NaN or infinity, with the way to go on; no checkpoint is written after it."""
    if not math.isfinite(value):
        raise DataError(f"the {name} became {value} at update {loop.num_updates + 1}. {way_on(loop)}")


def check_band(loop: Loop, loss: float) -> None:
    """Note the loss of a step. DataError where it has left the band of the first steps and stays outside;
    schedules begin a new band.
    """
    loop.losses.append(loss)
    losses = loop.losses[last_change(loop.config, len(loop.losses) - 1) :]
    first, last = max(losses[:BAND_STEPS]), losses[-BAND_STEPS:]
    if len(losses) >= 2 * BAND_STEPS and min(last) > BAND * first > 0:
        raise DataError(
            f"the loss has risen to {loss:.4g}, more than {BAND:g} times that of the first steps "
            f"({first:.4g}), for {BAND_STEPS} steps. {way_on(loop)}"
        )


def way_on(loop: Loop) -> str:
    """What continues a run that went wrong."""
    found = [folder.name for folder in find_checkpoints(Path(loop.config.output_dir))]
    goes_on = "starts again from the beginning"
    if found:
        goes_on = f"continues from {found[-1]}; if that ends here too, delete it to go further back"
    return (
        f"Lower optimizer.learning_rate ({loop.config.optimizer.learning_rate:g}): the same command then "
        f"{goes_on}."
    )


def equally_many(accelerator: Accelerator, batches: Sequence[list[int]]) -> list[list[int]]:
    """Pad with empty micro-batches, so that every rank has as many as the rank with the most."""
    count = torch.tensor([len(batches)], device=accelerator.device)
    num_batches = int(accelerator.gather(count).max())
    return [*batches, *[[] for _ in range(num_batches - len(batches))]]


def measure(loop: Loop, eval_callback: EvalCallback, step: int) -> dict[str, float]:
    """Evaluate the weights that the run would write after this step; metrics are means over ranks."""
    started = time.perf_counter()
    with averaged_weights(loop.average, loop.model), gathered_weights(loop.loss):
        found = eval_callback(loop.model)
    sums = sum_over_ranks(loop.accelerator, *found.values())
    metrics = {name: value / loop.accelerator.num_processes for name, value in zip(found, sums, strict=True)}
    score = metrics.pop("score")
    if loop.config.eval.load_best_model_at_end and score > loop.best_score:
        loop.best_step, loop.best_score = step, score
    loop.scores.append(score)
    return metrics | {"eval_seconds": time.perf_counter() - started}


def has_stalled(loop: Loop) -> bool:
    """Whether the last `eval.patience` evaluations did not exceed the best earlier score."""
    patience = loop.config.eval.patience
    if patience is None or not loop.scores:
        return False
    best = loop.scores.index(max(loop.scores))
    return len(loop.scores) - 1 - best >= patience


def save(loop: Loop, step: int) -> None:
    """Write a checkpoint. All ranks must call this, since it gathers sharded weights."""
    with whole_weights(trainable_weights(loop.model).values()):
        save_checkpoint(
            Path(loop.config.output_dir),
            step,
            loop.model,
            loop.optimizer,
            loop.progress(step),
            loop.config.train.save_total_limit,
            loop.best_step,
            loop.average,
            writes=loop.accelerator.is_main_process,
        )
    loop.accelerator.wait_for_everyone()


def resume(loop: Loop, log: MetricsLog) -> int:
    """Resume from the newest intact checkpoint, or delete all without `train.resume_from_checkpoint`.

    Returns the number of finished steps. DataError if the training data have changed.
    """
    output_dir = Path(loop.config.output_dir)
    if not loop.config.train.resume_from_checkpoint:
        if loop.accelerator.is_main_process:
            for folder in find_checkpoints(output_dir):
                shutil.rmtree(folder)  # one of a later step would outlive those of this run
        return 0
    if loop.accelerator.is_main_process:
        set_aside_damaged(output_dir, log.note)
    loop.accelerator.wait_for_everyone()
    found = find_checkpoints(output_dir)
    if not found:
        return 0
    with whole_weights(trainable_weights(loop.model).values(), changed=True):
        progress = load_checkpoint(found[-1], loop.model, loop.optimizer)
    if progress.get("data_digest", loop.data_digest) != loop.data_digest:
        raise DataError(
            f"the training data are not those of {found[-1]} (data.path, rollout.path): restore them to "
            "continue, or choose another output_dir to start over."
        )
    loop.restore(progress)
    note_changes(loop, progress, log)
    if loop.average:
        load_average(found[-1], loop.average)
    return progress["step"]


def note_changes(loop: Loop, progress: dict[str, Any], log: MetricsLog) -> None:
    """Tell what cannot go on as before the run was resumed: scores, the best step, the learning rate."""
    if progress["scores"] and not loop.scores:
        log.note("eval.* has changed: earlier scores are not compared with those from here on.")
    if loop.best_step and not (best := checkpoint_of(Path(loop.config.output_dir), loop.best_step)).is_dir():
        log.note(f"{best.name}, the best so far, is gone: the best step from here on will be the result.")
        loop.best_step, loop.best_score = 0, -math.inf
    planned = progress.get("num_planned", loop.num_planned)
    if planned != loop.num_planned:
        log.note(
            f"train.num_steps has changed: the first {loop.num_updates} updates followed a cosine over "
            f"{planned} updates, the others follow one over {loop.num_planned}. The learning rate goes on at "
            f"{loop.scheduler.get_last_lr()[0]:.2g}; the weights will not be those of one run of this length."
        )
