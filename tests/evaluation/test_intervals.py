"""Confidence intervals hold the rate they state: by enumeration where possible, else by simulation."""

from math import comb

import numpy as np
import pytest

from opdlm.evaluation.intervals import compare_paired, mcnemar, mean_of_shares, pair_counts, wilson


def coverage_of(intervals: list[tuple[float, float]], share: float) -> float:
    """Probability that the interval of the count holds the true share: a sum over every possible count."""
    num = len(intervals) - 1
    return sum(
        comb(num, k) * share**k * (1 - share) ** (num - k)
        for k, (low, high) in enumerate(intervals)
        if low <= share <= high
    )


def test_wilson_covers_at_the_stated_rate_on_average_over_shares() -> None:
    shares = np.linspace(0.02, 0.98, 97)
    for num in (20, 50, 200):
        intervals = [wilson(k, num) for k in range(num + 1)]
        coverage = [coverage_of(intervals, share) for share in shares]
        assert 0.94 <= np.mean(coverage) <= 0.965
        assert min(coverage) > 0.83  # its known weak spot, near 0 and 1 at small counts


def test_wilson_gives_the_published_example_and_does_not_collapse_where_all_are_right() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson(20, 20)[0] < 0.85 and wilson(20, 20)[1] == 1.0


def test_the_interval_of_one_skill_is_wilson_and_of_many_is_narrower() -> None:
    assert mean_of_shares([(17, 20)]) == pytest.approx(wilson(17, 20))
    low, high = mean_of_shares([(17, 20)] * 4)
    assert low == pytest.approx(0.85 - (0.85 - wilson(17, 20)[0]) / 2)
    assert high == pytest.approx(0.85 + (wilson(17, 20)[1] - 0.85) / 2)


SKILLS = {"easy": (0.97, 0.02, 0.01), "even": (0.70, 0.15, 0.05), "hard": (0.20, 0.20, 0.10)}
"""Probabilities of: both right, the reference only, the other only."""


def as_pairs(counts: np.ndarray) -> list[tuple[bool, bool]]:
    kinds = [(True, True), (True, False), (False, True), (False, False)]
    return [kind for kind, num in zip(kinds, counts, strict=True) for _ in range(num)]


@pytest.mark.parametrize(("copies", "num"), [(1, 100), (7, 20)])
def test_intervals_cover_the_truth_in_95_of_100_simulated_evaluations(copies: int, num: int) -> None:
    """`copies` of the three skills, `num` prompts each; standard error of the rate: 0.9 points."""
    reference = np.mean([p[0] + p[1] for p in SKILLS.values()])
    other = np.mean([p[0] + p[2] for p in SKILLS.values()])
    rng, trials, hits = np.random.default_rng(0), 600, np.zeros(3)
    for trial in range(trials):
        drawn = [rng.multinomial(num, [*p, 1 - sum(p)]) for p in SKILLS.values() for _ in range(copies)]
        pairs = {str(i): as_pairs(counts) for i, counts in enumerate(drawn)}
        compared = compare_paired(pairs, num_resamples=500, seed=trial)
        assert compared.retention_interval is not None
        share = mean_of_shares([(int(c[0] + c[2]), num) for c in drawn])
        truths = (other / reference, other - reference, other)
        intervals = (compared.retention_interval, compared.difference_interval, share)
        hits += [low <= truth <= high for truth, (low, high) in zip(truths, intervals, strict=True)]
    assert np.all(hits / trials > 0.92) and np.all(hits / trials < 0.98), hits / trials


def test_pairing_narrows_the_interval_against_two_independent_samples() -> None:
    together = {"a": [(True, True)] * 50 + [(False, False)] * 48 + [(True, False)] * 2}
    low, high = compare_paired(together).difference_interval
    assert high - low < 0.06  # two independent samples of 100 would give 0.28


def test_counts_and_test_of_a_paired_comparison() -> None:
    pairs = {"a": [(True, True), (True, False), (True, False)], "b": [(False, True), (False, False)]}
    assert pair_counts(pairs["a"]).tolist() == [1, 2, 0, 0]
    compared = compare_paired(pairs)
    assert (compared.num_gained, compared.num_lost) == (1, 2)
    assert mcnemar(0, 0) == mcnemar(1, 1) == 1.0
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(9, 1) == mcnemar(1, 9)


def test_a_reference_that_knows_nothing_has_no_retention() -> None:
    assert compare_paired({"a": [(False, True)] * 5}).retention_interval is None


def test_the_same_seed_gives_the_same_interval() -> None:
    pairs = {"a": [(True, True)] * 30 + [(True, False)] * 10}
    assert compare_paired(pairs, seed=3) == compare_paired(pairs, seed=3)
