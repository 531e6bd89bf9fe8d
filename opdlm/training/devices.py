"""One run on many devices: ranks, sharded weights (DDP, FSDP2), values gathered from all ranks.

The result of a run does not depend on the number of ranks. Prompts, rollouts and updates are those of the
whole run, each rank processes a part of them, and random draws belong to a prompt, not to a rank. accelerate
applies DDP. FSDP2 is applied here, because rollouts and the teacher's pass bypass the forward that accelerate
wraps. Every decoder layer is an FSDP unit; embeddings, norm and head form the root unit. The first forward
after an update gathers the root and the backward pass frees it, so the loss can read the head. Not here: ZeRO
(`training.deepspeed`) and the launch (`accelerate launch`, docs/many_devices.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, parse_flag_from_env, patch_environment
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from opdlm.config.sections import RunConfig
from opdlm.errors import ConfigError
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.slots import clean_slots
from opdlm.training.deepspeed import ZeroOptimizer, check_zero, gathered_for_rollouts, start_zero, zero_stage

Item = TypeVar("Item")


def join_ranks(config: RunConfig) -> PartialState:
    """Join the process group of the launch, if its ZeRO stage can run these settings."""
    check_zero(config)
    return join_launch()


def join_launch() -> PartialState:
    """Join the process group of the launch. accelerate uses CPU ranks only with `cpu=True`, which the first
    `PartialState` of a process decides.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; see `deterministic_kernels`
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):  # `training.deepspeed` starts the engine
        state = PartialState(cpu=not torch.accelerator.is_available())
    assert state.num_processes == int(os.environ.get("WORLD_SIZE", "1")), "every rank would run alone"
    return state


def leave_ranks(accelerator: Accelerator) -> None:
    """Close trackers and the process group. gloo's threads need Python's lock to free the tensors of the last
    collective, and abort a process that exits earlier (seen with torch 2.13), so this waits for a moment.
    """
    num_processes = accelerator.num_processes
    accelerator.end_training()
    if num_processes > 1:
        time.sleep(0.2)


def check_trackers(config: RunConfig) -> None:
    """ConfigError if a tracker of `train.report_to` is not installed."""
    for tracker in config.train.report_to:
        if find_spec(tracker) is None:
            raise ConfigError(
                f"train.report_to names {tracker}, which is not installed: pip install 'opdlm[track]'."
            )


def start_accelerator(config: RunConfig) -> Accelerator:
    """An Accelerator with the device, precision and trackers of the run. State of an earlier run in the same
    process is reset, since that run may have used another precision.
    """
    join_ranks(config)
    AcceleratorState._reset_state(reset_partial_state=False)
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.train.mixed_precision,
            log_with=list(config.train.report_to) or None,
            project_dir=config.output_dir,
        )
    if config.train.report_to:
        settings = {key: str(value) for key, value in config.flat().items()}
        accelerator.init_trackers("opdlm", config=settings)
    return accelerator


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Ask CUDA for deterministic kernels, so that a resumed run equals an uninterrupted one.

    torch warns of each operation that has none (docs/many_devices.md, "Bit for bit"). Those for CPUs are
    deterministic, and decoding writes no element twice.
    """
    if device.type != "cuda":
        yield
        return
    options: Any = torch.utils.deterministic
    mode, fills = torch.get_deterministic_debug_mode(), options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    options.fill_uninitialized_memory = False  # a slow aid to debugging
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        options.fill_uninitialized_memory = fills


def place(model: DiffusionLM, accelerator: Accelerator) -> None:
    """Move the model to this rank's device, sharded if the launch requests FSDP. Create the optimiser
    afterwards, because sharding replaces the parameters.
    """
    if not is_fsdp_launch(accelerator.num_processes):
        model.to(accelerator.device)
        return
    reshard = parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", default=True)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # what transformers calls a decoder layer
            fully_shard(module, reshard_after_forward=reshard)
    fully_shard(model)
    for name in ("_hidden", "_packed_hidden"):  # every forward pass goes through one of them
        register_fsdp_forward_method(model, name)
    # The first forward determines the root module; on a rank without prompts it would be another one.
    one = torch.ones((1, 1), dtype=torch.long, device=accelerator.device)
    model.teacher_hidden(clean_slots(one, one[0], one[0], model.spec.block_grid, "preserve"))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the optimiser must find the shards


def wrap(
    student_loss: nn.Module, optimizer: Optimizer, accelerator: Accelerator, config: RunConfig
) -> tuple[nn.Module, Optimizer]:
    """Loss and optimiser whose gradients are reduced over the ranks (ZeRO, FSDP, DDP)."""
    if zero_stage():
        return start_zero(student_loss, optimizer, config)
    if any(isinstance(module, FSDPModule) for module in student_loss.modules()):
        return student_loss, optimizer
    return accelerator.prepare(student_loss, optimizer)


def is_fsdp_launch(num_processes: int) -> bool:
    """Whether the launch requests sharded weights (FSDP2)."""
    return num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds a part of the weights only (FSDP2, ZeRO-3)."""
    return isinstance(model, FSDPModule) or zero_stage() == 3


@contextmanager
def gathered_weights(student_loss: nn.Module) -> Iterator[None]:
    """All weights on every rank without communication: ranks decode different numbers of steps."""
    if zero_stage() == 3:
        with gathered_for_rollouts(student_loss):
            yield
        return
    units = [module for module in student_loss.modules() if isinstance(module, FSDPModule)]
    layers = units[1:]  # the root comes first
    reshard = parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", default=True)
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(reshard, recurse=False)
        for unit in units:  # the root too: gathered weights must not outlive an update
            unit.reshard()


def without_sync(module: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
    """Skip DDP's reduction of gradients in all micro-batches but the last; FSDP and ZeRO reduce in each."""
    if zero_stage():
        engine: Any = module
        engine.set_gradient_accumulation_boundary(is_last)
    elif isinstance(module, DistributedDataParallel) and not is_last:
        return module.no_sync()
    return nullcontext()


def clip_and_step(
    student_loss: nn.Module, optimizer: Optimizer, accelerator: Accelerator, max_norm: float
) -> float:
    """One optimiser update on clipped gradients, then cleared; returns the norm before clipping."""
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.clip_and_step()
    norm = accelerator.clip_grad_norm_(student_loss.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def gather_items(accelerator: Accelerator, items: dict[int, Item]) -> list[Item]:
    """The items of all ranks, on every rank, in the order of their keys, which are unique over the ranks."""
    found: list[tuple[int, Item]] = gather_object(list(items.items()))
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]


def sum_over_ranks(accelerator: Accelerator, *values: float) -> list[float]:
    """The sum of each value over the ranks, on every rank."""
    total = accelerator.reduce(torch.tensor(values, device=accelerator.device), "sum")
    return total.tolist()
