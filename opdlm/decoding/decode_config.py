"""Settings of decoding, shared by generation, serving, rollouts and evaluation.

A plain dataclass without torch, because command lines show its defaults and result folders contain a copy of
it. Its values are checked on creation, in Python as in a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

Mode = Literal["ar", "static", "threshold", "entropy", "left_to_right", "lossless"]
DraftSampling = Literal["shared_noise", "rejection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """Settings of decoding. Raises ValueError where a number is outside its range."""

    mode: Mode = "threshold"
    """ar: token by token. static: a fixed number of tokens per step. threshold: every token whose probability
    exceeds confidence_threshold. entropy: tokens of little joint entropy. left_to_right: the leftmost tokens.
    lossless: drafts that the AR weights verify (preserve).
    """
    max_new_tokens: int = 256
    """Length cap of a response in tokens, the stop token included."""
    batch_size: int = 64
    """Rows decoded at once; when a row finishes, the next prompt takes its place."""
    temperature: float = 0.0
    """0 = arg-max."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    top_p: float | None = None
    """Sample within the smallest set of tokens of this probability mass."""
    denoising_steps: int | None = None
    """Steps per block at most; None = block_size, one token per step."""
    confidence_threshold: float = 0.9
    """threshold: reveal every token whose probability exceeds this."""
    entropy_bound: float = 0.1
    """entropy: the largest sum of the entropies (nats) of tokens revealed together, without the largest."""
    ar_accept_threshold: float = 0.1
    """Remasking modes of preserve: a revealed token whose AR probability is below this is replaced by a token
    of the AR model, in the forward that commits it. 0 = never.
    """
    logprobs: bool = False
    """Record the log-probability of every chosen token (temperature 1, unfiltered)."""
    forward_overhead: float | None = None
    """lossless: fixed cost of a forward pass, in slots; a larger value gives longer drafts. None: the cost of
    forwards on this machine is measured before the first, in about a second. What is drafted then depends on
    the clock, and with it the rounding of logits, which decides near ties in 16-bit formats; reports, rollout
    files and training therefore take None as 32.
    """
    draft_sampling: DraftSampling = "shared_noise"
    """lossless at a temperature above 0. shared_noise: samples are those of AR decoding with the same seed.
    rejection: more drafts are accepted; samples have the same distribution, but depend on the drafts and so
    on the rows decoded beside them.
    """
    prompt_lookup_num_tokens: int | None = None
    """lossless: longest draft copied from the text before it, where its last tokens occurred already and the
    copy is likelier to be accepted than the student's draft. 0 = none. None: 20, but 0 with a given
    forward_overhead and so in reports, rollout files and training, which are about what the student drafts.
    """

    def __post_init__(self) -> None:
        for name, kind in (("mode", Mode), ("draft_sampling", DraftSampling)):
            word = getattr(self, name)
            if word not in get_args(kind):
                raise ValueError(f"{name} ({word!r}) must be one of {', '.join(get_args(kind))}.")
        for name in ("max_new_tokens", "batch_size", "top_k", "denoising_steps"):
            value: int | None = getattr(self, name)
            if value is not None and not 1 <= value <= MOST:
                rule = "at least 1" if value < 1 else f"at most {MOST}"
                raise ValueError(f"{name} ({value}) must be {rule}.")
        for name, highest in LIMITS.items():
            number: float | None = getattr(self, name)
            if number is not None and not 0 <= number <= highest:
                raise ValueError(f"{name} ({number:g}) must lie between 0 and {highest:g}.")
        copied = self.prompt_lookup_num_tokens
        if copied is not None and not 0 <= copied <= MOST_COPIED:
            raise ValueError(f"prompt_lookup_num_tokens ({copied}) must lie between 0 and {MOST_COPIED}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p:g}) must be greater than 0 and at most 1.")

    @property
    def lookup_length(self) -> int:
        """Longest draft that is copied from the text."""
        if self.mode != "lossless":
            return 0
        if self.prompt_lookup_num_tokens is None:
            return COPIED if self.forward_overhead is None else 0
        return self.prompt_lookup_num_tokens

    def repeatable(self) -> DecodeConfig:
        """The same settings, with drafts that do not depend on the speed of the machine."""
        return self if self.forward_overhead is not None else replace(self, forward_overhead=FIXED_OVERHEAD)


def modes_except(*others: Mode) -> tuple[Mode, ...]:
    return tuple(mode for mode in get_args(Mode) if mode not in others)


READ_BY: dict[str, tuple[Mode, ...]] = {
    "denoising_steps": modes_except("ar", "entropy", "lossless"),
    "confidence_threshold": ("threshold",),
    "entropy_bound": ("entropy",),
    "ar_accept_threshold": modes_except("ar", "lossless"),
    "forward_overhead": ("lossless",),
    "draft_sampling": ("lossless",),
    "prompt_lookup_num_tokens": ("lossless",),
}
"""The modes that read a setting; all read the others."""
OFF_AT_ZERO = ("ar_accept_threshold", "prompt_lookup_num_tokens")


def check_is_read(config: DecodeConfig, names: Iterable[str], *, is_sampled: bool | None = None) -> None:
    """ValueError for a setting among `names` that has no effect in the mode. Its default, or 0 where that
    turns it off, is none. `is_sampled`: whether tokens are drawn; None: as the temperature says.
    """
    for name in names:
        value, modes = getattr(config, name), READ_BY.get(name, (config.mode,))
        is_neutral = value == getattr(DecodeConfig(), name) or (name in OFF_AT_ZERO and not value)
        if is_neutral:
            continue
        shown = f"{value:g}" if isinstance(value, float) else value
        if config.mode not in modes:
            raise ValueError(
                f"{name} ({shown}) has no effect with `mode={config.mode}`: leave it out, or use "
                f"`mode={modes[0]}`."
            )
        if name == "draft_sampling" and not (config.temperature if is_sampled is None else is_sampled):
            raise ValueError(
                f"{name} ({shown}) has no effect with `temperature=0`, which draws nothing: leave it out, or "
                "give a temperature."
            )


FIXED_OVERHEAD = 32.0
"""`forward_overhead` of reports and rollouts, whose numbers must not depend on the load of the machine."""
COPIED, MOST_COPIED = 20, 1000
"""`prompt_lookup_num_tokens`: what None means, and the largest."""
MOST = 10**9
"""Largest value of whole numbers."""
LIMITS = {
    "temperature": 100.0,
    "confidence_threshold": 1.0,
    "ar_accept_threshold": 1.0,
    "entropy_bound": math.inf,
    "forward_overhead": 1e12,
}
"""Largest value of the settings whose smallest value is 0."""
