"""Dropout that acts in updates only: the rest of the model stays in evaluation mode throughout.

Rollouts, targets and measurements are computed without it. What is dropped depends on a seed alone.
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
"""How families name the two halves of a decoder layer."""


class OutputDropout(nn.Dropout):
    """On what a sublayer adds to the residual stream."""

    def hook(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self(output)
        return (self(output[0]), *output[1:])


def add_output_dropout(model: PreTrainedModel, p: float) -> None:
    """Dropout after every attention and every MLP layer; off until `training_dropout`. ConfigError where none
    is found.
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
    """For the pass of a teacher that shares its weights with the student, inside an update."""
    active: list[nn.Module] = [m for m in model.modules() if isinstance(m, OutputDropout) and m.training]
    switch_training_mode(active, False)
    try:
        yield
    finally:
        switch_training_mode(active, True)


@contextmanager
def training_dropout(model: nn.Module, seed: int) -> Iterator[None]:
    """Let dropout act, forward and backward, with draws that depend on `seed` alone."""
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
    """For these modules alone: `train()` would reach the base layers inside them."""
    for module in modules:
        module.training = mode
