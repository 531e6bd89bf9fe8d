"""Decoding speed of a converted checkpoint, relative to `transformers.generate` on its AR model.

Greedy decoding of the same prompts. Every repeat runs all decoders in turn, so that other load affects them
equally, and the median over repeats counts. `transformers.generate` decodes left-padded batches in the given
order, each until its last row ends; `generate` and vLLM refill a batch when rows finish. vLLM decodes the
same AR model with at most a batch of rows; its start is not timed. Tokens count up to the stop token. Not
here: accuracy (`evaluate`).
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
from typing import Any, Literal

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedModel

from opdlm.checkpoints.load import check_decode, check_fits, load, load_causal_lm
from opdlm.data.prompts import load_tasks
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout
from opdlm.errors import ConfigError
from opdlm.evaluation.retention import read_config_of, versions
from opdlm.modeling.compiled import compiled_decoding
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.reporting.tables import Table, count, percent, print_table
from opdlm.vllm.engine import (
    VllmTeacher,
    check_vllm,
    installed_version,
    is_tested_version,
    start_ar_model,
)

AR_NAME = "transformers.generate"
VLLM_NAME = "vllm"
Responses = list[tuple[int, ...]]
Decoder = Callable[[], tuple[Responses, float | None]]
"""Decodes all prompts. Returns the responses, and tokens per forward (None if it does not count them)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Speed of one decoder at one batch size."""

    name: str
    batch_size: int
    tokens_per_second: float
    speedup: float
    """Relative to `transformers.generate` at the same batch size: median of the ratios in each repeat."""
    tokens_per_forward: float | None
    identical: float
    """Share of responses equal to those of `transformers.generate`."""
    seconds: tuple[float, ...]
    """Of each repeat."""


def hf_responses(
    ar_model: PreTrainedModel, model: DiffusionLM, prompts: Sequence[Sequence[int]], config: DecodeConfig
) -> Responses:
    """Greedy responses of the AR model by `transformers.generate`, up to and including the stop token."""
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
    """The ids up to and including the first stop token."""
    end = next((index + 1 for index, token in enumerate(ids) if token in stops), len(ids))
    return tuple(ids[:end])


def bench_folder(
    folder: Path,
    config: DecodeConfig,
    *,
    prompts: str | None,
    modes: Sequence[Mode],
    batch_sizes: Sequence[int],
    limit: int,
    repeats: int,
    compiles: bool,
    vllm: Literal["auto", "always", "never"],
    out: Path | None,
    console: Console,
) -> list[Speed]:
    """Measure a converted folder and print the table; `opdlm.bench` documents the arguments."""
    if vllm == "always":
        check_vllm("`vllm=always`")
    with_vllm = vllm != "never" and is_tested_version(installed_version())
    model, tokenizer = load(folder, device=str(PartialState().device))
    is_preserve = model.spec.format == "preserve"
    if not is_preserve and {"ar", "lossless"} & set(modes):
        raise ConfigError("`modes` ar and lossless need a preserve checkpoint; this one is sdar.")
    check_decode(config, model.spec)
    path = prompts or read_config_of(folder).eval.path
    if not path:
        raise ConfigError("the run had no evaluation set: `prompts` must name a JSONL file.")
    tasks = load_tasks(path, tokenizer, model.spec.mask_token_id, limit=None)
    ids = [task.prompt.ids for task in tasks][:: max(1, len(tasks) // limit)][:limit]
    check_fits(model, ids, config.max_new_tokens, "max_new_tokens")
    ar_model = load_causal_lm(str(folder), "float32")
    ar_model.to(model.device)  # type: ignore[arg-type]
    modes = modes or (("ar", "lossless", "static", "threshold") if is_preserve else ("static", "threshold"))
    greedy = replace(config, temperature=0.0, top_k=None, top_p=None, logprobs=False)
    rows = list[Speed]()
    for batch_size in batch_sizes:
        plain = replace(greedy, batch_size=batch_size)
        with running_vllm(str(folder) if with_vllm else None, model, ids, plain) as teacher:
            decoders = make_decoders(model, ar_model, ids, modes, plain, compiles, teacher)
            for row in time_decoders(decoders, batch_size, repeats):
                text = f"batch {batch_size}: {row.name} {row.tokens_per_second:.0f} tokens/s"
                console.print(text, soft_wrap=True)
                rows.append(row)
    print_table(speed_table(rows), console)
    if out is not None:
        settings: dict[str, Any] = {"prompts": len(ids), "file": path, "repeats": repeats}
        settings |= {"vllm": installed_version()} if with_vllm else {}
        write_speed(rows, out, settings | versions())
    return rows


@contextmanager
def running_vllm(
    folder: str | None, model: DiffusionLM, prompts: Sequence[Sequence[int]], config: DecodeConfig
) -> Iterator[VllmTeacher | None]:
    """vLLM with the AR model of the folder and at most `batch_size` rows; None without a folder."""
    if folder is None:
        yield None
        return
    try:
        engine = start_ar_model(folder, model, prompts, config, "float32")
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
    prompts: Sequence[Sequence[int]],
    modes: Sequence[Mode],
    plain: DecodeConfig,
    compiles: bool,
    vllm: VllmTeacher | None,
) -> dict[str, Decoder]:
    """Decoders by name, warmed up on a batch, since first calls allocate and compile."""

    def of(rollouts: list[Rollout]) -> tuple[Responses, float | None]:
        return [rollout.text_ids for rollout in rollouts], DecodeStats.of(rollouts).tokens_per_forward

    def decode(config: DecodeConfig, is_compiled: bool) -> tuple[Responses, float | None]:
        with compiled_decoding(model, is_compiled):
            return of(generate(model, prompts, config))

    decoders: dict[str, Decoder] = {AR_NAME: lambda: (hf_responses(ar_model, model, prompts, plain), 1.0)}
    if vllm is not None:
        vllm.responses(prompts[:1], plain, [0])
        decoders[VLLM_NAME] = lambda: of(vllm.responses(prompts, plain, range(len(prompts))))
    for mode in modes:
        config = replace(plain, mode=mode)
        decoders[mode] = partial(decode, config, is_compiled=False)
        generate(model, prompts[:1], config)
        if compiles:
            decoders[f"{mode}, compiled"] = partial(decode, config, is_compiled=True)
            with compiled_decoding(model):
                generate(model, prompts[: plain.batch_size + 1], config)
    return decoders


def time_decoders(decoders: dict[str, Decoder], batch_size: int, repeats: int) -> list[Speed]:
    """Run every decoder once per repeat, in turn; a row per decoder, `transformers.generate` first."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    responses: dict[str, Responses] = {}
    per_forward: dict[str, float | None] = {}
    for _ in range(repeats):
        for name, decode in decoders.items():
            started = time.perf_counter()
            responses[name], per_forward[name] = decode()
            seconds[name].append(time.perf_counter() - started)
    return [summarise(name, batch_size, seconds, responses, per_forward[name]) for name in decoders]


def summarise(
    name: str,
    batch_size: int,
    seconds: dict[str, list[float]],
    responses: dict[str, Responses],
    tokens_per_forward: float | None,
) -> Speed:
    """The row of one decoder from the times and responses of all."""

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
    """Write `bench.json` and `bench.png`."""
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
