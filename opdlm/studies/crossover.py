"""Study `crossover`: the epoch at which masked diffusion overtakes AR on repeated data, by U and model size.

Masked diffusion (same position) and AR train for the same number of steps on U unique tokens. Controls are
AR with masked inputs, dropout or strong weight decay. The diffusion loss is a bound, so that a measured
crossover is late rather than early. arXiv 2511.03276, 2507.15857.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from opdlm.config.sections import STRICT
from opdlm.errors import ConfigError
from opdlm.objectives.mask_theory import crossover
from opdlm.reporting.plots import DPI, new_figure
from opdlm.reporting.tables import NOTHING, Table
from opdlm.studies.claims import (
    LIKELY_RULE,
    WORTH,
    Claim,
    Findings,
    Verdict,
    all_of,
    claim_by_regime,
    common_seeds,
    interval_rule,
    is_below,
    is_sooner,
    means,
    over_seeds,
    quantile,
)
from opdlm.studies.grid import Cell, Values, chosen
from opdlm.studies.text_runs import AR, MD, best_loss, check_curves, final_loss, text_cell

CONTROLS: dict[str, dict[str, Any]] = {
    "input_masking": {"objective.input_masking": [0.0, 0.5]},
    "dropout": {"objective.dropout": 0.1},
    "weight_decay": {"optimizer.weight_decay": 0.5},
}
Control = Literal["input_masking", "dropout", "weight_decay"]
TURN = 0.05
"""A curve turns up if it rises by more nats than this from its minimum."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class CrossoverGrid:
    unique_tokens: tuple[int, ...] = (3200, 6400, 12800)
    """U: unique tokens of text."""
    sizes: tuple[tuple[int, int], ...] = ((2, 32), (2, 64))
    """Layers and width of the models, smallest first."""
    head_dim: int = 16
    """Width of an attention head, for all sizes."""
    controls: tuple[Control, ...] = ("input_masking", "dropout", "weight_decay")
    """Regularised AR runs at the largest size on `control_tokens`."""
    control_tokens: int = 6400
    """Unique tokens of the controls, one of `unique_tokens`."""


def check(grid: CrossoverGrid) -> None:
    if grid.controls and grid.control_tokens not in grid.unique_tokens:
        raise ConfigError(
            f"grid.control_tokens ({grid.control_tokens}) must be one of grid.unique_tokens "
            f"({', '.join(map(str, grid.unique_tokens))}): the controls are compared with those runs."
        )


def make_cells(grid: CrossoverGrid, base: Values, seeds: Sequence[int]) -> list[Cell]:
    check(grid)
    check_curves(base)
    runs = [
        (objective, unique, size)
        for unique, size, objective in itertools.product(grid.unique_tokens, grid.sizes, ("ar", "md"))
    ]
    runs += [(control, grid.control_tokens, grid.sizes[-1]) for control in grid.controls]
    return [one_cell(grid, *run, seed, base) for run, seed in itertools.product(runs, seeds)]


def one_cell(
    grid: CrossoverGrid, objective: str, unique: int, size: tuple[int, int], seed: int, base: Values
) -> Cell:
    layers, width = size
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": width // grid.head_dim,
        "num_key_value_heads": width // grid.head_dim,
        "head_dim": grid.head_dim,
    }
    changes: dict[str, Any] = {
        "objective.name": "masked_diffusion" if objective == "md" else "autoregressive",
        "data.unique_tokens": unique + 1,
        "model.shape": base.get("model", {}).get("shape", {}) | shape,
        **CONTROLS.get(objective, {}),
    }
    coordinates = {"objective": objective, "U": unique, "size": list(size), "seed": seed}
    return text_cell(coordinates, base, changes)


def runs_of(records: Sequence[Values], objective: str, unique: int, size: Sequence[int]) -> dict[int, Values]:
    return chosen(records, objective=objective, U=unique, size=list(size))


def crossing(ar: Values, md: Values) -> float:
    """Epoch from which the diffusion bound stays below the AR loss; infinite if there is none."""
    ar_curve, md_curve = ar["result"]["curve"], md["result"]["curve"]
    epochs = [point["epoch"] for point in md_curve]
    losses = [point[AR] for point in ar_curve], [point[MD] for point in md_curve]
    found = crossover(epochs, *losses, smoothing=3)
    return math.inf if found is None else found


def crossings(
    records: Sequence[Values], unique: int, size: Sequence[int], ar: str = "ar"
) -> dict[int, float]:
    """Crossover epoch by seed."""
    md_runs, ar_runs = runs_of(records, "md", unique, size), runs_of(records, ar, unique, size)
    return {seed: crossing(ar_runs[seed], md_runs[seed]) for seed in common_seeds(md_runs, ar_runs)}


def conclude(records: Sequence[Values], grid: CrossoverGrid, _: Path) -> Findings:
    return Findings(
        tables=[crossover_table(records, grid)],
        claims=[
            less_data_earlier(records, grid),
            larger_earlier(records, grid),
            turns_up(records, grid),
            controls_do_not_help(records, grid),
        ],
    )


def crossover_table(records: Sequence[Values], grid: CrossoverGrid) -> Table:
    kinds = [("ar", u, size) for u, size in itertools.product(grid.unique_tokens, grid.sizes)]
    kinds += [(control, grid.control_tokens, grid.sizes[-1]) for control in grid.controls]
    rows = []
    for ar, unique, size in kinds:
        ar_runs, md_runs = runs_of(records, ar, unique, size), runs_of(records, "md", unique, size)
        rows.append(
            [
                f"{unique:,}",
                f"{size[0]} × {size[1]}",
                ar.replace("_", " "),
                *means(ar_runs.values(), [final_loss(AR), best_loss(AR)]),
                *means(md_runs.values(), [final_loss(MD), best_loss(MD)]),
                shown(crossings(records, unique, size, ar)),
            ]
        )
    return Table(
        title="Loss at the end and crossover",
        head=[
            "U",
            "size",
            "against",
            "AR loss",
            "AR, best",
            "MD bound",
            "MD, best",
            "crossover epoch, by seed",
        ],
        rows=rows,
        note="Nats per byte on held-out text, mean ± half of the 95 % interval over seeds; the MD loss is a "
        "bound. Crossover: first epoch from which the smoothed diffusion curve stays better; – is never in "
        "this run.",
    )


def shown(epochs: Mapping[int, float]) -> str:
    return ", ".join(NOTHING if math.isinf(epoch) else f"{epoch:.1f}" for epoch in epochs.values()) or NOTHING


def earlier(claim: str, first_and_second: Mapping[str, tuple[dict[int, float], dict[int, float]]]) -> Claim:
    """Whether the first crosses at an earlier epoch than the second, in each regime."""
    return claim_by_regime(
        claim,
        f"in two of three seeds: {LIKELY_RULE}; never is later than any epoch, and where neither ever "
        "crosses there is nothing to compare",
        {
            name: is_sooner([(first[seed], second[seed]) for seed in common_seeds(first, second)])
            for name, (first, second) in first_and_second.items()
        },
        without="no crossing",
    )


def less_data_earlier(records: Sequence[Values], grid: CrossoverGrid) -> Claim:
    neighbours = itertools.product(grid.sizes, itertools.pairwise(sorted(grid.unique_tokens)))
    return earlier(
        "Less unique data crosses at an earlier epoch",
        {
            f"{size[0]} × {size[1]}, U {fewer:,} against {more:,}": (
                crossings(records, fewer, size),
                crossings(records, more, size),
            )
            for size, (fewer, more) in neighbours
        },
    )


def larger_earlier(records: Sequence[Values], grid: CrossoverGrid) -> Claim:
    neighbours = itertools.product(grid.unique_tokens, itertools.pairwise(grid.sizes))
    return earlier(
        "A larger model crosses at an earlier epoch",
        {
            f"U {unique:,}, {larger[0]} × {larger[1]} against {smaller[0]} × {smaller[1]}": (
                crossings(records, unique, larger),
                crossings(records, unique, smaller),
            )
            for unique, (smaller, larger) in neighbours
        },
    )


def rises(runs: Mapping[int, Values], loss: str) -> list[float]:
    """Nats from the minimum of each curve to its end."""
    return [final_loss(loss)(run) - best_loss(loss)(run) for run in runs.values()]


def turns_up(records: Sequence[Values], grid: CrossoverGrid) -> Claim:
    found = {}
    for unique, size in itertools.product(grid.unique_tokens, grid.sizes):
        ar = rises(runs_of(records, "ar", unique, size), AR)
        md = rises(runs_of(records, "md", unique, size), MD)
        verdict = all_of({"AR": is_below([TURN - rise for rise in ar]), "MD": is_below(md, TURN)})
        numbers = f"rise of AR {over_seeds(ar)}, of MD {over_seeds(md)}"
        found[f"U {unique:,}, {size[0]} × {size[1]}"] = verdict, numbers
    return claim_by_regime(
        "The AR validation loss turns up while the diffusion bound falls",
        f"rise from the lowest point to the end: AR above {TURN} nats and MD below it, 95 % intervals",
        found,
    )


def controls_do_not_help(records: Sequence[Values], grid: CrossoverGrid) -> Claim:
    md_runs = runs_of(records, "md", grid.control_tokens, grid.sizes[-1])
    found: dict[str, tuple[Verdict, object]] = {}
    for control in grid.controls:
        ar_runs = runs_of(records, control, grid.control_tokens, grid.sizes[-1])
        seeds = common_seeds(md_runs, ar_runs)
        gaps = [final_loss(MD)(md_runs[seed]) - final_loss(AR)(ar_runs[seed]) for seed in seeds]
        found[control] = is_below(gaps, worth=WORTH), over_seeds(gaps)
    return claim_by_regime(
        f"Diffusion ends below regularised AR too (U = {grid.control_tokens:,})",
        f"final MD bound minus final AR loss of the control, same seeds: {interval_rule(WORTH)}",
        found,
    )


def draw(records: Sequence[Values], grid: CrossoverGrid, _: Path, path: Path) -> None:
    """Validation curves against epochs, a panel per U and size, with the median crossover as a line."""
    figure, axes = new_figure(
        len(grid.unique_tokens), 4 * len(grid.unique_tokens), 3.2 * len(grid.sizes), len(grid.sizes)
    )
    for (row, size), (column, unique) in itertools.product(
        enumerate(grid.sizes), enumerate(grid.unique_tokens)
    ):
        axis = axes[row][column]
        kinds = {"ar": ("C0", AR), "md": ("C1", MD)}
        if unique == grid.control_tokens and size == grid.sizes[-1]:
            kinds |= {name: (f"C{2 + i}", AR) for i, name in enumerate(grid.controls)}
        for kind, (color, loss) in kinds.items():
            draw_runs(axis, runs_of(records, kind, unique, size), loss, color, kind.replace("_", " "))
        epoch = quantile(list(crossings(records, unique, size).values()) or [math.inf], 0.5)
        if math.isfinite(epoch):
            axis.axvline(epoch, color="black", linestyle="--", linewidth=0.8)
        axis.set_title(f"U = {unique:,}, {size[0]} layers of {size[1]}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        axis.set_xlabel("epoch")
    axes[0][0].set_ylabel("held-out nats per byte")
    figure.savefig(path, dpi=DPI)


def draw_runs(axis: Any, runs: Mapping[int, Values], loss: str, color: str, label: str) -> None:
    """Every seed as a thin line, the mean as a thick one."""
    curves = [run["result"]["curve"] for run in runs.values()]
    for curve in curves:
        axis.plot(
            [p["epoch"] for p in curve], [p[loss] for p in curve], color=color, linewidth=0.5, alpha=0.5
        )
    if curves:
        points = list(zip(*curves, strict=False))
        means = [fmean(p[loss] for p in point) for point in points]
        axis.plot([point[0]["epoch"] for point in points], means, color=color, label=label)
