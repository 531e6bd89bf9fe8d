"""DeepSpeed ZeRO (arXiv 1910.02054): optimiser state and gradients (stage 2), and weights (stage 3),
partitioned over the ranks.

DeepSpeed's engine wraps the student's loss. It gathers weights around every module (stage 3), reduces each
gradient to the rank that holds its partition, clips and steps. The training loop and the checkpoints are
ours. Checkpoints hold unpartitioned tensors, so a run resumes under any launch file on any number of ranks.
`training.devices` calls this module if the launch requests ZeRO.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from opdlm.config.sections import RunConfig
from opdlm.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_stage() -> int:
    """The ZeRO stage that the launch requests; 0 without ZeRO."""
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return 0
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def check_zero(config: RunConfig) -> None:
    """ConfigError if the settings cannot run under the ZeRO stage of the launch."""
    stage = zero_stage()
    if stage not in (0, 2, 3):
        raise ConfigError(f"zero_stage of the launch ({stage}) must be 2 or 3: see recipes/accelerate.")
    if stage and find_spec("deepspeed") is None:
        raise ConfigError("the launch asks for DeepSpeed, which is missing: pip install 'opdlm[deepspeed]'.")
    if stage and config.optimizer.name == "adamw8bit":
        raise ConfigError(
            "optimizer.name (adamw8bit) does not work with ZeRO, which splits tensors inside the blocks "
            "that share a scale: use adamw, or launch with recipes/accelerate/ddp.yaml."
        )
    is_full_preserve = config.format.name == "preserve" and not config.lora.enabled
    if stage and is_full_preserve and config.model.dtype != "float32":
        raise ConfigError(
            f"model.dtype ({config.model.dtype}) with format.name=preserve and lora.enabled=false trains "
            "weights of two dtypes, which ZeRO does not support: use model.dtype=float32 with "
            "train.mixed_precision=bf16, or launch with recipes/accelerate/ddp.yaml."
        )
    for key, is_used in {
        "train.ema_decay": config.train.ema_decay is not None,
        "model.load_in_4bit": config.model.load_in_4bit,
    }.items():
        if stage == 3 and is_used:
            raise ConfigError(
                f"{key} needs whole weights on every device, which ZeRO-3 does not keep: leave it out, or "
                "launch with recipes/accelerate/zero2.yaml."
            )


def start_zero(
    student_loss: nn.Module, optimizer: Optimizer, config: RunConfig
) -> tuple[nn.Module, ZeroOptimizer]:
    """DeepSpeed's engine, which is called like the module that it wraps, and the partitioned optimiser."""
    import deepspeed

    parameters = optimizer.param_groups[0]["params"]
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # the loop makes its own batches
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": {
            "stage": zero_stage(),
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,  # free weights after each use, however small the model
        },
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": config.train.mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # weights and gradients travel in their own dtype
        },
    }
    engine, *_ = deepspeed.initialize(model=student_loss, optimizer=optimizer, config=settings)
    if zero_stage() == 3:
        for parameter in parameters_outside_layers(student_loss):
            deepspeed.zero.register_external_parameter(student_loss, parameter)
    return engine, ZeroOptimizer(engine, parameters, config.optimizer.learning_rate)


def parameters_outside_layers(module: nn.Module) -> list[nn.Parameter]:
    """Embeddings, norms and head; the loss reads some of them outside their module's forward."""
    layers = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {p for layer in layers for p in layer.parameters()}
    return [p for p in module.parameters() if p not in inside]


@contextmanager
def gathered_for_rollouts(engine: nn.Module) -> Iterator[None]:
    """Stage 3: all weights on every rank, so that no forward communicates."""
    import deepspeed

    with deepspeed.zero.unwrap_model_for_generation(engine):
        yield


@contextmanager
def whole_weights(parameters: Iterable[nn.Parameter], *, changed: bool = False) -> Iterator[None]:
    """Stage 3: gather these weights on every rank, to be read or, if `changed`, written."""
    if zero_stage() != 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if changed else None):
        yield


class ZeroOptimizer(Optimizer):
    """DeepSpeed's partitioned optimiser with the state dict of an unpartitioned one.

    The engine holds float32 master weights of weights that are not float32. They are saved with the moments,
    like those of `MasterWeights`.
    """

    def __init__(self, engine: Any, parameters: Sequence[nn.Parameter], learning_rate: float) -> None:
        super().__init__(parameters, {"lr": learning_rate})
        self.engine, self.parameters = engine, parameters
        self.has_masters = any(torch.finfo(p.dtype).bits < 32 for p in parameters)

    @property
    def moments(self) -> dict[Tensor, dict[str, Tensor]]:
        """AdamW's state of this rank's flat partitions; empty before the first step."""
        return self.engine.optimizer.optimizer.state

    def clip_and_step(self) -> float:
        """One optimiser update on clipped gradients; returns their norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        self.step()
        return float(self.engine.get_global_grad_norm())

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.engine.step()

    def state_dict(self) -> dict[str, Any]:
        """Unpartitioned tensors, on the CPU of rank 0; the other ranks only send their partitions."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        def keep(whole: Tensor) -> Tensor:
            return whole.cpu() if self.engine.global_rank == 0 else whole.new_empty(0)

        state: dict[int, dict[str, Tensor]] = {}
        for i, parameter in enumerate(self.parameters if self.moments else ()):
            state[i] = {key: keep(safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS}
            state[i]["step"] = next(iter(self.moments.values()))["step"].cpu().clone()
            if self.has_masters:
                state[i]["master"] = keep(safe_get_full_fp32_param(parameter))
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy this rank's partitions. The weights must be gathered and loaded beforehand."""
        self.allocate_moments(state_dict["state"][0]["step"])
        for i, parameter in enumerate(self.parameters):
            saved = state_dict["state"][i]
            set_partition(parameter, saved.get("master", parameter))
            for key in MOMENTS:
                set_partition(parameter, saved[key], key)

    def allocate_moments(self, step: Tensor) -> None:
        """Create the moments as zeros, which AdamW itself does only in its first step."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self.engine.optimizer
        if zero_stage() == 3:
            flats = zero.fp32_partitioned_groups_flat
        else:
            flats = zero.single_partition_of_fp32_groups
        for flat in flats:
            self.moments[flat] = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.moments[flat]["step"] = step.to(flat.device, copy=True)
        if zero_stage() == 2:
            for group, flat in zip(zero.bit16_groups, flats, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self.moments)


def set_partition(parameter: Any, whole: Tensor, *moment: str) -> None:
    """Write this rank's partition of `whole` into a moment, or into the float32 weight if none is named."""
    from deepspeed import comm, utils

    if zero_stage() == 2:
        write = utils.safe_set_full_optimizer_state if moment else utils.safe_set_full_fp32_param
        write(parameter, whole, *moment)
        return
    size = parameter.ds_tensor.numel()
    padded = F.pad(whole.flatten(), (0, size * comm.get_world_size() - whole.numel()))
    write = utils.safe_set_local_optimizer_state if moment else utils.safe_set_local_fp32_param
    write(parameter, padded[size * comm.get_rank() :][:size], *moment)
