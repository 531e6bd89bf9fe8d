"""What flows between rooms: token ids and small tensors, never text."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length"]

NEVER = 2**30  # unmask_step of a position that was still [MASK] when its row finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt as token ids; `index` is its place in the data set."""

    ids: tuple[int, ...]
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One generated response with its trajectory.

    `response_ids` and `unmask_step` cover whole blocks: past the stop token they hold what the sampler saw
    last ([MASK] with step NEVER where it had not revealed a token). `num_response` counts the tokens up to
    and including the stop token; only these are ever supervised or shown.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    unmask_step: tuple[int, ...]
    num_response: int
    finish_reason: FinishReason
    logprobs: tuple[float, ...] = ()
    """Of the `num_response` chosen tokens, where they were asked for."""
    num_forwards: int = 0
    """Forward passes that decoding took, prefill included; 0 where it was not this package's."""
    num_steps: int = 0
    """Denoising steps among them."""
    text: str = ""
    """The response as text, where `opdlm.generate` was given a tokenizer: without special tokens, cut before
    a stop string; with `infill` the filled prompt.
    """

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The response that counts: up to and including the stop token."""
        return self.response_ids[: self.num_response]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, but for tuples; an empty `text` is left out."""
        values = asdict(self)
        return values if self.text else {name: value for name, value in values.items() if name != "text"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rollout:
        """From what JSON made of `to_dict`; other keys are ignored, and `text` may be missing."""
        values = {"text": ""} | values
        known: dict[str, Any] = {
            name: tuple(values[name]) if isinstance(values[name], list) else values[name]
            for name in cls.__dataclass_fields__
        }
        return cls(**known)


def digest_of(sequences: Iterable[Sequence[int]]) -> str:
    """Short name of these token ids, to notice that they have changed."""
    found = hashlib.sha256()
    for ids in sequences:
        found.update(array("q", [len(ids), *ids]).tobytes())
    return found.hexdigest()[:16]
