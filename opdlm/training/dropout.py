"""Dropout that is active in updates only. Rollouts, targets and evaluations are computed without it, and all
other modules stay in evaluation mode. The dropout masks depend on a seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opdlm.errors import ConfigError

SUBLAYERS = ("att", "mlp", "feed_forward", "ffn")
"""Parts of the names that families give to attention and MLP modules."""


class OutputDropout(nn.Dropout):
    """Dropout on the output of a sublayer, before it is added to the residual stream."""

    def hook(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self(output)
        return (self(output[0]), *output[1:])


def add_output_dropout(model: PreTrainedModel, p: float) -> None:
    """Add dropout after every attention and every MLP module, inactive outside `training_dropout`.
    ConfigError if the model has no such module.
    """
    num_added = 0
    for layer in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        parts = {name: part for name, part in layer.named_children() if any(s in name for s in SUBLAYERS)}
        for name, part in parts.items():
            if "norm" not in name:
                dropout = OutputDropout(p).eval()
                part.register_forward_hook(dropout.hook)
                layer.add_module(f"{name}_dropout", dropout)
                num_added += 1
    if not num_added:
        raise ConfigError(
            f"objective.dropout ({p:g}) finds no attention or MLP layer in {model.config.model_type} models: "
            "leave it out."
        )


@contextmanager
def without_output_dropout(model: nn.Module) -> Iterator[None]:
    """Disable output dropout inside an update, for a teacher that shares the student's weights."""
    active: list[nn.Module] = [m for m in model.modules() if isinstance(m, OutputDropout) and m.training]
    switch_training_mode(active, False)
    try:
        yield
    finally:
        switch_training_mode(active, True)


@contextmanager
def training_dropout(model: nn.Module, seed: int) -> Iterator[None]:
    """Activate dropout for forward and backward passes, with masks that depend on `seed` alone."""
    modules: list[Any] = list(model.modules())
    layers: list[Any] = [m for m in modules if isinstance(m, LoraLayer)]
    dropouts = [dropout for layer in layers for dropout in layer.lora_dropout.values()]
    dropouts += [m for m in modules if isinstance(m, OutputDropout)]
    if not any(isinstance(m, nn.Dropout) for m in dropouts):
        yield
        return
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        switch_training_mode([*layers, *dropouts], True)
        try:
            yield
        finally:
            switch_training_mode([*layers, *dropouts], False)


def switch_training_mode(modules: list[nn.Module], mode: bool) -> None:
    """Set the mode of these modules only; `train()` would also set that of the base layers inside them."""
    for module in modules:
        module.training = mode
