"""What runs with several seeds say about a prediction: decided by rules on numbers, never written by hand.

An estimate is a mean over seeds with its 95 % interval (Student's t: few seeds, wide interval; one seed, an
infinite one). A prediction about a sign `holds` if the interval lies on its side, `does not hold` if it
excludes every effect on that side that would be worth having, and is `undecided` in between. Over several
regimes it is `regime-dependent` if it holds in one and does not hold in another, and does not hold if it
fails in one and nothing says that it holds in another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev
from typing import Any, Literal

from opdlm.reporting.tables import NOTHING, Table

Verdict = Literal["holds", "does not hold", "regime-dependent", "undecided"]
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
"""Student's t for a two-sided 95 % interval, by degrees of freedom from 1."""
LIKELY = 0.8
"""Probability from which a statement about a posterior counts as decided."""
LIKELY_RULE = f"holds from posterior probability {LIKELY}, does not up to {1 - LIKELY:.1g}"
WORTH = 0.05
"""Nats per token, or tokens per forward, below which a difference is not worth having."""
WORTH_ACCURACY = 0.02
"""The same for shares of right answers."""
USUAL = 2 / 3
"""Share of seeds in which an event has to happen to be called usual."""
MIN_SEEDS = 3
"""From which on that is asked."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and half of its 95 % interval."""

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
    """A claim, the rule that decides it, what the data say, and the numbers behind that."""

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
    """Mean and half of the 95 % interval of it; values that are not finite make both so."""
    if not values:
        return Estimate(math.nan, math.inf, 0)
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return Estimate(mean(values), math.inf, len(values))
    half = student(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean(values), half, len(values))


def student(degrees: int) -> float:
    """Student's t for a two-sided 95 % interval: the table, then its expansion around the normal z."""
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def differences(
    first: Mapping[int, Any], second: Mapping[int, Any], measure: Callable[[Any], float]
) -> list[float]:
    """First minus second for each seed that both have."""
    return [measure(first[seed]) - measure(second[seed]) for seed in sorted(set(first) & set(second))]


def is_below(values: Sequence[float], bound: float = 0.0, worth: float = 0.0) -> Verdict:
    """Whether the mean of these values, one per seed, is below `bound`; not, if surely not by `worth`."""
    estimate = over_seeds(values)
    if estimate.high < bound:
        return "holds"
    return "does not hold" if estimate.low > bound - worth else "undecided"


def interval_rule(worth: float) -> str:
    """`is_below` in words."""
    return f"holds if the 95 % interval lies below 0, does not if above -{worth:g}"


def is_within(values: Sequence[float], low: float, high: float) -> Verdict:
    """Whether the mean lies in [low, high]: the interval inside, outside, or across its border."""
    estimate = over_seeds(values)
    if low <= estimate.low and estimate.high <= high:
        return "holds"
    return "does not hold" if estimate.high < low or estimate.low > high else "undecided"


def is_likely(probability: float) -> Verdict:
    """A statement of this posterior probability."""
    if probability >= LIKELY:
        return "holds"
    return "does not hold" if probability <= 1 - LIKELY else "undecided"


def is_usual(num_seen: int, num_not: int) -> Verdict:
    """Whether something happens in two of three seeds or more: three of three decide, and three of seven;
    fewer than three decide nothing.
    """
    if num_seen + num_not < MIN_SEEDS:
        return "undecided"
    return is_likely(probability_usual(num_seen, num_not))


def is_sooner(pairs: Sequence[tuple[float, float]]) -> tuple[Verdict | None, str]:
    """Whether the first of a pair, one per seed, is usually the smaller one, and the numbers behind it; no
    verdict where no pair differs.
    """
    sooner, later = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    verdict = is_usual(sooner, later) if sooner + later else None
    return verdict, f"sooner in {sooner}, later in {later} of {len(pairs)} seeds"


def probability_usual(num_seen: int, num_not: int) -> float:
    """Posterior probability that its share is at least USUAL, all shares alike before: a Beta distribution,
    at whole numbers a binomial sum.
    """
    num = num_seen + num_not + 1
    return sum(math.comb(num, k) * USUAL**k * (1 - USUAL) ** (num - k) for k in range(num_seen + 1))


def kendall(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Rank correlation over the pairs that neither ties: 1 same order, -1 opposite; 0 without such a pair."""
    signs = [
        (x > u) - (x < u) == (y > v) - (y < v)
        for (x, y), (u, v) in itertools.combinations(zip(xs, ys, strict=True), 2)
        if x != u and y != v
    ]
    return mean(1 if same else -1 for same in signs) if signs else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value with at least this share of all at or below it; infinite values are values."""
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1]


def combine(by_regime: Mapping[str, Verdict]) -> Verdict:
    """One verdict over regimes, for all of which the claim is made: one where it fails refutes it."""
    found = set(by_regime.values())
    if "regime-dependent" in found or {"holds", "does not hold"} <= found:
        return "regime-dependent"
    return all_of(by_regime)


def all_of(parts: Mapping[str, Verdict]) -> Verdict:
    """A claim with several parts in one regime holds if every part holds, and fails with any of them."""
    if "does not hold" in parts.values():
        return "does not hold"
    return "holds" if set(parts.values()) == {"holds"} else "undecided"


def by_regime(verdicts: Mapping[str, Verdict], numbers: Mapping[str, object]) -> str:
    """Evidence: each regime with its numbers and its own verdict."""
    return "; ".join(f"{name}: {numbers[name]} ({verdict})" for name, verdict in verdicts.items())


def conclusion(predictions: Sequence[Claim]) -> str:
    """Every prediction with its verdict, in Markdown."""
    items = [
        f"- **{p.verdict}**: {p.claim}.\n  - Rule: {p.rule}.\n  - Data: {p.evidence}." for p in predictions
    ]
    note = "Computed from the runs of this folder. `undecided`: the data allow both."
    return "\n".join([*items, "", note])
