"""What this machine can do: free memory, and the speed of a model of the same shape, measured in seconds."""

from __future__ import annotations

import time
from typing import Any

import psutil
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


def free_memory() -> float:
    """Bytes that this process's device can still give."""
    device = PartialState().device
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


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
    rows = config.rollout.decode.batch_size
    return flops_per_second(layers, rows, slots_per_row), flops_per_second(layers, 1, TRAINING_TOKENS)


@torch.inference_mode()
def flops_per_second(layers: torch.nn.Module, num_rows: int, num_tokens: int) -> float:
    """Of repeated forwards on `num_rows` x `num_tokens` slots; products with the weights count."""
    weight = next(p for p in layers.parameters() if p.dim() == 2)
    embedded = torch.randn(num_rows, num_tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    counted = sum(p.numel() for p in layers.parameters() if p.dim() == 2) - weight.numel()  # the embedding
    started, num_forwards = 0.0, -1  # the first forward warms up
    while num_forwards < 1 or time.perf_counter() - started < PROBE_SECONDS:
        hidden = layers(inputs_embeds=embedded, use_cache=False).last_hidden_state
        float(hidden[0, 0, 0])  # waits for a GPU
        num_forwards += 1
        started = started or time.perf_counter()
    return 2.0 * counted * num_rows * num_tokens * num_forwards / (time.perf_counter() - started)
