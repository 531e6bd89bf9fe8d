"""A copy of the student that decodes in a thread while the student trains.

Both share the frozen tensors; the trained tensors exist twice, and `sync` overwrites the copy's in place. The
modules are copied as well, because a forward changes their state: adapters on or off, the gate, dropout. No
random state is shared, since decoding hashes its seeds instead of using torch's global generator.
On CUDA the thread launches its kernels in a stream of its own; this has not been run on a GPU yet.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import chain
from threading import Event
from typing import Any, TypeVar

import torch

from opdlm.checkpoints.lora import adapted_layers
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.training.checkpoint import trainable_weights

Result = TypeVar("Result")


def copy_trained(model: DiffusionLM) -> DiffusionLM:
    """A copy for inference with its own trained weights; frozen tensors are shared."""
    from peft.tuners.lora import LoraLayer

    shared = [x for x in chain(model.parameters(), model.buffers()) if not x.requires_grad]
    copied = copy.deepcopy(model, {id(x): x for x in shared}).requires_grad_(False).eval()
    peft_model: Any = vars(copied).get("peft_model")
    if peft_model is not None:
        for layer in peft_model.modules():
            if isinstance(layer, LoraLayer):
                del vars(layer)["forward"]  # the original's gate set it, and it reads the original's weights
        copied.gate.attach(adapted_layers(peft_model))
    return copied


class AsyncStudent:
    """A copy of the student, `model`, with the weights of the last `sync`, and a thread that runs it."""

    def __init__(self, model: DiffusionLM) -> None:
        self.model = copy_trained(model)
        self.stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    @torch.no_grad()
    def sync(self, model: DiffusionLM) -> None:
        """Copy the student's trained weights in place."""
        own = dict(self.model.named_parameters())
        for name, weight in trainable_weights(model).items():
            own[name].copy_(weight)

    @contextmanager
    def run_in_thread(
        self, work: Callable[[DiffusionLM, Callable[..., None]], Result]
    ) -> Iterator[Future[Result]]:
        """Run `work(copy, check_cancelled)` in a thread during the block; the end of the block waits for it.

        `work` calls `check_cancelled` regularly: it raises CancelledError once the block has failed.
        """
        cancelled = Event()

        def check_cancelled(*_: object) -> None:
            if cancelled.is_set():
                raise CancelledError

        def run() -> Result:
            with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
                return work(self.model, check_cancelled)

        if self.stream is not None:  # the copy of the weights must be complete
            self.stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with ThreadPoolExecutor(1, "rollouts") as executor:
            future = executor.submit(run)
            try:
                yield future
            except BaseException:
                cancelled.set()
                raise
