"""How fast this machine computes a model of the same shape, measured in seconds."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import PartialState

from opdlm.checkpoints.load import new_causal_lm, read_architecture
from opdlm.config.sections import Config
from opdlm.errors import OpdlmError

PROBE_LAYERS = 2
PROBE_SECONDS = 1.0
"""Of each of the two measurements."""
TRAINING_TOKENS = 1024
"""Slots of a training forward in the probe."""
FEW_TOKENS = 16
"""Of the first forward, which shows how many a slow machine can do in time."""


def measured_speed(config: Config, slots_per_row: int) -> tuple[float, float] | None:
    """FLOPs per second of decoding and of training forwards, by two random layers of the model's shape.

    `config.model.dtype` must be known. None where such layers cannot be made.
    """
    architecture = read_architecture(config.model.path, config.model.trust_remote_code)
    known = architecture.get_text_config().to_dict()
    shape: dict[str, Any] = {"num_hidden_layers": PROBE_LAYERS, "vocab_size": 1024, "pad_token_id": None}
    try:
        model = new_causal_lm(
            config.model.path, config.model.dtype, {k: v for k, v in shape.items() if k in known}, seed=0
        )
    except OpdlmError:
        return None
    layers = model.to(PartialState().device).base_model
    decoding_slots = config.rollout.decode.batch_size * slots_per_row
    return flops_per_second(layers, decoding_slots), flops_per_second(layers, TRAINING_TOKENS)


@torch.inference_mode()
def flops_per_second(layers: torch.nn.Module, num_tokens: int) -> float:
    """Of repeated forwards on a row of `num_tokens`, fewer where these would take long; products with the
    weights count.
    """
    weight = next(p for p in layers.parameters() if p.dim() == 2)
    counted = sum(p.numel() for p in layers.parameters() if p.dim() == 2) - weight.numel()  # the embedding

    def seconds(size: int) -> float:
        embedded = torch.randn(1, size, weight.shape[1], dtype=weight.dtype, device=weight.device)
        started = time.perf_counter()
        float(layers(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, 0, 0])  # waits for a GPU
        return time.perf_counter() - started

    size = FEW_TOKENS
    while seconds(size) < PROBE_SECONDS / 4 and size < num_tokens:  # also warms up
        size = min(2 * size, num_tokens)
    spent, num_forwards = 0.0, 0
    while spent < PROBE_SECONDS:
        spent += seconds(size)
        num_forwards += 1
    return 2.0 * counted * size * num_forwards / spent
