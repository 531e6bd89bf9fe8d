"""Study `dual_repetition`: the best share α of autoregressive rows when text is repeated R times.

Every cell trains on the same number of tokens, of which one in R is unique. The loss is fitted by a Gaussian
process (Matérn 3/2) over log R and a logit of α, with the variance over seeds as noise. Draws from its
posterior give the optimum of α and its uncertainty. arXiv 2512.14549.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, mean, median, variance
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from opdlm.config.sections import STRICT
from opdlm.errors import require_package
from opdlm.objectives.mask_theory import alpha_rule
from opdlm.reporting.plots import DPI, new_figure
from opdlm.reporting.tables import NOTHING, Table
from opdlm.studies.claims import (
    LIKELY_RULE,
    WORTH,
    Claim,
    Findings,
    Verdict,
    claim_by_regime,
    common_seeds,
    differences,
    is_below,
    is_likely,
    is_within,
    means,
    over_seeds,
)
from opdlm.studies.grid import Cell, Values, chosen
from opdlm.studies.text_runs import (
    AR,
    LOSS_NAMES,
    MD,
    best_loss,
    check_curves,
    final_loss,
    prepare_text,
    text_cell,
    text_config,
)

HIGH = 32
"""From this R on the claim is α R = 16 at the optimum; up to half of it, α = 63/64."""
END = 1 / 64
"""ε: keeps the logit of α = 0 and of α = 1 finite."""
NUM_DRAWS = 2000
ALPHAS = np.linspace(0, 1, 257)
Draws = dict[tuple[float, str], NDArray[np.float64]]
"""Posterior draws of the best α by (R, loss)."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class DualGrid:
    repetitions: tuple[float, ...] = (8, 32, 128)
    """R, how often the text is repeated: unique tokens = all tokens / R."""
    alphas: tuple[float, ...] = (0, 0.125, 0.5, 0.984375, 1)
    """Shares of autoregressive rows."""


def prepare(_grid: DualGrid, _run: Values, out: Path) -> None:
    """Check the packages that the conclusion needs, and write the corpus."""
    require_package("sklearn", "study", "opdlm study dual_repetition")
    prepare_text(out)


def make_cells(grid: DualGrid, base: Values, seeds: Sequence[int]) -> list[Cell]:
    check_curves(base)
    config = text_config(base, Path("data"), Path("run"))
    num_tokens = config.train.num_steps * config.train.rows_per_update * config.data.sequence_length
    cells = []
    for repetitions, alpha, seed in itertools.product(grid.repetitions, grid.alphas, seeds):
        changes = {
            "objective.name": "dual",
            "objective.prediction": "next_position",
            "objective.ar_share": alpha,
            "data.unique_tokens": round(num_tokens / repetitions) + 1,
        }
        cells.append(text_cell({"R": repetitions, "alpha": alpha, "seed": seed}, base, changes))
    return cells


def conclude(records: Sequence[Values], grid: DualGrid, _: Path) -> Findings:
    draws = optimum_draws(records, grid)
    claims = [
        both_ends(records, grid),
        sixteen(draws),
        mostly_ar(draws),
        same_optimum(records, grid),
        early_stopping(records, grid),
    ]
    return Findings(
        tables=[loss_table(records, grid), optimum_table(draws)],
        claims=[claim for claim in claims if claim.evidence],  # claims that this grid can test
    )


def loss_table(records: Sequence[Values], grid: DualGrid) -> Table:
    rows = []
    for repetitions, alpha in itertools.product(grid.repetitions, grid.alphas):
        runs = chosen(records, R=repetitions, alpha=alpha).values()
        numbers = means(runs, [final_loss(AR), best_loss(AR), final_loss(MD), best_loss(MD)])
        rows.append([f"{repetitions:g}", f"{alpha:.4g}", f"{alpha * repetitions:.3g}", *numbers])
    return Table(
        title="Held-out loss at the end",
        head=["R", "α", "α R", "AR loss", "AR, best of the run", "MD bound", "MD, best of the run"],
        rows=rows,
        note="Nats per byte, mean ± half of the 95 % interval over seeds; the bound is on t ~ U(0, 1). At "
        "α = 0 the AR loss, and at α = 1 the MD bound, is that of a mode that was not trained.",
    )


def coordinates_of(repetitions: float, alphas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inputs of the Gaussian process `[N, 2]`: log R and log((α + ε) / (1 - α + ε))."""
    logit = np.log((alphas + END) / (1 - alphas + END))
    return np.stack([np.full_like(logit, math.log(repetitions)), logit], 1)


def optimum_draws(records: Sequence[Values], grid: DualGrid) -> Draws:
    """Draws of the best α from the posterior of each loss, within the range of α that was trained.

    The bound at α = 1 is left out: no mask was ever trained there, and a smooth process cannot fit the jump.
    """
    draws: Draws = {}
    for loss in (AR, MD):
        alphas = [alpha for alpha in grid.alphas if loss == AR or alpha < 1]
        losses = {
            (r, alpha): [final_loss(loss)(run) for run in chosen(records, R=r, alpha=alpha).values()]
            for r, alpha in itertools.product(grid.repetitions, alphas)
        }
        measured = {cell: values for cell, values in losses.items() if values}
        curves = posterior_curves(measured) if measured else {}
        inside = (min(alphas) <= ALPHAS) & (max(alphas) >= ALPHAS)
        draws |= {(r, loss): ALPHAS[inside][curve[inside].argmin(0)] for r, curve in curves.items()}
    return draws


def posterior_curves(losses: Mapping[tuple[float, float], list[float]]) -> dict[float, NDArray[np.float64]]:
    """Posterior draws of the loss over `ALPHAS` by R, `[N, draws]`, relative to the mean loss at that R."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern

    repetitions = sorted({r for r, _ in losses})
    center = {r: mean(mean(values) for (q, _), values in losses.items() if q == r) for r in repetitions}
    x_N2 = np.concatenate([coordinates_of(r, np.array([alpha])) for r, alpha in losses])
    y_N = np.array([mean(values) - center[r] for (r, _), values in losses.items()])
    scale = y_N.std() or 1.0
    repeated = [values for values in losses.values() if len(values) > 1]
    noise = mean(variance(values) for values in repeated) if repeated else 1e-4
    noise_N = np.array([noise / len(values) for values in losses.values()]) / scale**2
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern([1.0, 1.0], (0.3, 30.0), nu=1.5)
    process = GaussianProcessRegressor(kernel, alpha=noise_N + 1e-8, n_restarts_optimizer=4, random_state=0)
    with (
        warnings.catch_warnings()
    ):  # a length scale at its bound: the loss does not depend on that coordinate
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(x_N2, y_N / scale)
    return {r: process.sample_y(coordinates_of(r, ALPHAS), NUM_DRAWS, random_state=0) for r in repetitions}


def optimum_table(draws: Draws) -> Table:
    rows = []
    for (repetitions, loss), best in draws.items():
        low, middle, high = np.quantile(best, [0.05, 0.5, 0.95])
        rows.append(
            [
                f"{repetitions:g}, {'AR' if loss == AR else 'MD'}",
                f"{middle:.3f} [{low:.3f}, {high:.3f}]",
                f"{middle * repetitions:.1f} [{low * repetitions:.1f}, {high * repetitions:.1f}]",
                f"{alpha_rule(repetitions):.3f}",
            ]
        )
    return Table(
        title="The best α",
        head=["R, loss", "α", "α R", "rule"],
        rows=rows,
        note="Median and 90 % interval of the optimum under a Gaussian process (Matérn 3/2 over log R and a "
        "logit of α; noise: variance over seeds; the bound without α = 1). Rule: 63/64 up to R = 16, 16 / R "
        "beyond.",
    )


def both_ends(records: Sequence[Values], grid: DualGrid) -> Claim:
    found, inner = {}, mixed_alphas(grid)
    for r, loss in itertools.product([r for r in grid.repetitions if r >= HIGH], (AR, MD)):
        against = {
            alpha: [
                differences(
                    chosen(records, R=r, alpha=alpha), chosen(records, R=r, alpha=end), final_loss(loss)
                )
                for end in (0, 1)
            ]
            for alpha in inner
        }
        best = min(inner, key=lambda alpha: max(over_seeds(d).mean for d in against[alpha]), default=None)
        gaps = [NOTHING] * 2 if best is None else [str(over_seeds(gap)) for gap in against[best]]
        numbers = f"α {best or 0:.3g} minus α 0: {gaps[0]}, minus α 1: {gaps[1]}"
        found[regime(r, loss)] = some_beats_both(list(against.values())), numbers
    return claim_by_regime(
        f"Some 0 < α < 1 beats both ends for R ≥ {HIGH}",
        "holds where for some α both 95 % intervals of the paired difference to an end lie below 0, does not "
        f"where for every α one of them lies above -{WORTH}",
        found,
    )


def mixed_alphas(grid: DualGrid) -> list[float]:
    return [alpha for alpha in grid.alphas if 0 < alpha < 1]


def some_beats_both(against: Sequence[Sequence[Sequence[float]]]) -> Verdict:
    """Verdict over several α, each with its differences to both ends."""
    verdicts = [{is_below(to_end, worth=WORTH) for to_end in ends} for ends in against]
    if {"holds"} in verdicts:
        return "holds"
    fails = verdicts and all("does not hold" in ends for ends in verdicts)
    return "does not hold" if fails else "undecided"


def posterior_claim(claim: str, rule: str, probabilities: Mapping[str, float]) -> Claim:
    found = {name: (is_likely(share), f"{share:.2f}") for name, share in probabilities.items()}
    return claim_by_regime(claim, f"{rule}: {LIKELY_RULE}", found)


def regime(repetitions: float, loss: str) -> str:
    return f"R {repetitions:g}, {'AR' if loss == AR else 'MD'}"


def sixteen(draws: Draws) -> Claim:
    near = {
        regime(r, loss): float(((best * r >= 8) & (best * r <= 32)).mean())
        for (r, loss), best in draws.items()
        if r >= HIGH
    }
    return posterior_claim(f"α R ≈ 16 at the optimum for R ≥ {HIGH}", "8 ≤ α R ≤ 32", near)


def mostly_ar(draws: Draws) -> Claim:
    near = {
        regime(r, loss): float((best >= 0.9).mean()) for (r, loss), best in draws.items() if r <= HIGH / 2
    }
    return posterior_claim(f"α ≈ 63/64 at the optimum for R ≤ {HIGH // 2}", "α ≥ 0.9", near)


def same_optimum(records: Sequence[Values], grid: DualGrid) -> Claim:
    """Compares losses rather than positions, because a flat optimum has no exact position."""
    found, inner = {}, mixed_alphas(grid)
    for r in grid.repetitions if inner else ():
        runs = {alpha: chosen(records, R=r, alpha=alpha) for alpha in inner}
        best = {
            loss: min(inner, key=lambda alpha: fmean(map(final_loss(loss), runs[alpha].values())))
            for loss in (AR, MD)
            if all(runs.values())
        }
        if best:
            costs = differences(runs[best[AR]], runs[best[MD]], final_loss(MD))
            numbers = f"α {best[AR]:.3g} costs {over_seeds(costs)} against α {best[MD]:.3g}"
            found[f"R {r:g}"] = is_within(costs, -math.inf, WORTH), numbers
    return claim_by_regime(
        "The optimum is nearly the same in AR and MD evaluation",
        "MD bound at the mixed α that is best for AR minus that at its own best one: 95 % interval below "
        f"{WORTH}, or above",
        found,
    )


def early_stopping(records: Sequence[Values], grid: DualGrid) -> Claim:
    """A control: early stopping may give the same gain in AR mode as dual training."""
    found = {}
    for r in [r for r in grid.repetitions if r >= HIGH]:
        pure = chosen(records, R=r, alpha=1)
        inner = [chosen(records, R=r, alpha=alpha) for alpha in mixed_alphas(grid)]
        seeds = common_seeds(pure, *inner) if inner else []
        gaps = [best_loss(AR)(pure[s]) - min(final_loss(AR)(runs[s]) for runs in inner) for s in seeds]
        found[f"R {r:g}"] = is_within(gaps, -math.inf, WORTH), over_seeds(gaps)
    return claim_by_regime(
        f"AR with early stopping equals dual training in AR mode, R ≥ {HIGH}",
        f"best AR loss along the α = 1 run minus the best final one of 0 < α < 1: 95 % interval below "
        f"{WORTH}",
        found,
    )


def draw(records: Sequence[Values], grid: DualGrid, _: Path, path: Path) -> None:
    """Loss against α for each R, with the posterior of the optimum as a bar below."""
    draws = optimum_draws(records, grid)
    figure, axes = new_figure(2, 11, 4.2)
    for axis, (loss, label) in zip(axes[0], LOSS_NAMES.items(), strict=True):
        for number, r in enumerate(grid.repetitions):
            draw_losses(axis, records, grid, r, loss, f"C{number}")
            if (r, loss) in draws:
                low, high = np.quantile(draws[r, loss], [0.05, 0.95])
                y = -0.03 - 0.03 * number
                places = {"transform": axis.get_xaxis_transform(), "clip_on": False}
                axis.plot(
                    position([low, high]), [1 + y + 0.13] * 2, color=f"C{number}", linewidth=3, **places
                )
        axis.set_xticks(position(grid.alphas), [f"{alpha:.3g}" for alpha in grid.alphas])
        axis.set_xlabel("α, share of AR rows (bars at the top: the best α, 90 %)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0][0].legend(title="R", fontsize=8)
    figure.savefig(path, dpi=DPI)


def position(alphas: Sequence[float]) -> list[float]:
    return [float(x) for x in coordinates_of(1.0, np.array(alphas, dtype=float))[:, 1]]


def draw_losses(
    axis: Any, records: Sequence[Values], grid: DualGrid, repetitions: float, loss: str, color: str
) -> None:
    """The runs of one R: every seed as a point, a line through the medians."""
    by_alpha = {alpha: chosen(records, R=repetitions, alpha=alpha).values() for alpha in grid.alphas}
    values = {alpha: [final_loss(loss)(run) for run in runs] for alpha, runs in by_alpha.items() if runs}
    middle = [median(losses) for losses in values.values()]
    axis.plot(position(list(values)), middle, color=color, label=f"{repetitions:g}")
    for alpha, losses in values.items():
        axis.plot(position([alpha]) * len(losses), losses, ".", color=color)
