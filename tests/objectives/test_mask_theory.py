"""The closed forms against their published constants, and each against a second way to the same number."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import pairwise

import pytest

from opdlm.errors import DataError
from opdlm.objectives.mask_theory import (
    WIKITEXT_WEIGHTS,
    alpha_rule,
    crossover,
    ngram_signal_weights,
    optimal_t,
    p_signal,
    root,
    signal,
)

WINDOWS = [(0.0, 1.0), (0.0, 0.2459), (0.45, 0.55), (0.3, 0.3), (0.0, 1e-9)]


def signal_optimal_t(k: int) -> float:
    """The mask rate with the highest P_S."""
    return 1 / (k + 1)


def best_t1(k: int) -> float:
    """The end of the window [0, t1] with the highest mean P_S: there P_S(t1) equals the mean."""
    return root(lambda t1: p_signal(k, t1, t1) - p_signal(k, 0, t1), signal_optimal_t(k), 1.0)


def sample_complexity_t1(k: int) -> float:
    """The end of the window [0, t1] that needs the fewest samples (2601.22450).

    The root inside (0, 1) of (2k + 1) s^(k + 1) - (2k + 2) s^k + 1 with s = 1 - t1; it maximises
    √t1 E_t[(1 - t)^k]. The other root is t1 = 0; left of s = 2k / (2k + 1) the polynomial only falls.
    """
    return root(
        lambda t1: (2 * k + 1) * (1 - t1) ** (k + 1) - (2 * k + 2) * (1 - t1) ** k + 1, 1 / (2 * k + 1), 1.0
    )


def test_published_constants_of_parity() -> None:
    assert round(signal_optimal_t(6), 4) == 0.1429
    assert round(p_signal(6, 1 / 7, 1 / 7), 3) == 0.397
    assert round(best_t1(6), 4) == 0.2459
    assert round(p_signal(6, 0, best_t1(6)), 4) == 0.3165
    assert round(sample_complexity_t1(6), 4) == 0.1844
    assert [best_t1(k) for k in range(2, 6)] == pytest.approx([0.538, 0.416, 0.338, 0.285], abs=5e-4)


def test_published_weights_of_wikitext_give_the_published_t() -> None:
    assert round(optimal_t(WIKITEXT_WEIGHTS), 3) == 0.463


@pytest.mark.parametrize("k", [1, 3, 6, 20])
@pytest.mark.parametrize(("t0", "t1"), WINDOWS)
def test_p_signal_equals_its_integral(k: int, t0: float, t1: float) -> None:
    places = [t0 + (t1 - t0) * (i + 0.5) / 20_000 for i in range(20_000)]
    mean = math.fsum((k + 1) * t * (1 - t) ** k for t in places) / len(places)
    assert p_signal(k, t0, t1) == pytest.approx(mean, rel=1e-6, abs=1e-14)


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (0.0, 0.2459), (0.1, 0.5)])
def test_p_signal_equals_its_monte_carlo_frequency(t0: float, t1: float) -> None:
    rng, k, num = random.Random(0), 6, 40_000
    hits = 0
    for _ in range(num):
        t = rng.uniform(t0, t1)
        hits += sum(rng.random() < t for _ in range(k + 1)) == 1
    p = p_signal(k, t0, t1)
    assert hits / num == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / num))


@pytest.mark.parametrize("k", [2, 6, 11])
def test_best_windows_beat_all_others(k: int) -> None:
    def rate(t1: float) -> float:
        """√t1 E_t[(1 - t)^k], by the midpoint rule."""
        return math.sqrt(t1) * math.fsum((1 - t1 * (i + 0.5) / 400) ** k for i in range(400)) / 400

    others = [i / 500 for i in range(1, 501)]
    assert p_signal(k, 0, best_t1(k)) >= max(p_signal(k, 0, t1) for t1 in others)
    assert rate(sample_complexity_t1(k)) >= max(map(rate, others)) - 1e-9
    assert p_signal(k, *[signal_optimal_t(k)] * 2) >= max(p_signal(k, t, t) for t in others)


@pytest.mark.parametrize(
    "weights", [WIKITEXT_WEIGHTS, (1.0,), (0.0, 0.0, 0.0, 0.0, 1.0), (0.1, 0.0, 0.0, 0.0, 0.9)]
)
def test_optimal_t_is_the_top_of_the_signal(weights: tuple[float, ...]) -> None:
    best = optimal_t(weights)
    assert signal(best, weights) >= max(signal(i / 2000, weights) for i in range(2001))
    if sum(weights) == max(weights):
        assert best == pytest.approx(1 / (2 + weights.index(1.0)))


def test_weights_find_the_order_of_a_dependency() -> None:
    """Pairs: each second token repeats the one before. Triples: each third is the XOR of the two before."""
    rng = random.Random(0)
    bits = [[rng.getrandbits(1) for _ in range(3)] for _ in range(6000)]
    pairs = [(2 * a + 0, 2 * a + 1) for a, _, _ in bits]
    triples = [(a, 2 + b, 4 + (a ^ b)) for a, b, _ in bits]
    assert ngram_signal_weights(pairs) == pytest.approx((1, 0, 0, 0, 0), abs=1e-3)
    # position in the triple is known from the token, so the second token already says where the third is
    weights = ngram_signal_weights(triples)
    assert weights[1] == pytest.approx(math.log(2) / (math.log(2) + marginal_information(triples)), abs=1e-2)
    assert sum(weights) == pytest.approx(1)


def marginal_information(sequences: list[tuple[int, ...]]) -> float:
    """Σ over neighbours of log [p(a, x) / p(a) p(x)] per sequence, counted over all tokens as documented."""
    ones = Counter(token for tokens in sequences for token in tokens)
    twos = Counter(pair for tokens in sequences for pair in pairwise(tokens))
    total = sum(ones.values())
    gains = (n * math.log(n * total / (ones[a] * ones[x])) for (a, x), n in twos.items())
    return sum(gains) / len(sequences)


def test_weights_equal_a_count_by_hand() -> None:
    """Brute force over lists of n-grams; rare ones do not count, and none crosses the end of a sequence."""
    rng = random.Random(1)
    sequences = [[rng.randrange(3) for _ in range(rng.randrange(30))] for _ in range(40)]
    for tokens in sequences:
        tokens[3::4] = [(a + b) % 3 for a, b in zip(tokens[1::4], tokens[2::4], strict=False)][
            : len(tokens[3::4])
        ]

    def occurrences(gram: tuple[int, ...]) -> int:
        n = len(gram)
        return sum(tuple(s[i : i + n]) == gram for s in sequences for i in range(len(s) - n + 1))

    gains = []
    for n in range(2, 5):
        grams = {tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)}
        gain = 0.0
        for gram in grams:
            if occurrences(gram) >= 4:
                inner = occurrences(gram[1:-1]) if n > 2 else sum(map(len, sequences))
                ratio = occurrences(gram) * inner / occurrences(gram[:-1]) / occurrences(gram[1:])
                gain += occurrences(gram) * math.log(ratio)
        gains.append(max(gain, 0.0))
    expected = tuple(gain / sum(gains) for gain in gains)
    assert ngram_signal_weights(sequences, max_order=4, min_count=4) == pytest.approx(expected)


def test_a_large_corpus_is_sampled_by_whole_sequences() -> None:
    sequences = [[0, 1] if i % 2 else [i, i] for i in range(100)]
    assert ngram_signal_weights(sequences, max_tokens=200)[0] == 1
    with pytest.raises(DataError, match="occurs 5 times"):  # the even ones, which never repeat
        ngram_signal_weights(sequences, max_tokens=100)


def test_text_without_dependencies_has_no_weights() -> None:
    for sequences in ([], [[]], [[1, 2, 3]], [[7] * 50]):
        with pytest.raises(DataError, match="more often than by chance"):
            ngram_signal_weights(sequences)


def test_share_of_the_autoregressive_loss_follows_the_repetitions() -> None:
    assert [alpha_rule(r) for r in (1, 16, 32, 128)] == [63 / 64, 63 / 64, 0.5, 0.125]


def test_crossover_is_where_diffusion_stays_better() -> None:
    x, ar = [10 * i for i in range(10)], [5.0] * 10
    falling = [9.0 - i for i in range(10)]
    assert crossover(x, ar, falling, smoothing=1) == 50
    assert crossover(x, ar, falling) == 50  # the mean of a straight line is the line
    assert crossover(x, ar, [4.0] * 10) == 0
    assert crossover(x, ar, [6.0] * 10) is None
    assert crossover(x, ar, ar) is None
    dip = [6.0, 4.0, *[6.0] * 6, 4.0, 4.0]
    assert crossover(x, ar, dip, smoothing=1) == 80
    assert crossover(x, ar, [*falling[:8], 6.0, -9.0], smoothing=1) == 90
    assert crossover(x, ar, [*falling[:8], 6.0, -9.0], smoothing=3) == 50
