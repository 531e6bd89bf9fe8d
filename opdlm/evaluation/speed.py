"""Decoding speed of a converted checkpoint, against `transformers.generate` on the AR model in its folder.

Greedy, the same prompts for everyone, variants interleaved within each repeat, so that a busy machine slows
them alike; the median over the repeats counts. `transformers.generate` gets left-padded batches in the
order given and runs each until its last row is done; ours and vLLM's refill as rows finish. vLLM decodes the
same AR model, at most a batch of rows at a time; starting it is not timed. Tokens count up to the stop token.
Not here: accuracy (`evaluate`).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout
from opdlm.errors import ConfigError
from opdlm.modeling.compiled import compiled_decoding
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.reporting.tables import Table, count, percent
from opdlm.vllm.engine import VllmTeacher, start_teacher

AR_NAME = "transformers.generate"
VLLM_NAME = "vllm"
Responses = list[tuple[int, ...]]
Way = Callable[[], tuple[Responses, float | None]]
"""Decodes all prompts: responses, and tokens per forward where they are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One way of decoding at one batch size."""

    name: str
    batch_size: int
    tokens_per_second: float
    speedup: float
    """Over `transformers.generate` at the same batch size: median of the ratios of each repeat."""
    tokens_per_forward: float | None
    identical: float
    """Share of responses equal to those of `transformers.generate`."""
    seconds: tuple[float, ...]


def hf_responses(
    ar_model: PreTrainedModel, model: DiffusionLM, prompts: Sequence[Sequence[int]], config: DecodeConfig
) -> Responses:
    """Greedy responses of the AR model by `transformers.generate`, cut after the stop token."""
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
        )
        found += [cut_after_stop(row, model.spec.stop_token_ids) for row in output[:, width:].tolist()]
    return found


def cut_after_stop(ids: Sequence[int], stops: Sequence[int]) -> tuple[int, ...]:
    end = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
    return tuple(ids[:end])


def measure_speed(
    model: DiffusionLM,
    ar_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    modes: Sequence[Mode],
    batch_sizes: Sequence[int],
    *,
    max_new_tokens: int,
    repeats: int,
    compiles: bool = False,
    vllm_folder: str | None = None,
    on_row: Callable[[Speed], None] = lambda _: None,
) -> list[Speed]:
    """One row per batch size and way of decoding, `transformers.generate` first; vLLM where a folder is given
    to it. `compiles`: every mode once more with a compiled forward.
    """
    rows = []
    for batch_size in batch_sizes:
        plain = DecodeConfig(max_new_tokens=max_new_tokens, batch_size=batch_size)
        with running_vllm(vllm_folder, model, prompts, plain) as vllm:
            ways = ways_to_decode(model, ar_model, prompts, modes, plain, compiles, vllm)
            rows += measure_ways(ways, batch_size, repeats, on_row)
    return rows


@contextmanager
def running_vllm(
    folder: str | None, model: DiffusionLM, prompts: Sequence[Sequence[int]], config: DecodeConfig
) -> Iterator[VllmTeacher | None]:
    """vLLM with the AR model of the folder, at most `batch_size` rows at a time."""
    if folder is None:
        yield None
        return
    try:
        engine = start_teacher(
            folder,
            model.student.config,
            model.spec,
            dtype="float32",
            max_rows=config.batch_size,
            max_tokens=max(len(ids) for ids in prompts) + config.max_new_tokens,
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"vLLM cannot run {folder} ({reason}): leave it out with --vllm never.") from error
    try:
        yield engine
    finally:
        engine.close()


def ways_to_decode(
    model: DiffusionLM,
    ar_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    modes: Sequence[Mode],
    plain: DecodeConfig,
    compiles: bool,
    vllm: VllmTeacher | None,
) -> dict[str, Way]:
    """Each has decoded a batch before it is timed: first calls pay for allocations and compilers."""

    def of(rollouts: list[Rollout]) -> tuple[Responses, float | None]:
        return [rollout.text_ids for rollout in rollouts], DecodeStats.of(rollouts).tokens_per_forward

    def decode(config: DecodeConfig, is_compiled: bool) -> tuple[Responses, float | None]:
        with compiled_decoding(model, is_compiled):
            return of(generate(model, prompts, config))

    ways: dict[str, Way] = {AR_NAME: lambda: (hf_responses(ar_model, model, prompts, plain), 1.0)}
    if vllm is not None:
        vllm.responses(prompts[:1], plain, [0])
        ways[VLLM_NAME] = lambda: of(vllm.responses(prompts, plain, range(len(prompts))))
    for mode in modes:
        config = replace(plain, mode=mode)
        ways[mode] = partial(decode, config, is_compiled=False)
        generate(model, prompts[:1], config)
        if compiles:
            ways[f"{mode}, compiled"] = partial(decode, config, is_compiled=True)
            with compiled_decoding(model):
                generate(model, prompts[: plain.batch_size + 1], config)
    return ways


def measure_ways(
    ways: dict[str, Way], batch_size: int, repeats: int, on_row: Callable[[Speed], None]
) -> list[Speed]:
    """Every way once per repeat, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    responses: dict[str, Responses] = {}
    per_forward: dict[str, float | None] = {}
    for _ in range(repeats):
        for name, decode in ways.items():
            started = time.perf_counter()
            responses[name], per_forward[name] = decode()
            seconds[name].append(time.perf_counter() - started)
    rows = []
    for name in ways:
        rows.append(summarise(name, batch_size, seconds, responses, per_forward[name]))
        on_row(rows[-1])
    return rows


def summarise(
    name: str,
    batch_size: int,
    seconds: dict[str, list[float]],
    responses: dict[str, Responses],
    tokens_per_forward: float | None,
) -> Speed:
    def rates(which: str) -> list[float]:
        return [sum(len(ids) for ids in responses[which]) / one for one in seconds[which]]

    same = [a == b for a, b in zip(responses[name], responses[AR_NAME], strict=True)]
    return Speed(
        name=name,
        batch_size=batch_size,
        tokens_per_second=statistics.median(rates(name)),
        speedup=statistics.median(a / b for a, b in zip(rates(name), rates(AR_NAME), strict=True)),
        tokens_per_forward=tokens_per_forward,
        identical=sum(same) / len(same),
        seconds=tuple(seconds[name]),
    )


def speed_table(rows: Sequence[Speed]) -> Table:
    """A row per way of decoding and batch size."""
    return Table(
        title="Decoding speed",
        head=["decoding", "batch", "tokens/s", "× AR", "tokens/forward", "= AR"],
        rows=[
            [
                row.name,
                str(row.batch_size),
                f"{row.tokens_per_second:.0f}",
                f"{row.speedup:.2f}",
                count(row.tokens_per_forward),
                percent(row.identical),
            ]
            for row in rows
        ],
        note="× AR: speed over `transformers.generate`. = AR: responses equal to those of "
        "`transformers.generate`.",
    )


def write_speed(rows: Sequence[Speed], folder: Path, settings: dict[str, Any]) -> None:
    """`bench.json` and `bench.png`."""
    from opdlm.reporting.plots import plot_bars

    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "rows": [asdict(row) for row in rows]}
    (folder / "bench.json").write_text(json.dumps(record, indent=2))
    names = list(dict.fromkeys(row.name for row in rows))
    groups = {
        f"batch {size}": [row.tokens_per_second for row in rows if row.batch_size == size]
        for size in dict.fromkeys(row.batch_size for row in rows)
    }
    plot_bars(names, groups, "tokens per second", folder / "bench.png")
