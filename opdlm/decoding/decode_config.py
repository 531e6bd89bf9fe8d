"""How to decode: the one group of settings that generation, serving, rollouts and evaluation share.

A plain dataclass without torch: it travels with every result folder, and command lines show its defaults. It
checks itself, so a configuration made by hand is as safe as one read from a recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Mode = Literal["ar", "static", "threshold", "entropy", "left_to_right", "lossless"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """How to decode. Raises ValueError where a number lies outside its range."""

    mode: Mode = "threshold"
    """ar: token by token. static: a fixed number of tokens per step. threshold: every token whose probability
    exceeds confidence_threshold. entropy: tokens of little joint entropy. left_to_right: in reading order.
    lossless: drafts that the AR weights verify (preserve).
    """
    max_new_tokens: int = 256
    """Length cap of a response in tokens, the stop token included."""
    batch_size: int = 64
    """Rows decoded at once; a finished row makes room for the next prompt."""
    temperature: float = 0.0
    """0 = arg-max."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    top_p: float | None = None
    """Sample within the smallest set of tokens of this probability mass."""
    denoising_steps: int | None = None
    """Steps per block at most; None = block_size, one token a step."""
    confidence_threshold: float = 0.9
    """threshold: reveal every token whose probability exceeds this."""
    entropy_bound: float = 0.1
    """entropy: tokens revealed together may have this much entropy (nats), less that of the least certain."""
    ar_accept_threshold: float = 0.1
    """Denoising modes of preserve: the AR model replaces a revealed token that it finds less likely than
    this, in the forward that commits it. 0 = never.
    """
    logprobs: bool = False
    """Record the log-probability of every chosen token (temperature 1, unfiltered)."""
    forward_overhead: float | None = None
    """lossless: cost of a forward beside its slots, in slots; the larger, the longer the drafts. None: 32 on
    a CPU, 512 elsewhere.
    """

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "top_k", "denoising_steps"):
            value: int | None = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1.")
        for name, highest in LIMITS.items():
            number: float | None = getattr(self, name)
            if number is not None and not 0 <= number <= highest:
                raise ValueError(f"{name} ({number:g}) must lie between 0 and {highest:g}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p:g}) must be greater than 0 and at most 1.")


LIMITS = {
    "temperature": 100.0,
    "confidence_threshold": 1.0,
    "ar_accept_threshold": 1.0,
    "entropy_bound": math.inf,
    "forward_overhead": 1e12,
}
"""Largest value of each setting whose smallest is 0."""
