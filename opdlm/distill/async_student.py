"""A second student at work in a thread of its own while the first one trains.

Both read the same frozen tensors; only what is trained exists twice, and is written in place. The modules are
copies, because a module has state that a forward sets: adapters on or off, the gate, dropout. Nothing random
is shared: decoding draws from hashes of its seeds, never from torch's global generator.
On CUDA the thread launches its kernels in a stream of its own: not yet run on a GPU.
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
    """The same model with its own trained weights, for inference; frozen tensors are not copied."""
    from peft.tuners.lora import LoraLayer

    shared = [x for x in chain(model.parameters(), model.buffers()) if not x.requires_grad]
    twin = copy.deepcopy(model, {id(x): x for x in shared}).requires_grad_(False).eval()
    peft_model: Any = vars(twin).get("peft_model")
    if peft_model is not None:
        for layer in peft_model.modules():
            if isinstance(layer, LoraLayer):
                del vars(layer)["forward"]  # that of the original's gate, which runs the original's weights
        twin.gate.attach(adapted_layers(peft_model))
    return twin


class AsyncStudent:
    """A copy of the student that works beside it, with the weights of the last `follow`."""

    def __init__(self, model: DiffusionLM) -> None:
        self.model = copy_trained(model)
        self.stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    @torch.no_grad()
    def sync(self, model: DiffusionLM) -> None:
        """Take over the student's weights, in place."""
        own = dict(self.model.named_parameters())
        for name, weight in trainable_weights(model).items():
            own[name].copy_(weight)

    @contextmanager
    def run_in_thread(
        self, work: Callable[[DiffusionLM, Callable[..., None]], Result]
    ) -> Iterator[Future[Result]]:
        """`work(copy, check_cancelled)` runs in a thread while the block does; leaving the block waits for it. If
        the block fails, `check_cancelled(...)` raises in the thread, so that nobody waits long.
        """
        stopped = Event()

        def check_cancelled(*_: object) -> None:
            if stopped.is_set():
                raise CancelledError

        def run() -> Result:
            with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
                return work(self.model, check_cancelled)

        if self.stream is not None:  # not before the weights have been taken over
            self.stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with ThreadPoolExecutor(1, "rollouts") as executor:
            future = executor.submit(run)
            try:
                yield future
            except BaseException:
                stopped.set()
                raise
