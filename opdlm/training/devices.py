"""One run on many devices: who does which share, weights sharded over ranks, values gathered from all ranks.

A run's result does not depend on the number of ranks: prompts, rollouts and updates are those of the whole
run, every rank takes a share of them, and random draws belong to a prompt, not to a rank. DDP is what
accelerate makes of it. FSDP2 is applied here, because rollouts and the teacher's pass go around the forward
that accelerate wraps: every decoder layer is a shard of its own; embeddings, norm and head form the root's,
which the first forward after an update gathers and the backward pass frees, so the loss can read the head.
DeepSpeed's ZeRO is in `zero`.
Not here: the launch (`accelerate launch`, docs/many_devices.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.slots import clean_slots
from opdlm.training.deepspeed import ZeroOptimizer, check_zero, gathered_for_rollouts, start_zero, zero_stage

Item = TypeVar("Item")


def join_ranks(config: RunConfig) -> PartialState:
    """Meet the other ranks of the launch. accelerate looks for them on CPUs only when told to."""
    check_zero(config)
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):  # `zero` drives the engine, not accelerate
        state = PartialState(cpu=not torch.accelerator.is_available())
    assert state.num_processes == int(os.environ.get("WORLD_SIZE", "1")), "every rank would run alone"
    return state


def leave_ranks(accelerator: Accelerator) -> None:
    """End trackers and process group. gloo's threads need Python's lock to drop the tensors of the last
    exchange, and abort a process that ends before they had it (seen with torch 2.13).
    """
    num_processes = accelerator.num_processes
    accelerator.end_training()
    if num_processes > 1:
        time.sleep(0.2)


def start_accelerator(config: RunConfig) -> Accelerator:
    """Device, precision and trackers. A second run in one process may choose another precision."""
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


def place(model: DiffusionLM, accelerator: Accelerator) -> None:
    """Move the model to this rank's device, or its share of the weights if the launch asks for FSDP. Make the
    optimiser afterwards: sharding replaces the parameters.
    """
    if not launch_shards(accelerator.num_processes):
        model.to(accelerator.device)
        return
    reshard = parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", default=True)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # what transformers calls a decoder layer
            fully_shard(module, reshard_after_forward=reshard)
    fully_shard(model)
    for name in ("_hidden", "_packed_hidden"):  # every forward pass goes through one of them
        register_fsdp_forward_method(model, name)
    # The first forward decides which module is the root; a rank without prompts would start elsewhere.
    one = torch.ones((1, 1), dtype=torch.long, device=accelerator.device)
    model.teacher_hidden(clean_slots(one, one[0], one[0], model.spec.block_grid, "preserve"))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the optimiser must find the shards


def wrap(
    student_loss: nn.Module, optimizer: Optimizer, accelerator: Accelerator, config: RunConfig
) -> tuple[nn.Module, Optimizer]:
    """Loss and optimiser that exchange gradients: in ZeRO's engine, in FSDP's layers (as placed), in DDP."""
    if zero_stage():
        return start_zero(student_loss, optimizer, config)
    if any(isinstance(module, FSDPModule) for module in student_loss.modules()):
        return student_loss, optimizer
    return accelerator.prepare(student_loss, optimizer)


def launch_shards(num_processes: int) -> bool:
    """Whether the launch asks for weights in pieces (FSDP2)."""
    return num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule) or zero_stage() == 3


@contextmanager
def gathered_weights(student_loss: nn.Module) -> Iterator[None]:
    """All weights on every rank, without communication inside: ranks decode different numbers of steps."""
    if zero_stage() == 3:
        with gathered_for_rollouts(student_loss):
            yield
        return
    shards = [module for module in student_loss.modules() if isinstance(module, FSDPModule)]
    layers = shards[1:]  # the root comes first
    reshard = parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", default=True)
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    for shard in shards:
        shard.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(reshard, recurse=False)
        for shard in shards:  # of the root too: what was gathered must not outlive a change of the weights
            shard.reshard()


def without_sync(module: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
    """DDP sums gradients over ranks in the last micro-batch; FSDP and ZeRO scatter them in each."""
    if zero_stage():
        engine: Any = module
        engine.set_gradient_accumulation_boundary(is_last)
    elif isinstance(module, DistributedDataParallel) and not is_last:
        return module.no_sync()
    return nullcontext()


def clip_and_step(
    student_loss: nn.Module, optimizer: Optimizer, accelerator: Accelerator, max_norm: float
) -> float:
    """One optimiser update on clipped gradients, which are then cleared; their norm before."""
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.clip_and_step()
    norm = accelerator.clip_grad_norm_(student_loss.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def gather_items(accelerator: Accelerator, items: dict[int, Item]) -> list[Item]:
    """What all ranks hold under their own keys, on every rank, in the order of the keys."""
    found: list[tuple[int, Item]] = gather_object(list(items.items()))
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]


def sum_over_ranks(accelerator: Accelerator, *values: float) -> list[float]:
    total = accelerator.reduce(torch.tensor(values, device=accelerator.device), "sum")
    return total.tolist()
