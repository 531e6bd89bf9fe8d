"""Verdicts follow from the numbers: intervals over seeds, sign tests, several regimes."""

import math

import pytest
import torch

from opdlm.studies.claims import (
    all_of,
    combine,
    is_below,
    is_likely,
    is_sooner,
    is_usual,
    is_within,
    kendall,
    over_seeds,
    probability_usual,
    quantile,
)


def test_the_interval_over_seeds_is_students() -> None:
    estimate = over_seeds([1.0, 2.0, 3.0])
    assert estimate.mean == 2
    assert estimate.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-3)
    thirty_six = over_seeds([*range(36)])
    assert thirty_six.half == pytest.approx(2.0301 * math.sqrt(36 * 37 / 12) / 6, rel=1e-4)
    assert str(over_seeds([1.0])) == "1.000" and over_seeds([1.0]).half == math.inf


def test_a_sign_is_decided_by_the_interval_and_one_seed_decides_nothing() -> None:
    assert is_below([-1.0, -1.1, -0.9]) == "holds"
    assert is_below([1.0, 1.1, 0.9]) == "does not hold"
    assert is_below([-1.0, 0.1, 0.5]) == "undecided"
    nothing = [-0.001, 0.001, 0.0]
    assert is_below(nothing) == "undecided" and is_below(nothing, worth=0.05) == "does not hold"
    assert is_below([-0.04, -0.041, -0.039], worth=0.05) == "holds"
    assert is_below([-1.0, 0.1, 0.5], worth=0.05) == "undecided"
    assert is_below([-100.0]) == is_below([]) == is_below([-1.0, -math.inf]) == "undecided"


def test_a_range_is_decided_by_the_interval() -> None:
    assert is_within([0.50, 0.51, 0.52], 0.4, 0.6) == "holds"
    assert is_within([0.70, 0.71, 0.72], 0.4, 0.6) == "does not hold"
    assert is_within([0.58, 0.60, 0.62], 0.4, 0.6) == is_within([0.5], 0.4, 0.6) == "undecided"


def test_what_happens_in_two_of_three_seeds_is_usual() -> None:
    shares = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    density = shares**7 * (1 - shares) ** 2
    wanted = density[shares >= 2 / 3].sum() / density.sum()
    assert probability_usual(7, 2) == pytest.approx(float(wanted), abs=1e-4)
    assert probability_usual(0, 0) == pytest.approx(1 / 3)
    assert [is_usual(*pair) for pair in ((3, 0), (2, 0), (0, 1), (0, 3), (9, 1), (8, 2), (3, 4))] == [
        *("holds", "undecided", "undecided", "does not hold", "holds", "undecided", "does not hold")
    ]


def test_rank_correlation_is_one_for_the_same_order_and_zero_for_a_constant() -> None:
    assert kendall([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]) == pytest.approx(1)
    assert kendall([1.0, 2.0, 3.0, math.inf], [3.0, 2.0, 1.0, -1.0]) == pytest.approx(-1)
    assert kendall([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]) == pytest.approx(2 / 3)
    assert kendall([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0


def test_a_quantile_is_one_of_the_values_also_where_some_are_infinite() -> None:
    never = math.inf
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2 and quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2
    assert quantile([1.0, never, never], 0.5) == never and quantile([never], 0.25) == never


def test_who_is_sooner_is_asked_where_seeds_differ() -> None:
    never = math.inf
    assert is_sooner([(1, 2), (3, never), (5, 6), (never, never)]) == (
        "holds",
        "sooner in 3, later in 0 of 4 seeds",
    )
    assert is_sooner([(never, never)]) == (None, "sooner in 0, later in 0 of 1 seeds")


def test_a_probability_is_decided_at_its_ends() -> None:
    assert [is_likely(p) for p in (0.9, 0.5, 0.1)] == ["holds", "undecided", "does not hold"]


def test_regimes_that_disagree_make_a_claim_regime_dependent() -> None:
    assert combine({"R 1": "holds", "R 32": "does not hold", "R 8": "undecided"}) == "regime-dependent"
    assert combine({"R 1": "holds", "R 32": "undecided"}) == combine({}) == "undecided"
    assert combine({"R 1": "holds", "R 32": "holds"}) == "holds"
    assert combine({"R 1": "does not hold", "R 32": "undecided"}) == "does not hold"
    assert combine({"R 1": "regime-dependent", "R 32": "holds"}) == "regime-dependent"


def test_a_claim_of_several_parts_needs_all_of_them() -> None:
    assert all_of({"a": "holds", "b": "holds"}) == "holds"
    assert all_of({"a": "holds", "b": "undecided"}) == "undecided"
    assert all_of({"a": "undecided", "b": "does not hold"}) == "does not hold"
