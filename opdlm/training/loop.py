"""The training loop without what is trained: steps, updates, checkpoints, averages, measurements.

`trainer` (rollouts) and `text_trainer` (given text) say what one step does; both run, stop, save and continue
here. The loss of an update is normalised over the whole update, so micro-batching and the number of ranks
change no gradient. Not here: models, data, losses.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Event, current_thread, main_thread
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from opdlm.config.loader import read_recipe
from opdlm.config.sections import RunConfig
from opdlm.errors import ConfigError, DataError
from opdlm.files import write_atomic
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.objectives.losses import LossOutput
from opdlm.seeds import generator_for
from opdlm.training.checkpoint import (
    find_checkpoints,
    load_average,
    load_checkpoint,
    save_checkpoint,
    trainable_weights,
)
from opdlm.training.deepspeed import whole_weights, zero_stage
from opdlm.training.devices import (
    clip_and_step,
    gathered_weights,
    leave_ranks,
    place,
    start_accelerator,
    sum_over_ranks,
    without_sync,
    wrap,
)
from opdlm.training.dropout import training_dropout
from opdlm.training.metrics import MetricsLog
from opdlm.training.optimizer import checkpoint_layers, make_optimizer, make_scheduler

CONFIG_FILE = "config.yaml"
FREE_SETTINGS = (
    *("eval.", "output_dir", "train.save_every", "train.save_total_limit", "train.report_to"),
    *("train.resume_from_checkpoint", "train.micro_batch_rows", "train.gradient_checkpointing"),
)
"""What may change when an interrupted run continues: it does not change what is trained."""

EvalCallback = Callable[[DiffusionLM], dict[str, float]]
"""Measures a model; the same on every rank. Its `score` (higher is better) decides about `eval.patience`."""


@dataclass(slots=True, kw_only=True)
class Loop:
    """What one training run holds, whatever it trains on."""

    config: RunConfig
    model: DiffusionLM
    loss: nn.Module
    """Batch, weights -> LossOutput, as wrapped for the devices."""
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    num_planned: int
    """Updates in the whole run, over which the learning rate falls."""
    num_updates: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    """Running average of the trained weights, float32; empty without `train.ema_decay`."""
    data_digest: str = ""
    """`digest_of` what is trained on: a run does not continue on other data."""
    scores: list[float] = field(default_factory=list)
    """What the measurements during training found so far."""
    scheduler: LambdaLR = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler = make_scheduler(self.optimizer, self.config.optimizer, self.num_planned)

    def progress(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps holds beside tensors."""
        kept = {"num_updates": self.num_updates, "totals": self.totals, "scores": self.scores}
        return kept | {"data_digest": self.data_digest}

    def restore(self, progress: dict[str, Any]) -> None:
        self.num_updates, self.totals = progress["num_updates"], progress["totals"]
        self.scores = progress["scores"]
        self.scheduler = make_scheduler(
            self.optimizer, self.config.optimizer, self.num_planned, self.num_updates
        )


def prepare_output(config: RunConfig, *, writes: bool = True) -> Path:
    """Make the run folder; refuse to mix two different runs in one. Of many ranks, one writes."""
    output_dir = Path(config.output_dir)
    saved = output_dir / CONFIG_FILE
    if saved.is_file() and find_checkpoints(output_dir):
        changed = changed_settings(read_recipe(saved), config.to_dict(), type(config)().to_dict())
        if changed:
            raise ConfigError(
                f"output_dir ({output_dir}) holds a run with other settings ({', '.join(changed[:3])}; see "
                f"{saved}). Choose another output_dir, or delete the folder to start over."
            )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if writes:
            write_atomic(saved, config.to_yaml())
    except OSError as error:
        raise ConfigError(
            f"output_dir ({output_dir}) cannot be written: {error.strerror}. Choose another output_dir."
        ) from error
    return output_dir


def changed_settings(
    old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any], prefix: str = ""
) -> list[str]:
    """Dotted keys that differ and matter to the training; a key newer than the run had its default."""
    changed = []
    for key, value in new.items():
        if isinstance(value, dict):
            changed += changed_settings(old.get(key) or {}, value, defaults.get(key) or {}, f"{prefix}{key}.")
        elif old.get(key, defaults.get(key)) != value and not f"{prefix}{key}".startswith(FREE_SETTINGS):
            changed.append(f"{prefix}{key}")
    return changed


def check_trackers(config: RunConfig) -> None:
    for tracker in config.train.report_to:
        if find_spec(tracker) is None:
            raise ConfigError(
                f"train.report_to names {tracker}, which is not installed: pip install 'opdlm[track]'."
            )


def start(model: DiffusionLM, loss: nn.Module, config: RunConfig) -> dict[str, Any]:
    """Place the model on its devices and make the optimiser: the fields of a `Loop`."""
    accelerator = start_accelerator(config)
    place(model.eval(), accelerator)  # dropout acts where `training_dropout` says
    if config.train.gradient_checkpointing:
        checkpoint_layers(model.student, config.train.gradient_checkpointing_every)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, config.optimizer, masters=not zero_stage())
    loss, optimizer = wrap(loss, optimizer, accelerator, config)
    average = {}
    if config.train.ema_decay is not None:
        average = {name: weight.detach().float().clone() for name, weight in trainable_weights(model).items()}
    return {
        "config": config,
        "model": model,
        "loss": loss,
        "optimizer": optimizer,
        "accelerator": accelerator,
        "average": average,
    }


def run_steps(
    loop: Loop,
    step: Callable[[int], dict[str, float]],
    log: MetricsLog,
    eval_callback: EvalCallback | None = None,
) -> None:
    """Call `step` (0-based; returns metrics) until `train.num_steps`, or until the score stalls, continuing
    from the newest checkpoint in `output_dir` if there is one.
    """
    config, is_main = loop.config, loop.accelerator.is_main_process
    first_step = resume(loop)
    if is_main:
        log.start(config.train.num_steps, first_step)
    with deferred_interrupt(log) as interrupted:
        for number in range(first_step, config.train.num_steps):
            if has_stalled(loop):
                log.note(
                    f"no better in {config.eval.patience} measurements (eval.patience): stopped at step "
                    f"{number}"
                )
                break
            metrics = step(number)
            if eval_callback is not None and config.eval.every and (number + 1) % config.eval.every == 0:
                metrics |= measure(loop, eval_callback)
            if is_main:
                log.step(number + 1, metrics)
            loop.accelerator.log(metrics, step=number + 1)
            is_last = number + 1 == config.train.num_steps or has_stalled(loop)
            is_asked_to_stop = sum_over_ranks(loop.accelerator, interrupted.is_set())[0] > 0
            if (number + 1) % config.train.save_every == 0 or is_last or is_asked_to_stop:
                save(loop, number + 1)
            if is_asked_to_stop:
                raise KeyboardInterrupt


def finish(loop: Loop) -> None:
    """Leave trackers and process group; the model holds what the run is to write."""
    leave_ranks(loop.accelerator)
    use_average(loop)


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


@dataclass(slots=True)
class UpdateSums:
    """Sums over updates for the step's metrics."""

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
    `observe` sees each batch and its losses.
    """
    config, rank = loop.config, loop.accelerator.process_index
    loss = divergence = num_positions = 0.0
    dropout_seed = generator_for(config.train.seed, 2 * 10**6 + loop.num_updates, rank).initial_seed()
    with training_dropout(loop.model, dropout_seed):
        for number, (batch, weights_M) in enumerate(batches):
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
    if not math.isfinite(sums.loss):
        raise DataError(
            f"the loss became {sums.loss} at update {loop.num_updates + 1}. Lower optimizer.learning_rate "
            f"({config.optimizer.learning_rate:g}) and start again from the last checkpoint."
        )
    max_norm = config.optimizer.max_grad_norm
    sums.grad_norm = clip_and_step(loop.loss, loop.optimizer, loop.accelerator, max_norm)
    loop.scheduler.step()
    loop.num_updates += 1
    update_average(loop)
    return sums


def equally_many(accelerator: Accelerator, batches: Sequence[list[int]]) -> list[list[int]]:
    """Every rank makes as many micro-batches as the one with most; some of them are empty."""
    count = torch.tensor([len(batches)], device=accelerator.device)
    num_batches = int(accelerator.gather(count).max())
    return [*batches, *[[] for _ in range(num_batches - len(batches))]]


@torch.no_grad()
def update_average(loop: Loop) -> None:
    """average <- decay * average + (1 - decay) * weights, decay <= n / (n + 9) at update n: short runs forget
    their start.
    """
    if loop.config.train.ema_decay is None:
        return
    decay = min(loop.config.train.ema_decay, loop.num_updates / (loop.num_updates + 9))
    for name, weight in trainable_weights(loop.model).items():
        loop.average[name].lerp_(weight.float(), 1 - decay)


@torch.no_grad()
def use_average(loop: Loop) -> None:
    """Put the averaged weights, if there are any, into the model; checkpoints keep both."""
    weights = dict(loop.model.named_parameters())
    for name, average in loop.average.items():
        weights[name].copy_(average)


def measure(loop: Loop, eval_callback: EvalCallback) -> dict[str, float]:
    """Every rank measures the weights that the run would write now; ranks agree on the mean."""
    started = time.perf_counter()
    weights = trainable_weights(loop.model)
    trained = {name: weight.detach().clone() for name, weight in weights.items() if name in loop.average}
    use_average(loop)
    with gathered_weights(loop.loss):
        found = eval_callback(loop.model)
    with torch.no_grad():
        for name, weight in trained.items():
            weights[name].copy_(weight)
    sums = sum_over_ranks(loop.accelerator, *found.values())
    metrics = {name: value / loop.accelerator.num_processes for name, value in zip(found, sums, strict=True)}
    loop.scores.append(metrics.pop("score"))
    return metrics | {"eval_seconds": time.perf_counter() - started}


def has_stalled(loop: Loop) -> bool:
    """Whether the last `eval.patience` measurements found nothing better than an earlier one."""
    patience = loop.config.eval.patience
    if patience is None or not loop.scores:
        return False
    best = loop.scores.index(max(loop.scores))
    return len(loop.scores) - 1 - best >= patience


def save(loop: Loop, step: int) -> None:
    """All ranks take part: the main one writes what the others hold of sharded weights."""
    with whole_weights(trainable_weights(loop.model).values()):
        save_checkpoint(
            Path(loop.config.output_dir),
            step,
            loop.model,
            loop.optimizer,
            loop.progress(step),
            loop.config.train.save_total_limit,
            loop.average,
            writes=loop.accelerator.is_main_process,
        )
    loop.accelerator.wait_for_everyone()


def resume(loop: Loop) -> int:
    """Continue from the newest checkpoint, or delete them all; the number of steps already done."""
    found = find_checkpoints(Path(loop.config.output_dir))
    if not loop.config.train.resume_from_checkpoint:
        if loop.accelerator.is_main_process:
            for folder in found:
                shutil.rmtree(folder)  # else a later one would outlive those of this run
        return 0
    if not found:
        return 0
    with whole_weights(trainable_weights(loop.model).values(), changed=True):
        progress = load_checkpoint(found[-1], loop.model, loop.optimizer)
    if progress.get("data_digest", loop.data_digest) != loop.data_digest:
        raise DataError(
            f"the training data are not those of {found[-1]} any more (data.path, rollout.path): put them "
            "back as they were to continue, or choose another output_dir to start over."
        )
    loop.restore(progress)
    if loop.average:
        load_average(found[-1], loop.average)
    return progress["step"]
