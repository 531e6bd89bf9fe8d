"""Study `conversion`: which settings convert a checkpoint better at the same budget.

Every variant converts the same checkpoint with a few other settings. It is compared with its baseline on the
same seeds, by the report at the end. With `run.eval.every` it is also compared by its learning curve: tokens
per forward after as many response tokens, and after as many minutes, as the shorter of both runs had.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass
from rich.console import Console

from opdlm.config.loader import apply_override, build_section
from opdlm.config.rules import check_config
from opdlm.config.sections import STRICT, Config
from opdlm.distill.pipeline import convert_checkpoint
from opdlm.errors import ConfigError
from opdlm.reporting.plots import DPI, new_figure
from opdlm.reporting.tables import NOTHING, Table
from opdlm.studies.claims import (
    WORTH,
    WORTH_ACCURACY,
    Claim,
    Findings,
    difference_claim,
    differences,
    over_seeds,
)
from opdlm.studies.grid import Cell, Values, chosen
from opdlm.training.metrics import read_metrics

COSTS = ("thousand tokens", "minutes")
"""What a learning curve is drawn over: response tokens, and processor time of training (a cell has one
thread), which other work on the machine changes less than the time of the clock."""
Measure = Callable[[Values], float]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ConversionGrid:
    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> changed settings as section.key=value. The first variant is the baseline of the others."""
    against: dict[str, str] = field(default_factory=dict)
    """Variant -> its baseline, where that is not the first variant."""

    def baseline(self, name: str) -> str:
        return self.against.get(name, next(iter(self.variants)))


def check(grid: ConversionGrid) -> None:
    if len(grid.variants) < 2:
        raise ConfigError("grid.variants needs at least two variants: the baseline and one to compare.")
    for name in itertools.chain.from_iterable(grid.against.items()):
        if name not in grid.variants:
            raise ConfigError(f"grid.against names {name}, which is none of grid.variants.")


def make_cells(grid: ConversionGrid, base: Values, seeds: Sequence[int]) -> list[Cell]:
    check(grid)
    cells = []
    for name, seed in itertools.product(grid.variants, seeds):
        values = copy.deepcopy(base)
        for override in (*grid.variants[name], f"train.seed={seed}"):
            apply_override(values, override)
        config = conversion_config(values, Path("run")).to_dict()
        del config["output_dir"]
        settings = {"variant": name, "seed": seed, "config": config}
        cells.append(Cell(name=f"{name}-seed{seed}", settings=settings))
    return cells


def conversion_config(values: Values, output_dir: Path) -> Config:
    config = build_section(Config, values | {"output_dir": str(output_dir)})
    check_config(config)
    return config


def run_cell(settings: Values, folder: Path) -> Values:
    """Convert. Returns the measures of every mode from the report of the folder, and the learning curve."""
    config = conversion_config(settings["config"], folder / "run")
    model_folder = convert_checkpoint(config, Console(highlight=False))
    report = json.loads((model_folder / "retention.json").read_text())
    results = json.loads((model_folder / "all_results.json").read_text())
    keys = ("accuracy", "common_prefix", "tokens_per_forward")
    modes = {row["name"]: {key: row[key] for key in keys} for row in report["student"]}
    curve = learning_curve(read_metrics(folder / "run" / "metrics.jsonl"), lossless="lossless" in modes)
    return {"modes": modes, "rollout_tokens": results["rollout_tokens"], "curve": curve}


def learning_curve(metrics: Sequence[Values], *, lossless: bool) -> list[Values]:
    """Costs and tokens per forward at every measurement of a run; none if `eval.every` was 0."""
    key = f"tokens_per_forward_{'lossless' if lossless else 'threshold'}"
    seconds = itertools.accumulate(row["cpu_seconds"] for row in metrics)
    return [
        {COSTS[0]: row["rollout_tokens"] / 1000, COSTS[1]: spent / 60, "tokens per forward": row[key]}
        for row, spent in zip(metrics, seconds, strict=True)
        if key in row
    ]


def measure_of(mode: str, key: str) -> Measure:
    return lambda record: record["result"]["modes"][mode][key]


def measures(record: Values) -> dict[str, Measure]:
    """Accuracy and common prefix of modes but lossless, and tokens per forward of modes but static."""
    found = {}
    for mode, row in record["result"]["modes"].items():
        if mode != "lossless":
            found[f"{mode} accuracy"] = measure_of(mode, "accuracy")
            if "common_prefix" in row:
                found[f"{mode} common prefix"] = measure_of(mode, "common_prefix")
        if mode != "static":
            found[f"{mode} tokens per forward"] = measure_of(mode, "tokens_per_forward")
    return found


def common_measures(records: Sequence[Values]) -> dict[str, Measure]:
    """Those of modes that all runs were measured in."""
    found = [measures(record) for record in records]
    return {what: measure for what, measure in found[0].items() if all(what in other for other in found)}


def of_variant(records: Sequence[Values], name: str) -> dict[int, Values]:
    return chosen(records, variant=name)


def conclude(records: Sequence[Values], grid: ConversionGrid, _: Path) -> Findings:
    present = [name for name in grid.variants if of_variant(records, name)]
    pairs = [(name, grid.baseline(name)) for name in present if name != grid.baseline(name)]
    claims = []
    for name, other in pairs:
        runs, others = of_variant(records, name), of_variant(records, other)
        if others:
            known = common_measures([*runs.values(), *others.values()])
            claims += [is_better(records, name, other, what, measure) for what, measure in known.items()]
            claims += [
                learns_faster(runs, others, name, other, cost) for cost in COSTS if has_curves(records)
            ]
    return Findings(tables=[variant_table(records, grid, present)], claims=claims)


def has_curves(records: Sequence[Values]) -> bool:
    return all(record["result"].get("curve") for record in records)


def variant_table(records: Sequence[Values], grid: ConversionGrid, names: Sequence[str]) -> Table:
    columns: dict[str, Measure] = {}
    for record in records:
        columns |= measures(record)
    rows = []
    for name in names:
        runs = of_variant(records, name).values()
        known = measures(next(iter(runs)))
        values = {what: [columns[what](run) for run in runs] for what in known}
        shown = [str(over_seeds(values[what])) if what in known else NOTHING for what in columns]
        tokens = over_seeds([run["result"]["rollout_tokens"] / 1000 for run in runs])
        minutes = over_seeds([run["seconds"] / 60 for run in runs])
        changes = " ".join(grid.variants[name]) or NOTHING
        rows.append([name, changes, *shown, f"{tokens.mean:.0f} k", f"{minutes.mean:.1f}"])
    return Table(
        title="Conversion by variant",
        head=["variant", "changes", *columns, "rollout tokens", "core minutes"],
        rows=rows,
        note="Mean ± half of the 95 % interval over seeds.",
    )


def is_better(records: Sequence[Values], name: str, other: str, what: str, measure: Measure) -> Claim:
    gaps = differences(of_variant(records, other), of_variant(records, name), measure)
    worth = WORTH if what.endswith("tokens per forward") else WORTH_ACCURACY
    claim = f"{name} is better than {other} in {what}"
    return difference_claim(claim, "paired differences (baseline minus variant)", gaps, worth)


def learns_faster(
    runs: dict[int, Values], others: dict[int, Values], name: str, other: str, cost: str
) -> Claim:
    """That the runs have more tokens per forward than the others at the largest cost that all reached."""
    common = min(run["result"]["curve"][-1][cost] for run in (*runs.values(), *others.values()))
    gaps = differences(others, runs, lambda run: speed_at(run, cost, common))
    claim = f"{name} drafts better than {other} after {common:.1f} {cost}"
    return difference_claim(claim, "paired differences (baseline minus variant)", gaps)


def speed_at(record: Values, cost: str, value: float) -> float:
    """Tokens per forward at this cost, on a line between measurements."""
    return float(np.interp(value, *columns(record, cost)))


def columns(record: Values, cost: str) -> tuple[list[float], list[float]]:
    """A learning curve: costs, and tokens per forward."""
    curve = record["result"]["curve"]
    return [point[cost] for point in curve], [point["tokens per forward"] for point in curve]


def draw(records: Sequence[Values], grid: ConversionGrid, _: Path, path: Path) -> None:
    """A colour per variant: tokens per forward while training, where that was measured for all runs, else
    accuracy against tokens per forward at the end, of threshold decoding or a mode that all runs have.
    """
    costs = COSTS if has_curves(records) else ()
    modes = set.intersection(*({*record["result"]["modes"]} for record in records))
    mode = "threshold" if "threshold" in modes else min(modes, default="")
    figure, axes = new_figure(max(len(costs), 1), 9 if costs else 6.5, 4.5)
    for number, name in enumerate(grid.variants):
        runs = list(of_variant(records, name).values())
        for axis, cost in zip(axes[0], costs, strict=False):
            draw_curves(axis, runs, cost, f"C{number % 10}", name)
        if not costs and mode:
            xs = [measure_of(mode, "tokens_per_forward")(run) for run in runs]
            ys = [100 * measure_of(mode, "accuracy")(run) for run in runs]
            axes[0][0].plot(xs, ys, "o", color=f"C{number % 10}", label=name)
    for axis, label in zip(axes[0], costs or (f"tokens per forward, {mode}",), strict=True):
        axis.set_xlabel(label)
        axis.set_ylabel("tokens per forward" if costs else "accuracy, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=DPI)


def draw_curves(axis: Any, runs: Sequence[Values], cost: str, color: str, name: str) -> None:
    """The mean of the runs as a line, and each run thinly behind it."""
    curves = [columns(run, cost) for run in runs]
    for xs, ys in curves:
        axis.plot(xs, ys, color=color, alpha=0.25, linewidth=1)
    if curves:
        xs, ys = np.mean(curves, axis=0)
        axis.plot(xs, ys, "o-", color=color, markersize=3, label=name)
