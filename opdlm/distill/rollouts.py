"""The source of a training step's rollouts: a file, the student, a copy of it that decodes while the previous
step trains, or vLLM.

Each rank decodes a part of the step's prompts; then all ranks gather all rollouts. Random draws belong to a
prompt, so rollouts do not depend on the number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from accelerate import Accelerator, PartialState
from torch import nn

from opdlm.config.schedules import block_size_at, is_from_teacher, length_cap
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
from opdlm.training.devices import gather_items, gathered_weights, is_fsdp_launch
from opdlm.training.metrics import Doing, PhaseProgress
from opdlm.vllm.engine import (
    VllmStudent,
    VllmTeacher,
    check_student,
    check_vllm,
    start_student,
    start_teacher,
)


def rollout_decode_config(
    section: RolloutSection, max_new_tokens: int, *, from_teacher: bool
) -> DecodeConfig:
    """Settings of one step's decoding. The teacher decodes autoregressively, unless drafts are verified."""
    settings: dict[str, Any] = asdict(section.decode) | {"max_new_tokens": max_new_tokens}
    is_token_by_token = from_teacher and section.decode.mode != "lossless"
    return DecodeConfig(**settings | ({"mode": "ar"} if is_token_by_token else {})).repeatable()


def generate_rollouts(
    model: DiffusionLM,
    prompts: Sequence[Prompt],
    section: RolloutSection,
    *,
    step: int,
    seed: int,
    indices: Sequence[int] | None = None,
    from_teacher: bool = False,
    vllm: VllmTeacher | VllmStudent | None = None,
    on_step: OnStep | None = None,
) -> list[Rollout]:
    """One response per prompt, in the order of the prompts. `step` counts from 1. The random draws of a
    prompt depend on (seed, step, its index in the step); `indices` defaults to 0, 1, … `vllm` decodes, if
    given.
    """
    config = rollout_decode_config(
        section, length_cap(section, step, model.spec.block_size), from_teacher=from_teacher
    )
    indices = range(len(prompts)) if indices is None else indices
    seeds = [seed_of(seed, step, index) for index in indices]
    ids = [prompt.ids for prompt in prompts]
    match vllm:
        case VllmTeacher():
            return vllm.responses(ids, config, seeds)
        case VllmStudent():
            return vllm.rollouts(ids, config.max_new_tokens, seeds)
    with compiled_decoding(model, section.compile):
        return generate(
            model.teacher_decoder() if config.mode == "ar" else model, ids, config, seeds, on_step
        )


def check_launch(config: Config) -> None:
    """ConfigError if `rollout` has settings that cannot run on the devices of this launch."""
    num_processes = PartialState().num_processes
    if config.rollout.engine == "vllm":
        check_vllm("rollout.engine (vllm)")
        if num_processes > 1:
            raise ConfigError(
                f"rollout.engine (vllm) runs on one device, and this run has {num_processes} processes: use "
                "rollout.engine=own."
            )
    if config.rollout.compile and (zero_stage() or is_fsdp_launch(num_processes)):
        raise ConfigError(
            "rollout.compile (true) reads whole weights, and this launch shards them (FSDP2, ZeRO): launch "
            "with recipes/accelerate/ddp.yaml, or set rollout.compile=false."
        )
    if config.rollout.asynchronous and (zero_stage() or is_fsdp_launch(num_processes)):
        # a thread that decodes must not wait for other ranks
        raise ConfigError(
            "rollout.asynchronous (true) copies the trained weights on every device, and this launch shards "
            "them (FSDP2, ZeRO): launch with recipes/accelerate/ddp.yaml, or set rollout.asynchronous=false."
        )


def check_engine(student: DiffusionLM, prompts: Sequence[Prompt], config: Config) -> None:
    """ConfigError if `rollout.engine=vllm` cannot run this student or these prompts."""
    if config.rollout.engine == "vllm" and not is_from_teacher(config, config.train.num_steps - 1):
        check_student(student, student_decode_config(config), prompts)


def student_decode_config(config: Config) -> DecodeConfig:
    """Settings of the student's decoding at the final length."""
    return rollout_decode_config(config.rollout, config.rollout.decode.max_new_tokens, from_teacher=False)


@dataclass(frozen=True, slots=True)
class RankRollouts:
    """The rollouts of a step that one rank decoded, by the index of their prompt in the step."""

    rollouts: dict[int, Rollout]
    seconds: float


@dataclass(frozen=True, slots=True)
class PendingRollouts:
    """The rollouts of a later step that a thread is decoding; `future` is None without such a thread."""

    future: Future[RankRollouts] | None = None

    def raise_failure(self) -> None:
        """Raise the exception of the thread, if it has failed."""
        if self.future is not None and self.future.done():
            self.future.result()


@dataclass(slots=True, kw_only=True)
class RolloutSource:
    """Supplies the rollouts of every step of a run."""

    config: Config
    model: DiffusionLM
    loss: nn.Module
    """The wrapped loss, whose weights may be sharded."""
    accelerator: Accelerator
    prompts: PromptStream[Prompt]
    recorded: PromptStream[Rollout] | None = None
    """Rollouts of `rollout.path`, if it is set; none are decoded then."""
    vllm: VllmTeacher | VllmStudent | None = None
    async_student: AsyncStudent | None = None
    tokens_per_second: float = 0.0
    """Of the newest rollouts: tokens of all ranks divided by the seconds of this rank."""

    def rollouts_at(self, step: int, doing: Doing | None = None) -> list[Rollout]:
        """The rollouts of all prompts of step `step` (0-based) by the present weights, on every rank."""
        if self.recorded is not None:
            return self.recorded.at(step)
        self.prepare_vllm(step)
        num_prompts = len(self.prompts.at(step))
        with (
            gathered_weights(self.loss),
            PhaseProgress("write responses", num_prompts, None, doing) as progress,
        ):
            decoded = self.decode_share(step, self.model, progress.on_step)
        return self.gather(decoded)

    @contextmanager
    def decoding_ahead(self, step: int) -> Iterator[PendingRollouts]:
        """With `rollout.asynchronous`, a copy of the student with its present weights decodes the rollouts of
        `step` in a thread during the block, which may train the student.
        """
        if not self.config.rollout.asynchronous or step == self.config.train.num_steps:
            yield PendingRollouts()
            return
        self.async_student = self.async_student or AsyncStudent(self.model)
        self.async_student.sync(self.model)
        block_size = block_size_at(self.config.format, step)
        self.async_student.model.spec = replace(self.model.spec, block_size=block_size)
        with self.async_student.run_in_thread(partial(self.decode_share, step)) as future:
            yield PendingRollouts(future)

    def decode_share(self, step: int, model: DiffusionLM, on_step: OnStep | None = None) -> RankRollouts:
        """Decode this rank's share of the step's prompts."""
        started, prompts = time.perf_counter(), self.prompts.at(step)
        indices = range(self.accelerator.process_index, len(prompts), self.accelerator.num_processes)
        rollouts = generate_rollouts(
            model,
            [prompts[i] for i in indices],
            self.config.rollout,
            step=step + 1,
            seed=self.config.train.seed,
            indices=indices,
            from_teacher=is_from_teacher(self.config, step),
            vllm=self.vllm,
            on_step=on_step,
        )
        return RankRollouts(dict(zip(indices, rollouts, strict=True)), time.perf_counter() - started)

    def gather(self, decoded: RankRollouts) -> list[Rollout]:
        """The rollouts of all ranks, in the order of the prompts."""
        rollouts = gather_items(self.accelerator, decoded.rollouts)
        self.tokens_per_second = DecodeStats.of(rollouts).num_tokens / decoded.seconds
        return rollouts

    def prepare_vllm(self, step: int) -> None:
        """With `rollout.engine=vllm`, start the engine of this step or give it the student's present weights.
        At most one engine runs at a time.
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
                    **self.vllm_limits(),
                )
        elif isinstance(self.vllm, VllmStudent) and self.vllm.spec == self.model.spec:
            self.vllm.update(self.model)
        else:
            self.close()
            self.vllm = start_student(self.model, student_decode_config(self.config), **self.vllm_limits())

    def vllm_limits(self) -> dict[str, Any]:
        """The dtype, rows and tokens that an engine must support."""
        longest = max(len(prompt.ids) for prompt in self.prompts.prompts)
        return {
            "dtype": self.config.model.dtype,
            "max_rows": self.config.rollout.decode.batch_size,
            "max_tokens": longest + self.config.rollout.decode.max_new_tokens,
        }

    def close(self) -> None:
        """Stop vLLM before the end of training destroys the process group."""
        if self.vllm is not None:
            self.vllm.close()
            self.vllm = None
