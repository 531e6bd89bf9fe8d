"""Activation checkpointing: less memory, for a second forward pass of the layers."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_layers(model: nn.Module, every: int) -> None:
    """Recompute the activations of every `every`-th layer in the backward pass."""
    recompute: Any = partial(checkpoint, use_reentrant=False)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers[::every]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = recompute
        # Acts in training mode only; entered by the layers alone, it turns no dropout on.
        layer.training = True
