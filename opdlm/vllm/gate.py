"""The gated adapter of `preserve` students inside vLLM: it acts on noised slots only.

vLLM joins layers that read the same input (q, k and v; gate and up). Their adapters are joined as well: the
matrices A are stacked and the matrices B form a block-diagonal matrix, so that B (A x) is the change of the
joined output. DoRA and layers that are split over several GPUs are not supported.

Shape suffixes: N slots of a forward, I inputs, O outputs, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ADAPTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""Layers that may have an adapter."""
AdapterWeights = Mapping[str, tuple[Tensor, Tensor]]
"""Layer name -> A `[R, I]` and B `[O, R]`; B includes the scale."""


class SlotGate:
    """Adds the adapter of each layer at the noised slots of a forward."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        """Replace the forward of vLLM's linear layers by one that adds the adapter."""
        self.layers = layers
        self.noised_N = torch.zeros(0, dtype=torch.long)
        self.adapters: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in layers.items():
            layer.forward = self._gated(name, layer.forward)

    def _gated(self, name: str, plain: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def forward(inputs_NI: Tensor) -> Any:
            result = plain(inputs_NI)
            if name in self.adapters and len(self.noised_N):
                down_RI, up_OR = self.adapters[name]
                change = inputs_NI[self.noised_N].to(down_RI.dtype) @ down_RI.T @ up_OR.T
                output_NO = result[0] if isinstance(result, tuple) else result
                output_NO[self.noised_N] += change.to(output_NO.dtype)
            return result

        return forward

    def embed_masks(self, embedding: nn.Module, mask_H: Tensor) -> None:
        """Replace the embedding of the noised slots, whatever their ids, by that of [MASK]."""
        plain = embedding.forward

        def forward(ids_N: Tensor) -> Tensor:
            embedded_NH = plain(ids_N)
            embedded_NH[self.noised_N] = mask_H.to(embedded_NH.dtype)
            return embedded_NH

        embedding.forward = forward

    def load(self, adapter: AdapterWeights) -> None:
        """Copy the present weights of the adapter."""
        for name, layer in self.layers.items():
            parent, _, last = name.rpartition(".")
            parts = [f"{parent}.{part}" for part in JOINED.get(last, (last,))]
            if not any(part in adapter for part in parts):
                continue
            device = next(layer.parameters()).device
            sizes: list[int] = getattr(layer, "output_sizes", None) or [layer.output_size]
            downs = [adapter[part][0] for part in parts if part in adapter]
            ups = [
                adapter[part][1] if part in adapter else torch.zeros(size, 0)
                for part, size in zip(parts, sizes, strict=True)
            ]
            self.adapters[name] = torch.cat(downs).to(device), torch.block_diag(*ups).to(device)
