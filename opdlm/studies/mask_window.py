"""Study `mask_window`: the bound at t ~ U(0, 1) of models that were trained on narrow windows of mask rates.

The published claim is a U-shape over the midpoint of the window, with the minimum near t*, the rate of the
highest signal under the n-gram statistics of the same text. arXiv 2601.22450.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from pydantic.dataclasses import dataclass

from opdlm.checkpoints.load import load_tokenizer
from opdlm.config.sections import STRICT
from opdlm.data.documents import load_documents
from opdlm.objectives.mask_theory import ngram_signal_weights, optimal_t
from opdlm.reporting.plots import DPI, new_figure
from opdlm.reporting.tables import NOTHING, Table
from opdlm.studies.claims import (
    WORTH,
    Claim,
    Findings,
    all_of,
    claim_by_regime,
    common_seeds,
    difference_claim,
    differences,
    interval_rule,
    is_below,
    is_within,
    means,
    over_seeds,
)
from opdlm.studies.grid import Cell, Values, of_window
from opdlm.studies.text_runs import LOSS_NAMES, MD, final_loss, text_cell, text_config

Window = tuple[float, float]
EVERYTHING = (0.0, 1.0)
NEAR = 0.15
COUNTED_TOKENS = 400_000
"""Tokens of the text from which the n-gram statistics are counted."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class WindowGrid:
    windows: tuple[Window, ...] = (
        (0, 0.1),
        (0.15, 0.25),
        (0.3, 0.4),
        (0.45, 0.55),
        (0.6, 0.7),
        (0.75, 0.85),
        (0.9, 1),
    )
    """Ranges of t; (0, 1) is always added."""


def make_cells(grid: WindowGrid, base: Values, seeds: Sequence[int]) -> list[Cell]:
    windows = dict.fromkeys((*grid.windows, EVERYTHING))
    return [
        text_cell({"window": list(window), "seed": seed}, base, {"masking.windows": [list(window)]})
        for window, seed in itertools.product(windows, seeds)
    ]


def best_rate(records: Sequence[Values], out: Path) -> float:
    """t* of the training text of the runs."""
    config = text_config(records[0]["settings"]["config"], out / "data", out)
    tokenizer = load_tokenizer(config.model.path, needs_weights=False)
    tokens, left = list[Sequence[int]](), COUNTED_TOKENS
    for document in load_documents(config.data, tokenizer, -1):
        tokens.append(document.ids[:left])
        left -= len(tokens[-1])
        if left == 0:
            break
    return optimal_t(ngram_signal_weights(tokens))


def conclude(records: Sequence[Values], grid: WindowGrid, out: Path) -> Findings:
    t_star = best_rate(records, out)
    narrow = {window: of_window(records, window) for window in sorted(grid.windows, key=fmean)}
    narrow = {window: runs for window, runs in narrow.items() if runs}
    everything = of_window(records, EVERYTHING)
    return Findings(
        tables=[bound_table(narrow, everything, t_star)],
        claims=[
            u_shape(narrow),
            near_t_star(narrow, t_star),
            better_than_everything(narrow, everything, t_star),
        ],
    )


def bound_table(
    narrow: Mapping[Window, Mapping[int, Values]], everything: Mapping[int, Values], t_star: float
) -> Table:
    rows = [
        [
            f"[{window[0]:g}, {window[1]:g}]",
            f"{fmean(window):.2f}",
            *means(runs.values(), [final_loss(MD)]),
            NOTHING
            if window == EVERYTHING
            else str(over_seeds(differences(runs, everything, final_loss(MD)))),
        ]
        for window, runs in {**narrow, EVERYTHING: everything}.items()
    ]
    return Table(
        title="Bound on t ~ U(0, 1) by training window",
        head=["window", "midpoint", "MD bound", "minus that of [0, 1], same seeds"],
        rows=rows,
        note="Nats per byte on held-out text, mean ± half of the 95 % interval over seeds. "
        f"t* = {t_star:.3f} from the n-grams of the training text.",
    )


def mean_bound(runs: Mapping[int, Values]) -> float:
    return fmean(final_loss(MD)(run) for run in runs.values())


def u_shape(narrow: Mapping[Window, Mapping[int, Values]]) -> Claim:
    windows = list(narrow)
    inner = windows[1:-1]
    found = {}
    if inner:
        lowest = min(inner, key=lambda window: mean_bound(narrow[window]))
        for end in (windows[0], windows[-1]):
            gaps = differences(narrow[lowest], narrow[end], final_loss(MD))
            name = f"{fmean(lowest):.2f} against {fmean(end):.2f}"
            found[name] = is_below(gaps, worth=WORTH), over_seeds(gaps)
    return claim_by_regime(
        "The bound is U-shaped in the window's midpoint",
        "the lowest inner midpoint is below both outermost ones, paired differences: each "
        f"{interval_rule(WORTH)}",
        found,
        combined=all_of,
    )


def lowest_midpoint(points: Sequence[tuple[float, float]]) -> float:
    """Vertex of the parabola through the lowest (midpoint, bound) and its neighbours; at an end, the end."""
    place = min(range(len(points)), key=lambda i: points[i][1])
    if place in (0, len(points) - 1):
        return points[place][0]
    (a, fa), (b, fb), (c, fc) = points[place - 1 : place + 2]
    numerator = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
    return b - numerator / (2 * ((b - a) * (fb - fc) - (b - c) * (fb - fa)))


def near_t_star(narrow: Mapping[Window, Mapping[int, Values]], t_star: float) -> Claim:
    lowest = [
        lowest_midpoint([(fmean(window), final_loss(MD)(runs[seed])) for window, runs in narrow.items()])
        for seed in common_seeds(*narrow.values())
    ]
    return Claim(
        claim=f"The minimum is near t* = {t_star:.3f} from n-gram statistics",
        rule="vertex of the parabola through the lowest three midpoints of each seed: 95 % interval within "
        f"t* ± {NEAR}",
        verdict=is_within(lowest, t_star - NEAR, t_star + NEAR),
        evidence=f"minimum at {over_seeds(lowest)}",
    )


def better_than_everything(
    narrow: Mapping[Window, Mapping[int, Values]], everything: Mapping[int, Values], t_star: float
) -> Claim:
    """The window nearest to t* is compared, whatever its result."""
    window = min(narrow, key=lambda w: abs(fmean(w) - t_star), default=EVERYTHING)
    gaps = differences(narrow.get(window, {}), everything, final_loss(MD))
    claim = difference_claim(
        "A window around t* is better than U[0, 1]",
        "bound of the window nearest to t* minus that of [0, 1], same seeds",
        gaps,
    )
    return replace(claim, evidence=f"[{window[0]:g}, {window[1]:g}]: {claim.evidence}")


def draw(records: Sequence[Values], grid: WindowGrid, out: Path, path: Path) -> None:
    """Bound against midpoint with every seed as a point, and t*."""
    t_star = best_rate(records, out)
    figure, axes = new_figure(1, 7, 4.5)
    axis = axes[0][0]
    windows = [window for window in sorted(grid.windows, key=fmean) if of_window(records, window)]
    means = [mean_bound(of_window(records, window)) for window in windows]
    axis.plot([fmean(window) for window in windows], means, color="C0", label="narrow windows")
    for window in windows:
        for run in of_window(records, window).values():
            axis.plot(fmean(window), final_loss(MD)(run), ".", color="C0")
    whole = [final_loss(MD)(run) for run in of_window(records, EVERYTHING).values()]
    if whole:
        axis.axhspan(min(whole), max(whole), color="C1", alpha=0.3, label="[0, 1]")
    axis.axvline(t_star, color="black", linestyle="--", linewidth=0.8, label=f"t* = {t_star:.3f}")
    axis.set_xlabel("midpoint of the training window")
    axis.set_ylabel(f"{LOSS_NAMES[MD]}, t ~ U(0, 1)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)
