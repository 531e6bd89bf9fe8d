"""Decoding speed of a converted checkpoint, relative to AR decoding of its AR model.

Greedy decoding of the same prompts. Every repeat runs all decoders in turn, so that other load affects them
equally, and the median over repeats counts. `transformers.generate` decodes left-padded batches in the given
order, each until its last row ends; `generate` and vLLM refill a batch when rows finish. vLLM decodes the
same AR model with at most a batch of rows; its start is not timed. Speculative decoding of transformers
(prompt lookup, a small assistant model) takes one prompt at a time. Tokens count up to the stop token.
`bench` measures a folder in detail, `retention` a few prompts of every report. Not here: accuracy
(`evaluate`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from opdlm.decoding.decode_config import COPIED, DecodeConfig, Mode
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout
from opdlm.errors import ConfigError
from opdlm.modeling.compiled import compiled_decoding
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.training.metrics import PhaseProgress
from opdlm.vllm.engine import VllmTeacher, start_ar_model

AR_NAME = "transformers.generate"
VLLM_NAME = "vllm"
NO_COPIES = ", no copies"
"""Ends the name of lossless decoding whose drafts are the student's alone."""
COMPILED = ", compiled"
"""Ends the name of a mode with a compiled forward."""
AR_DECODERS = (AR_NAME, VLLM_NAME, "ar", "ar" + COMPILED)
"""All that decode the AR model token by token."""
LOOKUP_NAME, ASSISTED_NAME = "prompt lookup", "assisted generation"
LOOKUP_TOKENS = (10, COPIED)
"""Lengths of the drafts of prompt lookup: the value in the documentation of transformers, and ours."""
Responses = list[tuple[int, ...]]
Prompts = Sequence[Sequence[int]]
Decoder = Callable[[Prompts], tuple[Responses, float | None]]
"""Decodes prompts. Returns the responses, and tokens per forward (None if it does not count them)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Speed of one decoder at one batch size."""

    name: str
    batch_size: int
    tokens_per_second: float
    speedup: float
    """Relative to `transformers.generate` at the same batch size: median of the ratios in each repeat."""
    over_fastest_ar: float
    """The same relative to the fastest of the AR decoders that were measured (`AR_DECODERS`)."""
    tokens_per_forward: float | None
    identical: float
    """Share of responses equal to those of `transformers.generate`."""
    seconds: tuple[float, ...]
    """Of each repeat."""


def hf_responses(
    ar_model: PreTrainedModel,
    model: DiffusionLM,
    prompts: Prompts,
    config: DecodeConfig,
    **options: Any,
) -> Responses:
    """Greedy responses of the AR model by `transformers.generate`, up to and including the stop token.
    `options` are passed on to it.
    """
    found: Responses = []
    for first in range(0, len(prompts), config.batch_size):
        batch = prompts[first : first + config.batch_size]
        width = max(len(ids) for ids in batch)
        ids_BP = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in batch], device=model.device)
        kept_BP = torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=model.device
        )
        output: Any = ar_model.generate(  # type: ignore[operator]
            ids_BP,
            attention_mask=kept_BP,
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            suppress_tokens=list(model.spec.banned_token_ids),
            eos_token_id=list(model.spec.stop_token_ids),
            pad_token_id=0,
            **options,
        )
        found += [cut_after_stop(row, model.spec.stop_token_ids) for row in output[:, width:].tolist()]
    return found


def cut_after_stop(ids: Sequence[int], stops: Sequence[int]) -> tuple[int, ...]:
    """The ids up to and including the first stop token."""
    end = next((index + 1 for index, token in enumerate(ids) if token in stops), len(ids))
    return tuple(ids[:end])


def measure_speed(
    model: DiffusionLM,
    ar_model: PreTrainedModel,
    prompts: Prompts,
    modes: Sequence[Mode],
    batch_sizes: Sequence[int],
    *,
    config: DecodeConfig,
    repeats: int,
    compiles: bool = False,
    vllm_folder: str | None = None,
    speculative: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    on_row: Callable[[Speed], None] = lambda _: None,
    console: Console | None = None,
) -> list[Speed]:
    """One row per batch size and decoder, `transformers.generate` first.

    Mode, batch size and sampling of `config` are replaced. `compiles` adds every mode with a compiled
    forward, `vllm_folder` adds vLLM, `speculative` adds speculative decoders of transformers at batch size 1:
    the options of `generate` by name. `on_row` is called with each row, `console` shows the progress.
    ConfigError if vLLM cannot run the folder.
    """
    use_flash_attn(ar_model)
    rows = []
    for batch_size in batch_sizes:
        plain = replace(
            config, batch_size=batch_size, temperature=0.0, top_k=None, top_p=None, logprobs=False
        )
        with running_vllm(vllm_folder, model, prompts, plain) as vllm:
            decoders = make_decoders(model, ar_model, modes, plain, compiles, vllm)
            if batch_size == 1:
                for name, options in speculative.items():
                    decoders[name] = partial(speculate, ar_model, model, plain, options)
            found = time_decoders(decoders, prompts, batch_size, repeats, console)
        for row in found:
            on_row(row)
        rows += found
    return rows


def use_flash_attn(ar_model: PreTrainedModel) -> None:
    """The baseline attends with the package flash-attn where it is installed and can: half precision on CUDA.
    Not yet run on a GPU.
    """
    is_half = ar_model.dtype in (torch.float16, torch.bfloat16)
    if ar_model.device.type == "cuda" and is_half and is_flash_attn_2_available():
        ar_model.set_attn_implementation("flash_attention_2")


@contextmanager
def running_vllm(
    folder: str | None, model: DiffusionLM, prompts: Prompts, config: DecodeConfig
) -> Iterator[VllmTeacher | None]:
    """vLLM with the AR model of the folder and at most `batch_size` rows; None without a folder."""
    if folder is None:
        yield None
        return
    try:
        engine = start_ar_model(folder, model, prompts, config)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"vLLM cannot run {folder} ({reason}): leave it out with --vllm never.") from error
    try:
        yield engine
    finally:
        engine.close()


def make_decoders(
    model: DiffusionLM,
    ar_model: PreTrainedModel,
    modes: Sequence[Mode],
    plain: DecodeConfig,
    compiles: bool,
    vllm: VllmTeacher | None,
) -> dict[str, Decoder]:
    """Decoders by name."""

    def of(rollouts: list[Rollout]) -> tuple[Responses, float | None]:
        return [rollout.text_ids for rollout in rollouts], DecodeStats.of(rollouts).tokens_per_forward

    def decode(prompts: Prompts, config: DecodeConfig, is_compiled: bool) -> tuple[Responses, float | None]:
        with compiled_decoding(model, is_compiled):
            return of(generate(model, prompts, config))

    decoders: dict[str, Decoder] = {
        AR_NAME: lambda prompts: (hf_responses(ar_model, model, prompts, plain), 1.0)
    }
    if vllm is not None:
        decoders[VLLM_NAME] = lambda prompts: of(vllm.responses(prompts, plain, range(len(prompts))))
    named: dict[str, DecodeConfig] = {mode: replace(plain, mode=mode) for mode in modes}
    if "lossless" in named and named["lossless"].lookup_length > 0:
        named["lossless" + NO_COPIES] = replace(named["lossless"], prompt_lookup_num_tokens=0)
    for name, config in named.items():
        decoders[name] = partial(decode, config=config, is_compiled=False)
        if compiles:
            decoders[name + COMPILED] = partial(decode, config=config, is_compiled=True)
    return decoders


def speculate(
    ar_model: PreTrainedModel,
    model: DiffusionLM,
    plain: DecodeConfig,
    options: Mapping[str, Any],
    prompts: Prompts,
) -> tuple[Responses, float | None]:
    """Speculative decoding of transformers. Forwards of the AR model count, those of an assistant do not."""
    num_forwards = [0]

    def count(*_: Any) -> None:
        num_forwards[0] += 1

    with ar_model.register_forward_pre_hook(count):
        found = hf_responses(ar_model, model, prompts, plain, **options)
    return found, sum(map(len, found)) / num_forwards[0]


def time_decoders(
    decoders: Mapping[str, Decoder],
    prompts: Prompts,
    batch_size: int,
    repeats: int,
    console: Console | None = None,
) -> list[Speed]:
    """Run every decoder once per repeat, in turn, after a first call, which allocates and compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    responses: dict[str, Responses] = {}
    per_forward: dict[str, float | None] = {}
    verb, num_runs = f"time decoding, batch {batch_size}", (1 + repeats) * len(decoders)
    with PhaseProgress(verb, num_runs, console) as progress:
        for name, decode in decoders.items():
            decode(prompts[: batch_size + 1 if name.endswith(COMPILED) else 1])
            progress.advance(1, name)
        for _ in range(repeats):
            for name, decode in decoders.items():
                started = time.perf_counter()
                responses[name], per_forward[name] = decode(prompts)
                seconds[name].append(time.perf_counter() - started)
                progress.advance(1, name)
    num_tokens = {name: sum(map(len, found)) for name, found in responses.items()}
    rates = {name: [num_tokens[name] / one for one in times] for name, times in seconds.items()}
    return [
        summarise(name, batch_size, rates, seconds[name], responses, per_forward[name]) for name in decoders
    ]


def summarise(
    name: str,
    batch_size: int,
    rates: Mapping[str, Sequence[float]],
    seconds: Sequence[float],
    responses: Mapping[str, Responses],
    tokens_per_forward: float | None,
) -> Speed:
    """The row of one decoder; `rates`: tokens per second of all, in each repeat."""

    def ratio_to(other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))

    same = [a == b for a, b in zip(responses[name], responses[AR_NAME], strict=True)]
    fastest = max(AR_DECODERS, key=lambda other: statistics.median(rates.get(other, [0.0])))
    return Speed(
        name=name,
        batch_size=batch_size,
        tokens_per_second=statistics.median(rates[name]),
        speedup=ratio_to(AR_NAME),
        over_fastest_ar=ratio_to(fastest),
        tokens_per_forward=tokens_per_forward,
        identical=sum(same) / len(same),
        seconds=tuple(seconds),
    )
