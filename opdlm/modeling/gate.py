"""The gate of a LoRA adapter in `preserve`: it is computed for noised slots only.

Clean slots then compute exactly the AR model, so one forward pass gives teacher states and drafts together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Adapted(NamedTuple):
    """A linear layer with an adapter: host(x) computes y = base(x), then add_change(x, y), which adds the
    adapter's output to y `[N, out]` in place.
    """

    host: nn.Module
    base: Callable[[Tensor], Tensor]
    add_change: Callable[[Tensor, Tensor], object]


class Gate:
    """Restricts the adapter to the noised slots of a packed forward. Clean slots come first and are computed
    by the base layer alone. While the gate is not set, the adapter applies to every slot.
    """

    def __init__(self) -> None:
        self.num_clean: int | None = None
        self.is_open_N1: Tensor | None = None
        """Noised slots in a compiled forward, whose shapes must not depend on the number of clean slots."""

    def attach(self, layers: Iterable[Adapted]) -> None:
        """Replace the forward of each layer by one that follows the gate while it is set."""
        for layer in layers:
            layer.host.forward = self._gated(layer, layer.host.forward)

    def _gated(self, layer: Adapted, ungated: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first, is_open_N1 = self.num_clean, self.is_open_N1
            if first is None and is_open_N1 is None:
                return ungated(inputs, *args, **kwargs)
            output = layer.base(inputs)
            if is_open_N1 is not None:
                changed = output.clone()
                layer.add_change(inputs.flatten(0, -2), changed.flatten(0, -2))
                return torch.where(is_open_N1, changed, output)
            if first is not None and first < inputs.shape[-2]:
                inputs_NI = inputs.reshape(-1, inputs.shape[-1])
                layer.add_change(inputs_NI[first:], output.view(-1, output.shape[-1])[first:])
            return output

        return forward

    @contextmanager
    def after(self, num_clean: int) -> Iterator[None]:
        """Set the gate: the adapter applies from slot `num_clean` on. Inference only, because a checkpointed
        backward would compute the layer again with the gate no longer set.
        """
        assert not torch.is_grad_enabled(), "the gate does not work with a backward pass"
        self.num_clean = num_clean
        try:
            yield
        finally:
            self.num_clean = None
