"""Which tokens a denoising step proposes, and which of them it reveals.

Temperature, top-k and top-p change the distribution that is sampled; the confidence of a token is its
probability under the *unfiltered* distribution at temperature 1. Let n = block_size // denoising_steps, plus
1 in the first block_size % denoising_steps steps. Remasking rules (docs/concepts.md, "Rollouts and
remasking"; static and dynamic as in SDAR, arXiv 2510.06303):

    static            the n most confident positions
    dynamic           every position above the threshold, and at least the n most confident
    entropy-bounded   the most certain positions while the sum of their entropies minus the largest is within
                      a bound; at least one (arXiv 2505.24857)
    left-to-right     the n leftmost positions

Random numbers are counter-based: the Gumbel noise of a token is a hash of (key, token), and the key a hash of
(seed of the row, position, step). The draws of a row therefore do not depend on other rows, and two models
that draw with the same key share their noise (arXiv 2408.07978).

Every token has sampling settings of its own: `sampling_M3` holds temperature, top_k (0: all tokens) and top_p
(1: all tokens). It stays on the CPU, so that no step waits for the device to know which tokens are drawn.

Shape suffixes: M masked positions (flat), N some of them, V vocabulary, B rows, T positions of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .decode_config import DecodeConfig, Mode

Remasking = Literal["low_confidence_static", "low_confidence_dynamic", "entropy_bounded", "left_to_right"]
REMASKING: dict[Mode, Remasking] = {
    "ar": "left_to_right",
    "static": "low_confidence_static",
    "threshold": "low_confidence_dynamic",
    "entropy": "entropy_bounded",
    "left_to_right": "left_to_right",
}
"""The remasking rule of each mode."""

UNIFORM_BITS = 23
"""Random bits of a uniform number; with half a step added it is exact in float32 and never 0 or 1."""
UNIFORM_IDS, DRAFT_TOKENS, ACCEPTANCE = -(2**40), -(2**40) - 1, -(2**40) - 2
"""Stand for the step in the keys of draws that belong to no step: `uniform_ids`, and those of rejection."""
MIN_TEMPERATURE = 1e-5
"""Below it the arg-max is taken: the draw is the same, and logits over the temperature stay finite."""
MIN_TOP_P = 1e-9
"""Below it only the most likely token is left, and float32 would round the bound to 0."""


def sampling_of(config: DecodeConfig) -> list[float]:
    """Temperature, top_k and top_p of these settings."""
    return [config.temperature, config.top_k or 0, 1.0 if config.top_p is None else config.top_p]


def update_rows(rows_MV: Tensor, chosen_M: Tensor, update: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The rows, those of `chosen_M` (on the CPU) updated. `update` receives these rows and their indices."""
    index_N = chosen_M.nonzero()[:, 0]
    if not len(index_N):
        return rows_MV
    if len(index_N) == len(rows_MV):
        return update(rows_MV, index_N)
    place_N = index_N.to(rows_MV.device)
    return rows_MV.index_copy(0, place_N, update(rows_MV[place_N], index_N))


def filter_logits(logits_MV: Tensor, top_k_M: Tensor, top_p_M: Tensor) -> Tensor:
    """Keep the top_k largest logits and the smallest set of mass >= top_p of each row; the others become
    -inf.
    """

    def keep_largest(some_NV: Tensor, index_N: Tensor) -> Tensor:
        top_k_N1 = top_k_M[index_N, None].long()
        largest_NK = some_NV.topk(int(top_k_N1.max()), -1).values
        return some_NV.masked_fill(
            some_NV < largest_NK.gather(-1, (top_k_N1 - 1).to(some_NV.device)), -torch.inf
        )

    def keep_mass(some_NV: Tensor, index_N: Tensor) -> Tensor:
        top_p_N1 = top_p_M[index_N, None].clamp(min=MIN_TOP_P).to(some_NV)
        sorted_NV, order_NV = some_NV.sort(-1, descending=True)
        probs_NV = sorted_NV.softmax(-1)
        drop_NV = probs_NV.cumsum(-1) - probs_NV >= top_p_N1
        return some_NV.masked_fill(drop_NV.scatter(-1, order_NV, drop_NV), -torch.inf)

    is_largest_M = (top_k_M > 0) & (top_k_M < logits_MV.shape[-1])
    return update_rows(update_rows(logits_MV, is_largest_M, keep_largest), top_p_M < 1, keep_mass)


def mix_bits(number: Tensor) -> Tensor:
    """A bijective hash of int64: the finaliser of splitmix64, with arithmetic shifts. It makes two tensors at
    a time, since those of `gumbel_noise` are the largest of a decoding step.
    """
    number = (number >> 30).bitwise_xor_(number).mul_(-4658895280553007687)
    number = (number >> 27).bitwise_xor_(number).mul_(-7723592293110705685)
    return (number >> 31).bitwise_xor_(number)


def noise_keys(seed_M: Tensor, position_M: Tensor, step_M: Tensor | int) -> Tensor:
    """One key `[M]` per (seed of the row, position, step)."""
    return mix_bits(mix_bits(mix_bits(seed_M) + position_M) + step_M)


def uniform_ids(seed_M: Tensor, position_M: Tensor, num_ids: int) -> Tensor:
    """One id `[M]` in [0, num_ids) per (seed of the row, position), independent of the draws of any step."""
    return noise_keys(seed_M, position_M, UNIFORM_IDS).remainder(num_ids)


def uniform_numbers(key: Tensor) -> Tensor:
    """A number in (0, 1) per key, with 23 random bits."""
    bits = mix_bits(key).bitwise_right_shift_(20).bitwise_and_((1 << UNIFORM_BITS) - 1)
    return (bits.float() + 0.5) / (1 << UNIFORM_BITS)


def gumbel_noise(key_M: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise of the tokens `ids`, `[V]` or `[M, V]`, a function of key and token; with 23
    random bits at most 16.6.
    """
    return -torch.log(-torch.log(uniform_numbers(key_M[:, None] + ids * -7046029254386353131)))


def is_sampled(sampling_M3: Tensor) -> Tensor:
    """Bool `[M]`: the rows that take a sample, not the arg-max."""
    return sampling_M3[:, 0] >= MIN_TEMPERATURE


def scale_logits(logits_MV: Tensor, sampling_M3: Tensor) -> Tensor:
    """Logits of the distribution that is sampled, after temperature, top_k and top_p; as they are where the
    arg-max is taken.
    """
    temperature_M, top_k_M, top_p_M = sampling_M3.unbind(1)

    def scale(some_NV: Tensor, index_N: Tensor) -> Tensor:
        scaled_NV = some_NV / temperature_M[index_N, None].to(some_NV)
        return filter_logits(scaled_NV, top_k_M[index_N], top_p_M[index_N])

    return update_rows(logits_MV, is_sampled(sampling_M3), scale)


def draw_tokens(
    scaled_MV: Tensor, sampling_M3: Tensor, key_M: Tensor, ids_MV: Tensor | None = None
) -> Tensor:
    """One column `[M]` per row of `scale_logits`: the arg-max at temperature 0, else a sample. `ids_MV`: the
    token of every column; None: its number.
    """

    def add_noise(some_NV: Tensor, index_N: Tensor) -> Tensor:
        place_N = index_N.to(key_M.device)
        ids = torch.arange(some_NV.shape[-1], device=key_M.device) if ids_MV is None else ids_MV[place_N]
        return some_NV + gumbel_noise(key_M[place_N], ids)

    return update_rows(scaled_MV, is_sampled(sampling_M3), add_noise).argmax(-1)


def choose_tokens(
    logits_MV: Tensor, sampling_M3: Tensor, key_M: Tensor, ids_MV: Tensor | None = None
) -> Tensor:
    """One token `[M]` per row: the arg-max at temperature 0, else a sample from the filtered distribution.
    With `ids_MV`, the tokens of the columns, it is returned as a column.
    """
    return draw_tokens(scale_logits(logits_MV, sampling_M3), sampling_M3, key_M, ids_MV)


def propose_tokens(
    logits_MV: Tensor, sampling_M3: Tensor, key_M: Tensor, processed_MV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Proposed tokens `[M]` and their confidences `[M]`, from float32 logits that are -inf at banned ids. The
    tokens are chosen from `processed_MV` where it is given.
    """
    ids_M = choose_tokens(logits_MV if processed_MV is None else processed_MV, sampling_M3, key_M)
    return ids_M, logits_MV.softmax(-1).gather(-1, ids_M[:, None])[:, 0]


def entropies(logits_MV: Tensor) -> Tensor:
    """Entropy `[M]` of each distribution, in nats."""
    return torch.special.entr(logits_MV.softmax(-1)).sum(-1)


def num_to_reveal(step: Tensor, block_size: int, denoising_steps: int) -> Tensor:
    """The number n of positions to reveal in a block's `step` (0-based, any shape)."""
    return block_size // denoising_steps + (step < block_size % denoising_steps).long()


def choose_revealed(
    confidence_BT: Tensor, masked_BT: Tensor, num_B: Tensor, remasking: Remasking, threshold: float
) -> Tensor:
    """Bool `[B, T]`: the positions to reveal, a subset of `masked_BT`; of equal confidences the leftmost."""
    if remasking == "left_to_right":
        return masked_BT & (masked_BT.cumsum(1) <= num_B[:, None])
    ranked_BT = confidence_BT.masked_fill(~masked_BT, -torch.inf)
    rank_BT = ranked_BT.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    revealed_BT = rank_BT < num_B[:, None]
    if remasking == "low_confidence_dynamic":
        revealed_BT = revealed_BT | (confidence_BT > threshold)
    return revealed_BT & masked_BT


def choose_within_entropy(entropy_BT: Tensor, masked_BT: Tensor, bound: float) -> Tensor:
    """Bool `[B, T]`: the most certain masked positions whose entropies (nats), without the largest, sum to at
    most `bound`; at least one per row.
    """
    entropy_BT = entropy_BT.nan_to_num(0.0).masked_fill(~masked_BT, torch.inf)  # NaN must not block the row
    sorted_BT, order_BT = entropy_BT.sort(dim=1, stable=True)
    fits_BT = sorted_BT.cumsum(1) - sorted_BT <= bound
    return torch.zeros_like(masked_BT).scatter(1, order_BT, fits_BT) & masked_BT
