"""`opdlm bench`: the decoding speed of a folder in every mode and at several batch sizes.

Prints a table; writes bench.json and bench.png. Not here: how speed is measured (`speed`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from rich.console import Console

from opdlm.checkpoints.load import check_decode, check_fits, load, load_causal_lm
from opdlm.data.prompts import load_tasks
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.errors import ConfigError
from opdlm.evaluation.retention import eval_config, versions
from opdlm.evaluation.speed import Speed, measure_speed, spread
from opdlm.files import write_atomic
from opdlm.reporting.plots import plot_bars
from opdlm.reporting.tables import print_table, speed_table
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
    path = prompts or eval_config(folder, []).eval.path
    if not path:
        raise ConfigError("the run had no evaluation set: `prompts` must name a JSONL file.")
    tasks = load_tasks(path, tokenizer, model.spec.mask_token_id, limit=None)
    ids = spread([task.prompt.ids for task in tasks], limit)
    check_fits(model, ids, config.max_new_tokens, "max_new_tokens")
    ar_model = load_causal_lm(str(folder))
    ar_model.to(model.device)  # type: ignore[arg-type]
    rows = measure_speed(
        model,
        ar_model,
        ids,
        modes or default_modes(is_preserve),
        batch_sizes,
        config=config,
        repeats=repeats,
        compiles=compiles,
        vllm_folder=str(folder) if with_vllm else None,
        on_row=lambda row: console.print(
            f"batch {row.batch_size}: {row.name} {row.tokens_per_second:.0f} tokens/s", soft_wrap=True
        ),
    )
    print_table(speed_table([asdict(row) for row in rows]), console)
    if out is not None:
        settings: dict[str, Any] = {"prompts": len(ids), "file": path, "repeats": repeats}
        settings |= {"vllm": installed_version()} if with_vllm else {}
        write_speed(rows, out, settings | versions())
    return rows


def default_modes(is_preserve: bool) -> tuple[Mode, ...]:
    """All that the format has."""
    return ("ar", "lossless", "static", "threshold") if is_preserve else ("static", "threshold")


def write_speed(rows: Sequence[Speed], folder: Path, settings: dict[str, Any]) -> None:
    """Write `bench.json` and `bench.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "rows": [asdict(row) for row in rows]}
    write_atomic(folder / "bench.json", json.dumps(record, indent=2))
    names = list(dict.fromkeys(row.name for row in rows))
    groups = {
        f"batch {size}": [row.over_fastest_ar for row in rows if row.batch_size == size]
        for size in dict.fromkeys(row.batch_size for row in rows)
    }
    plot_bars(names, groups, "tokens per second, × the fastest AR decoding", folder / "bench.png")
