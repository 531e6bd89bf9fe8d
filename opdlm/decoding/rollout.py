"""Prompts and rollouts: the records that packages exchange. They hold token ids, not text."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

FinishReason = Literal["stop", "length"]

NEVER = 2**30
"""`unmask_step` of a position that was still [MASK] when its row finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt as token ids."""

    ids: tuple[int, ...]
    index: int
    """Its index in the data set."""
    source: int = 0
    """The number of its source, where the data set has several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One generated response with its trajectory.

    `response_ids` and `unmask_step` cover whole blocks: after the stop token they hold the last state of the
    sampler, where unknown tokens are [MASK] with step NEVER. `num_response` counts the tokens up to and
    including the stop token; only these carry loss and are returned as text.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    unmask_step: tuple[int, ...]
    num_response: int
    finish_reason: FinishReason
    logprobs: tuple[float, ...] = ()
    """Log-probabilities (nats) of the `num_response` tokens with `DecodeConfig.logprobs`, else empty."""
    num_forwards: int = 0
    """Forward passes of the decoding, prefill included; 0 if another engine decoded."""
    num_steps: int = 0
    """Denoising steps of the decoding."""
    num_replaced: int = 0
    """Tokens of the response that the AR model put in place of the student's (`ar_accept_threshold`)."""
    text: str = ""
    """The response as text, where `opdlm.generate` was given a tokenizer: without special tokens, cut before
    a stop string; with `infill` the filled prompt.
    """

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The response up to and including the stop token."""
        return self.response_ids[: self.num_response]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that can be written as JSON, without an empty `text`."""
        values = asdict(self)
        return values if self.text else {name: value for name, value in values.items() if name != "text"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rollout:
        """The inverse of `to_dict`, also after JSON has turned tuples into lists. Other keys are ignored, and
        those that earlier versions did not write have their defaults.
        """
        known: dict[str, Any] = {
            name: tuple(values[name]) if isinstance(values[name], list) else values[name]
            for name in cls.__dataclass_fields__
            if name in values
        }
        return cls(**known)


def num_first_unknown(steps: Sequence[int]) -> int:
    """How many tokens were the first unknown one when they were revealed, from the steps that revealed them:
    those before which all had been revealed earlier. In `preserve` the AR model predicts them.
    """
    latest_before = accumulate(steps, max, initial=-1)
    return sum(step > latest for step, latest in zip(steps, latest_before, strict=False))


def digest_of(sequences: Iterable[Sequence[int]]) -> str:
    """First 16 hex digits of the SHA-256 of token id sequences; shows whether they have changed."""
    sha256 = hashlib.sha256()
    for ids in sequences:
        sha256.update(array("q", [len(ids), *ids]).tobytes())
    return sha256.hexdigest()[:16]
