"""One response of a request while it is decoded: its job, and the events that the decoding thread sends.

Shape suffixes: L tokens, M some of them, K most likely tokens, H hidden.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from opdlm.decoding.rollout import Rollout
from opdlm.decoding.streaming import StablePrefix
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.slots import Grid, clean_slots
from opdlm.serving.decode_thread import Job

Ranking: TypeAlias = list[tuple[int, float]]
"""Token ids and their log-probabilities, the most likely first."""
CHUNK = 256
"""Positions whose logits are computed together for their most likely tokens."""


@dataclass(frozen=True, slots=True)
class PendingChoice:
    """A choice while it is decoded. Events: the text that is final so far, then the rollout or an error."""

    job: Job
    stable_prefix: StablePrefix
    events: asyncio.Queue[str | Rollout | Exception]
    alternatives: list[Ranking]
    """Of each token of the response, where they are asked for."""
    echo: str
    """The prompt, where the answer repeats it."""

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


def text_sender(stable_prefix: StablePrefix, put: Callable[[str], None]) -> Callable[[list[int]], None]:
    """Sends the text that is final after each step."""
    return lambda tokens: put(stable_prefix.after_step(tokens)[0])


def thread_safe(call: Callable[[Any], object], loop: asyncio.AbstractEventLoop) -> Callable[[Any], None]:
    """The same call for another thread; it has no effect once the event loop is closed."""

    def call_later(value: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(call, value)

    return call_later
