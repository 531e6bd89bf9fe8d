"""Decoding speed of a converted checkpoint, against `transformers.generate` on the AR model in its folder.

Greedy, the same prompts for everyone, variants interleaved within each repeat, so that a busy machine slows
them alike; the median over the repeats counts. `transformers.generate` gets left-padded batches in the
order given and runs each until its last row is done; ours refills as rows finish. Tokens count up to the stop
token.
Not here: accuracy (`evaluate`).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from opdlm.diffusion import DiffusionLM
from opdlm.generate import DecodeConfig, Mode, generate

AR_NAME = "transformers.generate"
Responses = list[tuple[int, ...]]


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
    on_row: Callable[[Speed], None] = lambda _: None,
) -> list[Speed]:
    """One row per batch size and way of decoding, `transformers.generate` first."""
    rows = []
    for batch_size in batch_sizes:
        configs = {
            mode: DecodeConfig(mode=mode, max_new_tokens=max_new_tokens, batch_size=batch_size)
            for mode in modes
        }
        plain = DecodeConfig(max_new_tokens=max_new_tokens, batch_size=batch_size)
        seconds: dict[str, list[float]] = {AR_NAME: [], **{mode: [] for mode in modes}}
        responses: dict[str, Responses] = {}
        per_forward: dict[str, float | None] = {AR_NAME: 1.0}
        for mode in modes:  # first calls pay for allocations
            generate(model, prompts[:1], configs[mode])
        for _ in range(repeats):
            started = time.perf_counter()
            responses[AR_NAME] = hf_responses(ar_model, model, prompts, plain)
            seconds[AR_NAME].append(time.perf_counter() - started)
            for mode in modes:
                started = time.perf_counter()
                rollouts, stats = generate(model, prompts, configs[mode])
                seconds[mode].append(time.perf_counter() - started)
                responses[mode] = [rollout.text_ids for rollout in rollouts]
                per_forward[mode] = stats.tokens_per_forward
        for name in seconds:
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


def speed_table(rows: Sequence[Speed]) -> str:
    lines = ["| batch | decoding | tokens/s | × AR | tokens/forward | = AR |", "|---:|---|" + "---:|" * 4]
    for row in rows:
        per_forward = "–" if row.tokens_per_forward is None else f"{row.tokens_per_forward:.2f}"
        lines.append(
            f"| {row.batch_size} | {row.name} | {row.tokens_per_second:.0f} | {row.speedup:.2f} "
            f"| {per_forward} | {100 * row.identical:.1f} % |"
        )
    return "\n".join(lines)


def write_speed(rows: Sequence[Speed], folder: Path, settings: dict[str, Any]) -> None:
    """`bench.json` and `bench.png`."""
    from opdlm.plots import plot_bars

    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "rows": [asdict(row) for row in rows]}
    (folder / "bench.json").write_text(json.dumps(record, indent=2))
    names = list(dict.fromkeys(row.name for row in rows))
    groups = {
        f"batch {size}": [row.tokens_per_second for row in rows if row.batch_size == size]
        for size in dict.fromkeys(row.batch_size for row in rows)
    }
    plot_bars(names, groups, "tokens per second", folder / "bench.png")
