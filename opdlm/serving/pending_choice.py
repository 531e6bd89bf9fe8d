"""One response of a request while it is decoded: its job, and the events that the decoding thread sends.

Shape suffixes: L tokens, M some of them, K most likely tokens, H hidden.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any, TypeAlias

import torch

from opdlm.decoding.rollout import Rollout
from opdlm.decoding.streaming import StablePrefix
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.slots import Grid, clean_slots
from opdlm.serving.decode_thread import Job, RowStep

Ranking: TypeAlias = list[tuple[int, float]]
"""Token ids and their log-probabilities, the most likely first."""
CHUNK = 256
"""Positions whose logits are computed together for their most likely tokens."""
CONTEXT = 8
"""Tokens before a token with which it is decoded: some tokenizers write a space only after others."""
UNKNOWN = "·"
"""Stands for a token that is still [MASK]."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a stream may send after a step."""

    text: str
    """The text that is final so far."""
    drafts: dict[str, Any] | None
    """What `DraftTrace.after_step` returns, where the request asks for it."""


@dataclass(frozen=True, slots=True)
class PendingChoice:
    """A choice while it is decoded. Events: the progress after each step, then the rollout or an error."""

    job: Job
    stable_prefix: StablePrefix
    events: asyncio.Queue[Progress | Rollout | Exception]
    alternatives: list[Ranking]
    """Of each token of the response, where they are asked for."""
    echo: str
    """The prompt, where the answer repeats it."""
    awaited: Event
    """Set while a stream waits for progress."""

    async def rollout(self) -> Rollout:
        """The response of a job that is not streamed. Raises what decoding raises."""
        event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        assert isinstance(event, Rollout)
        return event


@torch.inference_mode()
def most_likely(model: DiffusionLM, rollout: Rollout, num: int) -> list[Ranking]:
    """The `num` most likely tokens of the AR model in place of each token of a response, by one forward."""
    num_prompt, ids_1L = len(rollout.prompt_ids), torch.tensor([rollout.prompt_ids + rollout.text_ids])
    lengths = torch.tensor([ids_1L.shape[1]]), torch.tensor([num_prompt])
    slots = clean_slots(ids_1L, *lengths, Grid(block_size=1), "preserve").to(model.device)
    hidden_LH, found = model.teacher_hidden(slots)[0], list[Ranking]()
    for first in range(num_prompt - 1, ids_1L.shape[1] - 1, CHUNK):
        some_MH = hidden_LH[first : min(first + CHUNK, ids_1L.shape[1] - 1)]
        is_clean_M = torch.ones(len(some_MH), dtype=torch.bool, device=model.device)
        best_MK = model.logits(some_MH, is_clean_M).log_softmax(-1).topk(num, -1)
        pairs = zip(best_MK.indices.tolist(), best_MK.values.tolist(), strict=True)
        found += [list(zip(ids, values, strict=True)) for ids, values in pairs]
    return found


def scored(
    put: Callable[[Rollout | Exception], None], model: DiffusionLM, num: int, found: list[Ranking]
) -> Callable[[Rollout | Exception], None]:
    """Adds the most likely tokens of a response to `found` before it is passed on."""

    def end(result: Rollout | Exception) -> None:
        if isinstance(result, Rollout):
            try:
                found.extend(most_likely(model, result, num))
            except Exception as error:  # of this request: the others go on
                result = error
        put(result)

    return end


def without_suffix(
    put: Callable[[Rollout | Exception], None], num_gap: int, suffix: tuple[int, ...]
) -> Callable[[Rollout | Exception], None]:
    """Passes on the tokens that fill a gap as the response, and what stands around it as the prompt."""

    def end(result: Rollout | Exception) -> None:
        if isinstance(result, Rollout):
            result = replace(
                result,
                prompt_ids=result.prompt_ids + suffix,
                response_ids=result.response_ids[:num_gap],
                unmask_step=result.unmask_step[:num_gap],
                logprobs=result.logprobs[:num_gap],
                num_response=num_gap,
            )
        put(result)

    return end


@dataclass(slots=True)
class DraftTrace:
    """Tells, step by step, what became of the tokens of one response."""

    prefix: StablePrefix
    num_final: int
    """Tokens of prompt and response that are final, and have been told so."""
    proposed: dict[int, int] = field(default_factory=dict)
    """The token that was shown last at each position that was not final."""

    def after_step(self, step: RowStep, rest: Sequence[int]) -> dict[str, Any]:
        """The tokens from the first that was not final before the step. `rest`: those that are not final now.

        `state` of a final token: `accepted` where it was proposed before, `corrected` where another one was,
        `added` where none was; of the others: `draft`, or `unknown`.
        """
        first, mask_id = self.num_final, self.prefix.spec.mask_token_id
        ids = [*step.tokens[first : step.num_final], *(step.draft or rest)][: self.prefix.shown.stop - first]
        stop_ids = self.prefix.stop_token_ids
        ids = ids[: next((n for n, token in enumerate(ids) if token in stop_ids), len(ids))]
        known = step.tokens[max(self.prefix.shown.start, first - CONTEXT) : first]
        shown, text = [], self.prefix.stops.text(known)
        for position, token in enumerate(ids, first):
            before = text.rstrip("\ufffd")  # an incomplete character, which the next token may complete
            if token != mask_id:
                known.append(token)
                text = self.prefix.stops.text(known)
            written = UNKNOWN if token == mask_id else text[len(before) :].rstrip("\ufffd")
            shown.append({"text": written, "state": self._state(position, token, step)})
        drafted = enumerate(ids, first)
        self.proposed = {i: token for i, token in drafted if i >= step.num_final and token != mask_id}
        self.num_final = max(first, step.num_final)
        offset = first - self.prefix.shown.start
        return {"offset": offset, "tokens": shown, "num_forwards": step.num_forwards}

    def _state(self, position: int, token: int, step: RowStep) -> str:
        if position >= step.num_final:
            return "unknown" if token == self.prefix.spec.mask_token_id else "draft"
        if position not in self.proposed:
            return "added"
        return "accepted" if self.proposed[position] == token else "corrected"


def progress_sender(
    prefix: StablePrefix, put: Callable[[Progress], None], awaited: Event, *, include_drafts: bool
) -> Callable[[RowStep], None]:
    """Sends what is known after a step; without drafts only where that is awaited, since a later text holds
    the earlier one: a client that does not read costs no time.
    """
    trace = DraftTrace(prefix, prefix.shown.start) if include_drafts else None

    def send(step: RowStep) -> None:
        if not (include_drafts or awaited.is_set()):
            return
        awaited.clear()
        text, rest = prefix.after_step(step.tokens, step.num_final)
        put(Progress(text, None if trace is None else trace.after_step(step, rest)))

    return send


def thread_safe(call: Callable[[Any], object], loop: asyncio.AbstractEventLoop) -> Callable[[Any], None]:
    """The same call for another thread; it has no effect once the event loop is closed."""

    def call_later(value: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(call, value)

    return call_later
