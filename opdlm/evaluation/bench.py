"""`opdlm bench`: the decoding speed of a folder in every mode and at several batch sizes.

Prints a table; writes bench.json, bench.png and, where drafts are verified, acceptance.png. Not here: how
speed is measured (`speed`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from opdlm.checkpoints.load import check_decode, check_fits, load, load_causal_lm, load_tokenizer
from opdlm.data.prompts import load_tasks
from opdlm.data.rows import evenly_spaced
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.draft_policy import MOST_DRAFTS
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout
from opdlm.errors import ConfigError
from opdlm.evaluation.retention import recorded_eval, versions
from opdlm.evaluation.speed import ASSISTED_NAME, LOOKUP_NAME, LOOKUP_TOKENS, Speed, measure_speed
from opdlm.files import write_atomic
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.reporting.plots import plot_acceptance, plot_bars
from opdlm.reporting.tables import print_table, speed_table
from opdlm.training.metrics import PhaseProgress
from opdlm.vllm.engine import check_vllm, installed_version, is_tested_version


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
    assistant: str | None,
    out: Path | None,
    console: Console,
) -> list[Speed]:
    """Measure a converted folder and print the table; `opdlm.bench` documents the arguments."""
    if vllm == "always":
        check_vllm("`vllm=always`")
    with_vllm = vllm != "never" and is_tested_version(installed_version())
    model, tokenizer = load(folder, device=str(PartialState().device))
    if model.spec.format == "sdar" and {"ar", "lossless"} & set(modes):
        raise ConfigError("`modes` ar and lossless need a preserve checkpoint; this one is sdar.")
    modes = modes or default_modes(model.spec)
    for mode in modes:
        check_decode(replace(config, mode=mode), model.spec)
    run = recorded_eval(folder)
    path = prompts or run.eval.path
    if not path:
        raise ConfigError("the run had no evaluation set: `prompts` must name a JSONL file.")
    tasks = load_tasks(
        path,
        tokenizer,
        model.spec.mask_token_id,
        enable_thinking=run.data.enable_thinking,
        date=run.data.date,
        scoring="exact" if prompts else run.eval.scoring,
    )
    ids = evenly_spaced([task.prompt.ids for task in tasks], limit)
    check_fits(model, ids, config.max_new_tokens, "max_new_tokens")
    ar_model = load_causal_lm(str(folder))
    ar_model.to(model.device)  # type: ignore[arg-type]
    rows = measure_speed(
        model,
        ar_model,
        ids,
        modes,
        batch_sizes,
        config=config,
        repeats=repeats,
        compiles=compiles,
        vllm_folder=str(folder) if with_vllm else None,
        speculative=speculative_decoders(assistant, tokenizer, folder, model),
        on_row=lambda row: console.out(
            f"batch {row.batch_size}: {row.name} {row.tokens_per_second:.0f} tokens/s"
        ),
        console=console,
    )
    print_table(speed_table([asdict(row) for row in rows]), console)
    acceptance = []
    if "lossless" in modes:
        most = replace(
            config,
            mode="lossless",
            batch_size=max(batch_sizes),
            temperature=0.0,
            logprobs=False,
            forward_overhead=MOST_DRAFTS,
        )
        with PhaseProgress("measure acceptance", len(ids), console) as progress:
            rollouts = generate(model, ids, most, on_step=progress.on_step)
            progress.advance(len(ids))
        acceptance = acceptance_by_place(rollouts, model.spec.block_size - 1)
        shares = ", ".join(f"{100 * share:.0f}" for share in acceptance)
        console.out(f"Draft tokens accepted after those before them, by place in a full draft: {shares} %.")
    if out is not None:
        settings: dict[str, Any] = {"prompts": len(ids), "file": path, "repeats": repeats}
        settings |= {"vllm": installed_version()} if with_vllm else {}
        settings |= {"assistant": assistant} if assistant else {}
        write_speed(rows, acceptance, out, settings | versions())
    return rows


def speculative_decoders(
    assistant: str | None, tokenizer: PreTrainedTokenizerBase, folder: Path, model: DiffusionLM
) -> dict[str, dict[str, Any]]:
    """The options of `transformers.generate` for each of its speculative decoders."""
    decoders: dict[str, dict[str, Any]] = {
        f"{LOOKUP_NAME}, {length} tokens": {"prompt_lookup_num_tokens": length} for length in LOOKUP_TOKENS
    }
    if assistant is not None:
        if load_tokenizer(assistant).get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"`assistant` ({assistant}) has another tokenizer than {folder}: use one of its family."
            )
        small = load_causal_lm(assistant)
        small.to(model.device)  # type: ignore[arg-type]
        decoders[ASSISTED_NAME] = {"assistant_model": small}
    return decoders


def acceptance_by_place(rollouts: Iterable[Rollout], draft_length: int) -> list[float]:
    """How often the token at each place of a draft was accepted where those before it were. The rollouts are
    of lossless decoding with `MOST_DRAFTS`: every forward verified a draft of `draft_length` tokens.
    """
    lengths: Counter[int] = Counter()
    for rollout in rollouts:
        steps = rollout.unmask_step[: rollout.num_response]
        tokens = Counter(steps)
        # the first forward verifies nothing, and the last may be cut
        lengths.update(tokens[step] - 1 for step in range(2, steps[-1]))
    reached = [sum(n for length, n in lengths.items() if length >= k) for k in range(draft_length + 1)]
    return [after / max(before, 1) for before, after in pairwise(reached)]


def default_modes(spec: DiffusionSpec) -> tuple[Mode, ...]:
    """All that the student has."""
    verified: tuple[Mode, ...] = ("ar", "lossless") if spec.format == "preserve" else ()
    return (*verified, "static", "threshold") if spec.can_denoise else verified


def write_speed(
    rows: Sequence[Speed], acceptance: Sequence[float], folder: Path, settings: dict[str, Any]
) -> None:
    """Write `bench.json`, `bench.png` and, where drafts were verified, `acceptance.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "rows": [asdict(row) for row in rows], "acceptance": acceptance}
    write_atomic(folder / "bench.json", json.dumps(record, indent=2))
    names = list(dict.fromkeys(row.name for row in rows))
    ratios = {(row.batch_size, row.name): row.over_fastest_ar for row in rows}
    groups = {
        f"batch {size}": [ratios.get((size, name), math.nan) for name in names]
        for size in dict.fromkeys(row.batch_size for row in rows)
    }
    plot_bars(names, groups, "tokens per second, × the fastest AR decoding", folder / "bench.png")
    if acceptance:
        plot_acceptance(acceptance, folder / "acceptance.png")
