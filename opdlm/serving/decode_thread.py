"""One thread decodes all requests. A request joins while others run and leaves when it is complete.

Requests with equal settings share forward passes. A request with other settings waits until the requests
before it are complete, so none waits for ever. Results come back through callbacks, which run in this thread.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Thread

from torch import Tensor

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import Request
from opdlm.decoding.generate import Decoder, FindEnd
from opdlm.decoding.rollout import Rollout
from opdlm.modeling.diffusion_lm import DiffusionLM

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One response to decode."""

    ids: tuple[int, ...]
    seed: int
    max_new_tokens: int
    config: DecodeConfig
    find_end: FindEnd | None = None
    on_step: Callable[[list[int]], None] | None = None
    """Receives the row's tokens after every step, mask tokens where nothing is known."""
    on_end: Callable[[Rollout | Exception], None]
    """Receives the response, or the error that ended decoding."""
    cancelled: Event = field(default_factory=Event)
    """Set when the response is no longer wanted. `on_end` is not called then."""


class DecodeThread(Thread):
    """Decodes up to `num_rows` jobs at once. `max_length` bounds the tokens of prompt and response together.
    A daemon: it ends with the process.
    """

    def __init__(self, model: DiffusionLM, num_rows: int, max_length: int) -> None:
        super().__init__(name="decoding", daemon=True)
        self.model, self.num_rows, self.max_length = model, num_rows, max_length
        self.arrivals: SimpleQueue[Job] = SimpleQueue()
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}
        self._decoder: Decoder | None = None
        self._count = itertools.count()

    def run(self) -> None:
        while True:
            self._receive()
            self._advance()

    def _advance(self) -> None:
        """One forward pass. Completed jobs receive their responses; an error goes to every running job."""
        try:
            decoder = self._admit()
            finished = decoder.step() if decoder.is_busy else {}
        except Exception as error:  # any error: the clients of the running jobs wait for an answer
            log.exception("decoding failed")
            failed = list(self.running.values()) or [self.waiting.popleft()]
            self._decoder, self.running = None, {}
            for job in failed:
                job.on_end(error)
            return
        for index, rollout in finished.items():
            self.running.pop(index).on_end(rollout)

    def _receive(self) -> None:
        """Take the jobs that have arrived. Block while there is nothing to do."""
        while not (self.arrivals.empty() and (self.waiting or self.running)):
            self.waiting.append(self.arrivals.get())

    def _admit(self) -> Decoder:
        """Drop cancelled jobs and admit waiting jobs whose settings are those of the running ones."""
        if self._decoder is None or not (self.running or self.waiting[0].config == self._decoder.config):
            config = self.waiting[0].config
            self._decoder = Decoder(self.model, config, self.num_rows, self.max_length, self._on_step)
        decoder = self._decoder
        cancelled = [index for index, job in self.running.items() if job.cancelled.is_set()]
        if cancelled:
            decoder.drop(cancelled)
            self.running = {index: job for index, job in self.running.items() if index not in cancelled}
        while self.waiting and self.waiting[0].config == decoder.config:
            job, index = self.waiting.popleft(), next(self._count)
            if job.cancelled.is_set():
                continue
            self.running[index] = job
            decoder.waiting.append(Request(index, job.ids, job.seed, job.max_new_tokens))
            if job.find_end is not None:
                decoder.find_end[index] = job.find_end
        return decoder

    def _on_step(self, index_B: Tensor, tokens_BL: Tensor, revealed_BL: Tensor) -> None:
        for row, index in enumerate(index_B.tolist()):
            on_step = self.running[index].on_step
            if on_step is not None:
                on_step(tokens_BL[row].tolist())
