"""Verdicts on the claims of a study, computed from its runs by fixed rules.

An estimate is a mean over seeds with its 95 % interval (Student's t; a single seed has an infinite interval).
A claim about a sign `holds` if the interval has that sign. It does not hold (`does not hold`) if the interval
excludes every effect of that sign that would matter. Otherwise it is `undecided`. A claim over several
regimes is `regime-dependent` if it holds in one regime and fails in another. It does not hold if it fails in
one regime and holds in none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
from scipy import stats

from opdlm.reporting.tables import NOTHING, Table

Verdict = Literal["holds", "does not hold", "regime-dependent", "undecided"]
LIKELY = 0.8
"""Posterior probability from which a statement holds."""
LIKELY_RULE = f"holds from posterior probability {LIKELY}, does not up to {1 - LIKELY:.1g}"
WORTH = 0.05
"""Smallest difference that matters, in nats per token or in tokens per forward."""
WORTH_ACCURACY = 0.02
"""Smallest difference that matters between shares of right answers."""
USUAL = 2 / 3
"""Share of seeds from which an event counts as usual."""
MIN_SEEDS = 3
"""Fewer seeds leave open whether an event is usual."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `num` seeds and half the width of its 95 % interval."""

    mean: float
    half: float
    num: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        half = f" ± {self.half:.3f}" if math.isfinite(self.half) else ""
        return f"{self.mean:.3f}{half}" if self.num else NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim with its rule, the verdict by that rule, and the numbers behind the verdict."""

    claim: str
    rule: str
    verdict: Verdict
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a study concludes: tables, and every claim with its verdict."""

    tables: list[Table]
    claims: list[Claim]


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean with half the width of its 95 % interval; an infinite value makes both infinite."""
    if not values:
        return Estimate(math.nan, math.inf, 0)
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return Estimate(mean(values), math.inf, len(values))
    t = float(stats.t.ppf(0.975, len(values) - 1))
    return Estimate(mean(values), t * stdev(values) / math.sqrt(len(values)), len(values))


def means(runs: Iterable[Any], measures: Iterable[Callable[[Any], float]]) -> list[str]:
    """Each measure over the runs, as a table shows it."""
    runs = list(runs)
    return [str(over_seeds([measure(run) for run in runs])) for measure in measures]


def common_seeds(*runs: Mapping[int, Any]) -> list[int]:
    """Seeds that every group of runs has."""
    return sorted(set.intersection(*map(set, runs))) if runs else []


def differences(
    first: Mapping[int, Any], second: Mapping[int, Any], measure: Callable[[Any], float]
) -> list[float]:
    """First minus second for each common seed."""
    return [measure(first[seed]) - measure(second[seed]) for seed in common_seeds(first, second)]


def is_below(values: Sequence[float], bound: float = 0.0, worth: float = 0.0) -> Verdict:
    """Whether the mean of the values, one per seed, is below `bound`. It is not if the interval lies above
    `bound - worth`.
    """
    estimate = over_seeds(values)
    if estimate.high < bound:
        return "holds"
    return "does not hold" if estimate.low > bound - worth else "undecided"


def interval_rule(worth: float) -> str:
    """The rule of `is_below` as a sentence."""
    return f"holds if the 95 % interval lies below 0, does not if above -{worth:g}"


def difference_claim(claim: str, what: str, gaps: Sequence[float], worth: float = WORTH) -> Claim:
    """That the differences `what`, one per seed, are negative."""
    return Claim(
        claim=claim,
        rule=f"{what}: {interval_rule(worth)}",
        verdict=is_below(gaps, worth=worth),
        evidence=str(over_seeds(gaps)),
    )


def is_within(values: Sequence[float], low: float, high: float) -> Verdict:
    """Whether the mean lies in [low, high]; undecided if the interval crosses a limit."""
    estimate = over_seeds(values)
    if low <= estimate.low and estimate.high <= high:
        return "holds"
    return "does not hold" if estimate.high < low or estimate.low > high else "undecided"


def is_likely(probability: float) -> Verdict:
    """The verdict on a statement of this posterior probability."""
    if probability >= LIKELY:
        return "holds"
    return "does not hold" if probability <= 1 - LIKELY else "undecided"


def is_usual(num_seen: int, num_not: int) -> Verdict:
    """Whether an event happens in at least two of three seeds; undecided with fewer than MIN_SEEDS seeds."""
    if num_seen + num_not < MIN_SEEDS:
        return "undecided"
    return is_likely(probability_usual(num_seen, num_not))


def is_sooner(pairs: Sequence[tuple[float, float]]) -> tuple[Verdict | None, str]:
    """Whether the first of a pair, one pair per seed, is usually the smaller one, with the numbers behind the
    verdict. The verdict is None where every pair is tied.
    """
    sooner, later = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    verdict = is_usual(sooner, later) if sooner + later else None
    return verdict, f"sooner in {sooner}, later in {later} of {len(pairs)} seeds"


def probability_usual(num_seen: int, num_not: int) -> float:
    """Posterior probability that an event's share of seeds is at least USUAL, with a uniform prior."""
    return float(stats.beta.sf(USUAL, num_seen + 1, num_not + 1))


def kendall(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Kendall's rank correlation (τ-b): 1 same order, -1 opposite order; 0 where one of both is constant."""
    tau = float(stats.kendalltau(xs, ys).statistic)
    return tau if math.isfinite(tau) else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value with at least this share of the values at or below it; values may be infinite."""
    return float(np.quantile(values, share, method="inverted_cdf"))


def combine(by_regime: Mapping[str, Verdict]) -> Verdict:
    """One verdict on a claim about all regimes."""
    found = set(by_regime.values())
    if "regime-dependent" in found or {"holds", "does not hold"} <= found:
        return "regime-dependent"
    return all_of(by_regime)


def all_of(parts: Mapping[str, Verdict]) -> Verdict:
    """The verdict on a claim of several parts: it holds if every part holds and fails if any part fails."""
    if "does not hold" in parts.values():
        return "does not hold"
    return "holds" if set(parts.values()) == {"holds"} else "undecided"


def claim_by_regime(
    claim: str,
    rule: str,
    found: Mapping[str, tuple[Verdict | None, object]],
    *,
    combined: Callable[[Mapping[str, Verdict]], Verdict] = combine,
    without: str = "",
) -> Claim:
    """A claim about several regimes, each with its verdict and its numbers. Regimes without a verdict do not
    count; `without` is the evidence where there is no other.
    """
    verdicts = {name: verdict for name, (verdict, _) in found.items() if verdict is not None}
    shown = [f"{name}: {found[name][1]} ({verdict})" for name, verdict in verdicts.items()]
    return Claim(claim=claim, rule=rule, verdict=combined(verdicts), evidence="; ".join(shown) or without)


def conclusion(predictions: Sequence[Claim]) -> str:
    """Every claim with its verdict, in Markdown."""
    items = [
        f"- **{p.verdict}**: {p.claim}.\n  - Rule: {p.rule}.\n  - Data: {p.evidence}." for p in predictions
    ]
    note = "Computed from the runs of this folder. `undecided`: the data allow both."
    return "\n".join([*items, "", note])
