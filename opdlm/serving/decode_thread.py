"""One thread decodes all requests. A request joins while others run and leaves when it is complete.

All requests share the forward passes; each has its own temperature, filters, seed, stop strings and length.
A free row goes to the waiting request that holds the fewest rows, of equal ones the oldest. The second and
further rows of all requests together are at most a third of the rows, less one: large requests leave rows for
others, and slow them down by a bounded factor, since each row makes a forward longer.
Results come back through callbacks, which run in this thread.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Lock, Thread

import torch
from torch import Tensor

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import LogitsProcessor, Request
from opdlm.decoding.draft_policy import rows_of_slots
from opdlm.decoding.generate import Decoder, FindEnd
from opdlm.decoding.rollout import Rollout
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.kv_cache import DecodeCache, PrefixCache

log = logging.getLogger(__name__)

PREFILL_SLOTS = {"cpu": 128}
"""Prompt tokens that join a step, by device. Longer prompts are computed in parts, between the steps."""
LONGEST_RETRY = 60
"""Seconds after which a client is told to come back at most."""


class QueueFull(Exception):
    """The jobs of a request do not fit into the queue now. `seconds`: when it is worth trying again."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStep:
    """One row after a step."""

    tokens: list[int]
    """Prompt and response, mask tokens where nothing is known."""
    num_final: int
    """How many of the tokens no later step can change."""
    draft: list[int]
    """`lossless`: the proposed tokens after the known ones."""
    num_forwards: int
    """Forward passes so far."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One response to decode."""

    ids: tuple[int, ...]
    seed: int
    config: DecodeConfig
    """What counts is told in `Request.config`."""
    find_end: FindEnd | None = None
    ignore_eos: bool = False
    logits_processor: LogitsProcessor | None = None
    on_step: Callable[[RowStep], None] | None = None
    """Called after every step."""
    on_end: Callable[[Rollout | Exception], None]
    """Receives the response, or the error that ended decoding."""
    cancelled: Event
    """Set when the response is no longer wanted: `on_end` is not called. Shared by the jobs of a request."""
    admitted: list[float] = field(default_factory=list)
    """When it got a row (`time.perf_counter`); empty before."""


class DecodeThread(Thread):
    """Decodes up to `num_rows` jobs at once. A daemon: it ends with the process."""

    def __init__(
        self, model: DiffusionLM, config: DecodeConfig, num_rows: int, max_length: int, max_waiting: int
    ) -> None:
        """`config`: what all jobs share. `max_length` bounds the tokens of prompt and response together,
        `max_waiting` the number of jobs that wait.
        """
        super().__init__(name="decoding", daemon=True)
        self.model, self.config, self.num_rows = model, config, num_rows
        self.max_length, self.max_waiting = max_length, max_waiting
        self.arrivals: SimpleQueue[deque[Job]] = SimpleQueue()
        self.waiting: deque[deque[Job]] = deque()
        """The jobs of each request."""
        self.running: dict[int, Job] = {}
        self.num_waiting = self.num_complete = 0
        self.busy_seconds = 0.0
        self.prefixes = PrefixCache(max(1, num_rows // 4) * max_length)
        """The memory of a quarter of the rows."""
        self._decoder: Decoder | None = None
        self._count = itertools.count()
        self._lock = Lock()

    @torch.inference_mode()
    def cache_bytes(self) -> int:
        """Memory of the keys and values of all rows, and of the texts that are kept for later turns."""
        small = DecodeCache(1, 2 * self.model.spec.block_size, self.model.device)
        self.model.packed_hidden(rows_of_slots(1, self.model.spec), 1, small)
        of_token = sum(buffer[0, 0].nbytes for pair in small.layers.values() for buffer in pair)
        cache = self._new_decoder().cache
        return of_token * (cache.num_rows * (cache.capacity + 1) + self.prefixes.max_tokens)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one request; called from other threads. QueueFull if they do not fit."""
        with self._lock:
            if self.num_waiting + len(jobs) > self.max_waiting:
                seconds = self.num_waiting * self.busy_seconds / max(1, self.num_complete)
                raise QueueFull(min(LONGEST_RETRY, max(1, math.ceil(seconds))))
            self.num_waiting += len(jobs)
        self.arrivals.put(deque(jobs))

    def run(self) -> None:
        try:
            while True:
                self._receive()
                self._advance()
        finally:  # whatever ends this thread: the clients wait for an answer
            unanswered = [*self.running.values(), *itertools.chain(*self.waiting)]
            while not self.arrivals.empty():
                unanswered += self.arrivals.get()
            for job in unanswered:
                job.on_end(RuntimeError("the decoding thread has ended"))

    def _advance(self) -> None:
        """One forward pass. Completed jobs receive their responses; an error goes to every running job."""
        started = time.perf_counter()
        try:
            decoder = self._admit()
            finished = decoder.step() if decoder.is_busy else {}
        except Exception as error:  # any error: the clients of the running jobs wait for an answer
            log.exception("decoding failed")
            failed = list(self.running.values()) or self._next_request()
            self._decoder, self.running = None, {}
            for job in failed:
                job.on_end(error)
            return
        self.busy_seconds += time.perf_counter() - started
        self.num_complete += len(finished)
        for index, rollout in finished.items():
            self.running.pop(index).on_end(rollout)

    def _receive(self) -> None:
        """Take the jobs that have arrived. Block while there is nothing to do."""
        while not (self.arrivals.empty() and (self.waiting or self.running)):
            self.waiting.append(self.arrivals.get())

    def _new_decoder(self) -> Decoder:
        num_slots = PREFILL_SLOTS.get(self.model.device.type, 1024)
        rows = (self.num_rows, self.max_length)
        return Decoder(self.model, self.config, *rows, self._on_step, num_slots, self.prefixes)

    def _admit(self) -> Decoder:
        """Drop cancelled jobs, and give the free rows to waiting jobs."""
        if self._decoder is None:
            self._decoder = self._new_decoder()
        decoder = self._decoder
        cancelled = [index for index, job in self.running.items() if job.cancelled.is_set()]
        if cancelled:
            decoder.drop(cancelled)
            self.running = {index: job for index, job in self.running.items() if index not in cancelled}
        unwanted = [jobs for jobs in self.waiting if jobs[0].cancelled.is_set()]
        if unwanted:
            self._leave_queue(sum(map(len, unwanted)))
            self.waiting = deque(jobs for jobs in self.waiting if not jobs[0].cancelled.is_set())
        while len(self.running) < self.num_rows and (job := self._next_job()) is not None:
            index = next(self._count)
            self.running[index] = job
            job.admitted.append(time.perf_counter())
            decoder.waiting.append(
                Request(index, job.ids, job.seed, job.config, job.ignore_eos, job.logits_processor)
            )
            if job.find_end is not None:
                decoder.find_end[index] = job.find_end
        return decoder

    def _next_job(self) -> Job | None:
        """A job of the request that holds the fewest rows; None if it may hold no more."""
        num_held = Counter(job.cancelled for job in self.running.values())
        jobs = min(self.waiting, key=lambda jobs: num_held[jobs[0].cancelled], default=None)
        if jobs is None:
            return None
        num_further = len(self.running) - len(num_held)
        if jobs[0].cancelled in num_held and num_further >= self.num_rows // 3 - 1:
            return None
        job = jobs.popleft()
        if not jobs:
            self.waiting.remove(jobs)
        self._leave_queue(1)
        return job

    def _next_request(self) -> Sequence[Job]:
        """The jobs of the request that has waited longest."""
        jobs = self.waiting.popleft()
        self._leave_queue(len(jobs))
        return jobs

    def _leave_queue(self, num_jobs: int) -> None:
        with self._lock:
            self.num_waiting -= num_jobs

    def _on_step(self, index_B: Tensor, tokens_BL: Tensor, revealed_BL: Tensor) -> None:
        assert self._decoder is not None
        state, mask_token_id = self._decoder.state, self.model.spec.mask_token_id
        for row, index in enumerate(index_B.tolist()):
            on_step = self.running[index].on_step
            if on_step is None:
                continue
            tokens = tokens_BL[row].tolist()
            on_step(
                RowStep(
                    tokens=tokens,
                    num_final=min(int(state.final_B[row]), tokens.index(mask_token_id)),
                    draft=state.draft_BD[row, : int(state.num_draft_B[row])].tolist(),
                    num_forwards=int(state.num_forwards_B[row]),
                )
            )
