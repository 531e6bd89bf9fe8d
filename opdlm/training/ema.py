"""Exponential moving average (EMA) of the trained weights, float32 by name; `train.ema_decay`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opdlm.training.checkpoint import trainable_weights

Average = dict[str, Tensor]


def start_average(model: nn.Module, decay: float | None) -> Average:
    """A copy of the trained weights; empty if `decay` is None."""
    if decay is None:
        return {}
    return {name: weight.detach().float().clone() for name, weight in trainable_weights(model).items()}


@torch.no_grad()
def update_average(average: Average, model: nn.Module, decay: float | None, num_updates: int) -> None:
    """average <- d * average + (1 - d) * weights with d = min(decay, n / (n + 9)) after n updates, so that a
    short run forgets its initial weights.
    """
    if decay is None:
        return
    decay = min(decay, num_updates / (num_updates + 9))
    for name, weight in trainable_weights(model).items():
        average[name].lerp_(weight.float(), 1 - decay)


@torch.no_grad()
def use_average(average: Mapping[str, Tensor], model: nn.Module) -> None:
    """Replace the model's weights by their averages, if there are any."""
    weights = dict(model.named_parameters())
    for name, averaged in average.items():
        weights[name].copy_(averaged)


@contextmanager
def averaged_weights(average: Mapping[str, Tensor], model: nn.Module) -> Iterator[None]:
    """The averaged weights inside the block, the trained weights after it."""
    weights = trainable_weights(model)
    trained = {name: weight.detach().clone() for name, weight in weights.items() if name in average}
    use_average(average, model)
    try:
        yield
    finally:
        use_average(trained, model)
