"""Closed formulas for mask rates, the share of the AR loss and the crossover of two curves.

k-parity: y is the product of k unknown ones of n bits. A mask is informative if exactly one of the k + 1
tokens is masked (the signal regime), which has probability P_S(t) = (k + 1) t (1 - t)^k. Text is a mixture of
orders i: Signal(t) = Σ_i w_i t (1 - t)^(i - 1). The functions take and return Python numbers.

Sources: mask rates arXiv 2601.22450, dual training 2512.14549, crossover 2511.03276; docs/masking.md compares
them with measurements.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import islice

from opdlm.errors import DataError

WIKITEXT_WEIGHTS = (0.7427, 0.2063, 0.0401, 0.0084, 0.0024)
"""Published shares of the orders 2 to 6 in WikiText; they give t* = 0.463."""


def p_signal(k: int, t0: float, t1: float) -> float:
    """Probability that exactly one of k + 1 tokens is masked for t ~ U[t0, t1]: (k + 1) E_t[t (1 - t)^k].

    The integral is a difference of powers of a = 1 - t0 and b = 1 - t1 divided by a - b. The division is
    written as a sum, so that t0 = t1 needs no special case.
    """
    a, b = 1 - t0, 1 - t1
    first, second = (math.fsum(a**i * b ** (n - 1 - i) for i in range(n)) for n in (k + 1, k + 2))
    return first - (k + 1) / (k + 2) * second


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """The zero between two arguments at which the function has different signs, by bisection to the last
    bit.
    """
    is_positive = function(low) > 0
    assert is_positive != (function(high) > 0), "no change of sign"
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if (function(middle) > 0) == is_positive else (low, middle)
    return middle


def ngram_signal_weights(
    sequences: Sequence[Sequence[Hashable]],
    max_order: int = 6,
    min_count: int = 5,
    max_tokens: int = 2_000_000,
) -> tuple[float, ...]:
    """Share w_i of the dependencies of order i = 2 ... max_order in sequences of token ids.

    The dependency of order i is the information about a token in the token i - 1 positions before it, given
    those between: the conditional mutual information I_i = Σ c(a m x) log [c(a m x) c(m) / (c(a m) c(m x))].
    The sum runs over the i-grams (a m x), m of i - 2 tokens, with count c of at least `min_count`; for i = 2,
    c(m) is the number of tokens. w_i = I_i / Σ I. n-grams do not cross the end of a sequence. If there are
    more than `max_tokens` tokens, every n-th sequence is read: time and memory grow with tokens × orders.
    DataError if no n-gram is frequent enough. How the published weights were counted is not known to us. On
    English prose these weights decrease as the published ones do; shares of occurrences or of distinct
    n-grams do not (docs/masking.md).
    """
    sequences = sequences[:: math.ceil(sum(map(len, sequences)) / max_tokens) or 1]
    frequent: list[dict[tuple[Hashable, ...], int]] = [{(): sum(map(len, sequences))}]
    information = []
    for order in range(1, max_order + 1):
        shorter = frequent[-1]  # an n-gram is at most as frequent as its beginning
        counts = Counter(
            gram
            for tokens in sequences
            for gram in zip(*(islice(tokens, i, None) for i in range(order)), strict=False)
            if gram[:-1] in shorter
        )
        frequent.append({gram: count for gram, count in counts.items() if count >= min_count})
        if order > 1:
            inner = frequent[order - 2]
            information.append(
                math.fsum(
                    count * math.log(count * inner[gram[1:-1]] / (shorter[gram[:-1]] * shorter[gram[1:]]))
                    for gram, count in frequent[order].items()
                )
            )
    gains = [max(gain, 0.0) for gain in information]
    if not sum(gains):
        raise DataError(
            f"{frequent[0][()]} tokens hold no n-gram that occurs {min_count} times and more often than by "
            "chance: give more text, or set masking.windows to numbers instead of auto."
        )
    return tuple(gain / sum(gains) for gain in gains)


def signal(t: float, weights: Sequence[float]) -> float:
    """Signal(t) = Σ w_i t (1 - t)^(i - 1); `weights` start with order 2."""
    return math.fsum(weight * t * (1 - t) ** order for order, weight in enumerate(weights, 1))


def optimal_t(weights: Sequence[float]) -> float:
    """t*, the mask rate with the highest signal; for a single order i it is 1 / i."""

    def slope(t: float) -> float:
        return math.fsum(
            weight * (1 - t) ** (order - 1) * (1 - (order + 1) * t) for order, weight in enumerate(weights, 1)
        )

    grid = [i / 1000 for i in range(1, 1000)]
    best = max(grid, key=lambda t: signal(t, weights))
    return root(slope, best - 1e-3, best + 1e-3)


def alpha_rule(repetitions: float) -> float:
    """Share of the autoregressive loss in dual training on data repeated R times (2512.14549, reported)."""
    return 63 / 64 if repetitions <= 16 else 16 / repetitions


def crossover(
    x: Sequence[float],
    ar: Sequence[float],
    dlm: Sequence[float],
    *,
    smoothing: int = 5,
) -> float | None:
    """The first x from which on the diffusion curve is better at every point; None if it is not at the last.

    Both curves are smoothed by the mean over `smoothing` neighbouring points (odd; fewer at the ends), so
    that a single noisy point neither creates nor hides a crossing. The values are losses. A diffusion loss is
    an upper bound, so a crossing found on it is late rather than early.
    """
    pairs = list(zip(smoothed(dlm, smoothing), smoothed(ar, smoothing), strict=True))
    is_better = [ours < theirs for ours, theirs in pairs]
    num_better = next((i for i, better in enumerate(reversed(is_better)) if not better), len(is_better))
    return x[len(x) - num_better] if num_better else None


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Mean over each point and up to width // 2 neighbours on both sides."""
    half_width = width // 2
    near = (values[max(0, i - half_width) : i + half_width + 1] for i in range(len(values)))
    return [math.fsum(part) / len(part) for part in near]
