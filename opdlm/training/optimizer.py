"""The optimiser and its learning rates: AdamW, fused or with 8-bit moments, on float32 weights whatever the
model computes in.

A bfloat16 weight has 8 significant bits: an update below 1/512 of it would be rounded away, and at a learning
rate of 1e-5 that is nearly every update. Weights that are not float32 (a student trained in full with
`model.dtype=bfloat16`) therefore get a float32 master copy that the optimiser works on; the model receives
it rounded. Adapters and mask embeddings are float32 already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from opdlm.config.sections import OptimizerSection

MakeOptimizer = Callable[[Sequence[Tensor]], Optimizer]


def make_optimizer(
    parameters: Sequence[nn.Parameter], section: OptimizerSection, *, masters: bool = True
) -> Optimizer:
    """AdamW over the parameters, with master copies where they are needed (ZeRO brings its own)."""
    options: dict[str, Any] = {
        "lr": section.learning_rate,
        "betas": section.betas,
        "weight_decay": section.weight_decay,
    }
    if section.name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        make: MakeOptimizer = partial(AdamW8bit, **options)
    else:
        make = partial(torch.optim.AdamW, fused=True, **options)
    if not masters or all(torch.finfo(p.dtype).bits >= 32 for p in parameters):
        return make(parameters)
    return MasterWeights(parameters, make, section.learning_rate)


def make_scheduler(
    optimizer: Optimizer, section: OptimizerSection, num_updates: int, num_done: int = 0
) -> LambdaLR:
    """Linear warm-up, then a cosine down to `min_learning_rate_ratio` of the peak at update `num_updates`.

    The rates depend on the number of the update alone: after `num_done` updates they continue with the next.
    """
    options = {"min_lr_rate": section.min_learning_rate_ratio, "last_epoch": num_done - 1}
    return get_scheduler("cosine_with_min_lr", optimizer, section.warmup_steps, num_updates, options)


class MasterWeights(Optimizer):
    """Another optimiser, run on float32 copies of the parameters, and the result rounded into them.

    The copies are made at the first step, from the parameters as they then are, and saved with the moments.
    """

    def __init__(self, parameters: Sequence[Tensor], make: MakeOptimizer, learning_rate: float) -> None:
        super().__init__(parameters, {"lr": learning_rate})
        self.make = make
        self.masters: list[Tensor] = []

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def start(self) -> None:
        """Copy the parameters and build the optimiser of the copies, once."""
        if not self.masters:
            self.masters = [p.detach().float() for p in self.parameters()]
            self.inner = self.make(self.masters)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.start()
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        for parameter, master in zip(self.parameters(), self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None  # both sets of gradients would be the largest memory of a run
        self.inner.step()
        self.inner.zero_grad()
        for parameter, master in zip(self.parameters(), self.masters, strict=True):
            parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimiser of the copies, with each copy as `master`."""
        self.start()
        saved = self.inner.state_dict()
        state = {i: saved["state"].get(i, {}) | {"master": master} for i, master in enumerate(self.masters)}
        return {"state": state, "param_groups": saved["param_groups"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start()
        moments = {}
        for i, values in state_dict["state"].items():
            self.masters[i].copy_(values["master"])
            moments[i] = {name: value for name, value in values.items() if name != "master"}
        self.inner.load_state_dict(state_dict | {"state": moments})
