"""Where the rollouts of a training step come from: a file, the student as it is now, a copy of it at work
while the step before trains, or vLLM.

Every rank decodes its share of a step's prompts and then holds the rollouts of all. Random draws belong to a
prompt, so the number of ranks changes no rollout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from accelerate import Accelerator, PartialState
from torch import nn

from opdlm.config.schedules import block_size_at, is_from_teacher
from opdlm.config.sections import Config, RolloutSection
from opdlm.data.prompts import PromptStream
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.generate import OnStep, generate
from opdlm.decoding.rollout import Prompt, Rollout
from opdlm.distill.async_student import AsyncStudent
from opdlm.errors import ConfigError
from opdlm.modeling.compiled import compiled_decoding
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.seeds import seed_of
from opdlm.training.deepspeed import zero_stage
from opdlm.training.devices import gather_items, gathered_weights, launch_shards
from opdlm.vllm.engine import (
    VllmStudent,
    VllmTeacher,
    check_student,
    check_vllm,
    start_student,
    start_teacher,
)


def length_cap(section: RolloutSection, step: int, block_size: int) -> int:
    """Response tokens allowed in rollout step `step` (counted from 1), a multiple of the block size while it
    grows.
    """
    if section.start_new_tokens is None or step >= section.ramp_steps:
        return section.decode.max_new_tokens
    progress = step / section.ramp_steps
    share = 1 - math.cos(math.pi / 2 * progress) if section.ramp == "cosine" else progress
    length = section.start_new_tokens + share * (section.decode.max_new_tokens - section.start_new_tokens)
    return max(block_size, round(length / block_size) * block_size)


def decode_config(section: RolloutSection, max_new_tokens: int, *, from_teacher: bool) -> DecodeConfig:
    settings: dict[str, Any] = asdict(section.decode) | {"max_new_tokens": max_new_tokens}
    return DecodeConfig(**settings | ({"mode": "ar"} if from_teacher else {}))


def generate_rollouts(
    model: DiffusionLM,
    prompts: Sequence[Prompt],
    section: RolloutSection,
    *,
    step: int,
    seed: int,
    places: Sequence[int] | None = None,
    from_teacher: bool = False,
    vllm: VllmTeacher | VllmStudent | None = None,
    on_step: OnStep | None = None,
) -> list[Rollout]:
    """One response per prompt, in the order of the prompts. `step` counts from 1; `places` of the prompts in
    the step decide the random draws (None: they are the step's first). `vllm` generates, if given.
    """
    config = decode_config(
        section, length_cap(section, step, model.spec.block_size), from_teacher=from_teacher
    )
    places = range(len(prompts)) if places is None else places
    seeds = [seed_of(seed, step, place) for place in places]
    ids = [prompt.ids for prompt in prompts]
    match vllm:
        case VllmTeacher():
            return vllm.responses(ids, config, seeds)
        case VllmStudent():
            return vllm.rollouts(ids, config.max_new_tokens, seeds)
    with compiled_decoding(model, section.compile):
        return generate(model.teacher_decoder() if from_teacher else model, ids, config, seeds, on_step)


def check_launch(config: Config) -> None:
    """ConfigError if who is to generate cannot do so on the devices of this launch."""
    num_processes = PartialState().num_processes
    if config.rollout.engine == "vllm":
        check_vllm("rollout.engine (vllm)")
        if num_processes > 1:
            raise ConfigError(
                f"rollout.engine (vllm) runs on one device, and this run has {num_processes} processes: use "
                "rollout.engine=own."
            )
    if config.rollout.compile and (zero_stage() or launch_shards(num_processes)):
        raise ConfigError(
            "rollout.compile (true) reads whole weights, and this launch cuts them into pieces (FSDP2, "
            "ZeRO): launch with recipes/accelerate/ddp.yaml, or set rollout.compile=false."
        )
    if config.rollout.asynchronous and (zero_stage() or launch_shards(num_processes)):
        # a thread that generates must not wait for other ranks
        raise ConfigError(
            "rollout.asynchronous (true) copies what is trained on every device, and this launch cuts it "
            "into pieces (FSDP2, ZeRO), which ranks gather together: launch with "
            "recipes/accelerate/ddp.yaml, or set rollout.asynchronous=false."
        )


def check_source(student: DiffusionLM, prompts: Sequence[Prompt], config: Config) -> None:
    """ConfigError if vLLM is to run a student, or prompts, that it cannot."""
    if config.rollout.engine == "vllm" and not is_from_teacher(config, config.train.num_steps - 1):
        check_student(student, student_decoding(config), prompts)


def student_decoding(config: Config) -> DecodeConfig:
    return decode_config(config.rollout, config.rollout.decode.max_new_tokens, from_teacher=False)


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank decoded of a step's rollouts, by the place of their prompt in the step."""

    rollouts: dict[int, Rollout]
    seconds: float


@dataclass(frozen=True, slots=True)
class Ahead:
    """The rollouts that a thread generates for a later step; None where nobody does."""

    future: Future[Share] | None = None

    def check(self) -> None:
        """Raise what went wrong in the thread so far."""
        if self.future is not None and self.future.done():
            self.future.result()


@dataclass(slots=True, kw_only=True)
class RolloutSource:
    """Whoever generates in this run."""

    config: Config
    model: DiffusionLM
    loss: nn.Module
    """Holds the weights as the devices do."""
    accelerator: Accelerator
    prompts: PromptStream[Prompt]
    recorded: PromptStream[Rollout] | None = None
    """Rollouts of `rollout.path`: none is generated then."""
    vllm: VllmTeacher | VllmStudent | None = None
    copy: AsyncStudent | None = None
    tokens_per_second: float = 0.0
    """Of the newest rollouts: the tokens of all ranks over the seconds of this one."""

    def rollouts_of(self, step: int) -> list[Rollout]:
        """Of all the step's prompts, by the present weights, on every rank."""
        if self.recorded is not None:
            return self.recorded.at(step)
        self.use_vllm(step)
        with gathered_weights(self.loss):
            share = self.share_of(step, self.model)
        return self.gather(share)

    @contextmanager
    def ahead_of(self, step: int) -> Iterator[Ahead]:
        """With `rollout.asynchronous`: while the block changes the student, a copy of it as it is now
        generates the rollouts of `step`.
        """
        if not self.config.rollout.asynchronous or step == self.config.train.num_steps:
            yield Ahead()
            return
        self.copy = self.copy or AsyncStudent(self.model)
        self.copy.sync(self.model)
        block_size = block_size_at(self.config.format, step)
        self.copy.model.spec = replace(self.model.spec, block_size=block_size)
        with self.copy.run_in_thread(partial(self.share_of, step)) as future:
            yield Ahead(future)

    def share_of(self, step: int, model: DiffusionLM, on_step: OnStep | None = None) -> Share:
        """This rank decodes its share of the step's prompts."""
        started, prompts = time.perf_counter(), self.prompts.at(step)
        places = range(self.accelerator.process_index, len(prompts), self.accelerator.num_processes)
        rollouts = generate_rollouts(
            model,
            [prompts[i] for i in places],
            self.config.rollout,
            step=step + 1,
            seed=self.config.train.seed,
            places=places,
            from_teacher=is_from_teacher(self.config, step),
            vllm=self.vllm,
            on_step=on_step,
        )
        return Share(dict(zip(places, rollouts, strict=True)), time.perf_counter() - started)

    def gather(self, share: Share) -> list[Rollout]:
        """The shares of all ranks, in the order of the prompts."""
        rollouts = gather_items(self.accelerator, share.rollouts)
        self.tokens_per_second = DecodeStats.of(rollouts).num_tokens / share.seconds
        return rollouts

    def use_vllm(self, step: int) -> None:
        """With `rollout.engine=vllm`: the engine that generates in this step, with the student's present
        weights. Teacher and student, and students of two block sizes, are never there at once.
        """
        if self.config.rollout.engine != "vllm":
            return
        if is_from_teacher(self.config, step):
            if not isinstance(self.vllm, VllmTeacher):
                self.close()
                self.vllm = start_teacher(
                    self.config.model.path,
                    self.model.student.config,
                    self.model.spec,
                    trust_remote_code=self.config.model.trust_remote_code,
                    **self.vllm_size(),
                )
        elif isinstance(self.vllm, VllmStudent) and self.vllm.spec == self.model.spec:
            self.vllm.update(self.model)
        else:
            self.close()
            self.vllm = start_student(self.model, student_decoding(self.config), **self.vllm_size())

    def vllm_size(self) -> dict[str, Any]:
        """What an engine has to hold."""
        longest = max(len(prompt.ids) for prompt in self.prompts.prompts)
        return {
            "dtype": self.config.model.dtype,
            "max_rows": self.config.rollout.decode.batch_size,
            "max_tokens": longest + self.config.rollout.decode.max_new_tokens,
        }

    def close(self) -> None:
        """Stop vLLM, whose process group must not be the one that ending the training destroys."""
        if self.vllm is not None:
            self.vllm.close()
            self.vllm = None
