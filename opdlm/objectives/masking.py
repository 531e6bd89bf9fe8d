"""Random masks: the number of masked tokens, which tokens they are, and their weights in the loss.

Each row (or block) draws a rate t from a mixture of windows. Token i is masked with probability
p_i = min(1, m_i ((1 - ε) t + ε)), with ε = `floor` and m_i its multiplier (`position_rates`). `bernoulli`
masks every token independently, `exact` masks ⌈p n⌉ of n tokens. A masked token has weight 1 / P(masked | t),
so that

    E[Σ_masked weight] = number of tokens with P(masked | t) > 0,   for every distribution of t.

Windows therefore change which masks are learned, but not the scale of the loss (docs/concepts.md, "Mask
rates"). `mask_theory` computes good windows; the caller decides which tokens can be masked.

Shape suffixes: T tokens of a row or block; every leading index (`...`) has a t of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdlm.config.sections import MaskSection, Windows, scheduled

COUNT_SLACK = 1e-4
"""Subtracted from p n before it is rounded up, so that rounding errors mask no additional token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRates:
    """The distribution of masks at one training step: `MaskSection` without schedule, ramp and `auto`."""

    windows: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    window_weights: tuple[float, ...] = ()
    """Relative weights of the windows; empty: equal."""
    floor: float = 0.0
    """ε: the lowest mask rate."""
    exact: bool = False
    """Mask exactly ⌈p n⌉ tokens."""
    position_rates: tuple[float, ...] = ()
    """Multipliers of the mask rate along the tokens that can be masked, interpolated linearly."""
    always_mask: tuple[int, ...] = ()
    """Indices of tokens that are always masked, counted among those that can be; negative from the end."""


ANY_RATE = MaskRates()


@dataclass(frozen=True, slots=True)
class Masks:
    """The masked tokens of every row and their weights, `[..., T]`."""

    is_masked: Tensor
    weight: Tensor
    """1 / P(masked | t) for masked tokens, 0 for the others."""
    is_counted: Tensor
    """P(masked | t) > 0. The sum of the weights estimates the number of these tokens."""


def rates_at(section: MaskSection, step: int) -> MaskRates:
    """The distribution at `step` (0-based). `auto` windows must have been resolved by `resolve_auto`."""
    windows = scheduled(section.schedule, step, section.windows)
    assert windows != "auto", "call resolve_auto first: t* depends on the text"
    if step + 1 < section.ramp_steps:
        grown = (step + 1) / section.ramp_steps
        windows = tuple((low, low + (high - low) * grown) for low, high in windows)
    return MaskRates(
        windows=windows,
        window_weights=section.window_weights,
        floor=section.floor,
        exact=section.sampler == "exact",
        position_rates=section.position_rates,
        always_mask=section.always_mask,
    )


def needs_optimal_t(section: MaskSection) -> bool:
    """Whether a window is `auto`, so that `resolve_auto` must be called before training."""
    return "auto" in (section.windows, *(windows for _, windows in section.schedule))


def auto_window(optimal_t: float, width: float) -> tuple[float, float]:
    """The window of this width around t*, shifted into [0, 1], rounded to three decimals."""
    low = min(max(optimal_t - width / 2, 0.0), 1 - width)
    return round(low, 3), round(low + width, 3)


def resolve_auto(section: MaskSection, optimal_t: float) -> MaskSection:
    """The section with `auto` replaced by the window around t*."""
    window = auto_window(optimal_t, section.auto_width)

    def resolved(windows: Windows) -> Windows:
        return (window,) if windows == "auto" else windows

    schedule = tuple((first, resolved(windows)) for first, windows in section.schedule)
    return replace(section, windows=resolved(section.windows), schedule=schedule)


def draw_masks(
    can_mask: Tensor,
    rates: MaskRates,
    rng: torch.Generator,
    *,
    at_least_one: bool = False,
) -> Masks:
    """Draw masks of rows `[..., T]` with a CPU generator; every leading index draws its own t.

    `at_least_one`: if `bernoulli` masks no token of a row, one token is masked (with equal rates the one with
    the lowest uniform number). This adds Π(1 - p_j) / n to every P(masked | t), and the weights include it.
    `exact` always masks a token. A token of rate 0 counts as one that cannot be masked.
    """
    factor, is_always = position_factors(can_mask, rates)
    can_mask = can_mask & (factor > 0)
    t = draw_t(can_mask.shape[:-1], rates, rng)[..., None]
    rate = (1 - rates.floor) * t + rates.floor
    uniform = torch.rand(can_mask.shape, generator=rng)
    if rates.exact:
        return exact_masks(uniform, can_mask, rate)
    p = (rate * factor).clamp_max(1.0).masked_fill(is_always, 1.0) * can_mask
    return bernoulli_masks(uniform, can_mask, p, at_least_one=at_least_one)


def exact_masks(uniform: Tensor, can_mask: Tensor, rate: Tensor) -> Masks:
    """Mask the ⌈rate · n⌉ tokens with the lowest uniform numbers; each has weight n / ⌈rate · n⌉."""
    count = can_mask.sum(-1, keepdim=True)
    num_masked = (rate * count - COUNT_SLACK).ceil().clamp_min(1)
    rank = uniform.masked_fill(~can_mask, 2.0).argsort(-1).argsort(-1)
    is_masked = can_mask & (rank < num_masked)
    return Masks(is_masked, is_masked * (count / num_masked), can_mask)


def bernoulli_masks(uniform: Tensor, can_mask: Tensor, p: Tensor, *, at_least_one: bool) -> Masks:
    """Mask every token independently with probability `p`; with `at_least_one`, one token if none is
    masked.
    """
    is_masked, included = uniform < p, p
    if at_least_one:
        # If no token is masked, (u - p) / (1 - p) is uniform: every token has the lowest equally often.
        spare = ((uniform.double() - p) / (1 - p.double())).masked_fill(~can_mask, torch.inf)
        is_lowest = torch.zeros_like(is_masked).scatter_(-1, spare.argmin(-1, keepdim=True), True)
        is_masked = is_masked | (can_mask & is_lowest & ~is_masked.any(-1, keepdim=True))
        count = can_mask.sum(-1, keepdim=True)
        included = p + (1 - p).prod(-1, keepdim=True) / count.clamp_min(1)
    return Masks(is_masked, torch.where(is_masked, 1 / included, 0.0), can_mask & (included > 0))


def draw_t(shape: Sequence[int], rates: MaskRates, rng: torch.Generator) -> Tensor:
    """One t per leading index: uniform numbers through the inverse distribution function of the mixture."""
    quantile = torch.rand(tuple(shape), generator=rng)
    if len(rates.windows) == 1:
        [(start, end)] = rates.windows
        return start + (end - start) * quantile
    share = torch.tensor(rates.window_weights or (1.0,) * len(rates.windows))
    share = share / share.sum()
    ends = share.cumsum(0)
    chosen = torch.searchsorted(ends[:-1].contiguous(), quantile, right=True)
    within = ((quantile - (ends - share)[chosen]) / share[chosen]).clamp(0, 1)
    low, high = torch.tensor(rates.windows)[chosen].unbind(-1)
    return torch.lerp(low, high, within)


def position_factors(can_mask: Tensor, rates: MaskRates) -> tuple[Tensor, Tensor]:
    """The multiplier of every token and whether it is always masked, `[..., T]` each.

    Both count only tokens that can be masked. `position_rates` are the knots of a piecewise linear function
    from the first to the last of them.
    """
    count = can_mask.sum(-1, keepdim=True)
    rank = can_mask.cumsum(-1) - 1
    factor, is_always = torch.ones(can_mask.shape), torch.zeros_like(can_mask)
    if rates.position_rates:
        knots = torch.tensor(rates.position_rates)
        place = rank / (count - 1).clamp_min(1) * (len(knots) - 1)
        left = place.floor().long().clamp(0, len(knots) - 2)
        factor = torch.lerp(knots[left], knots[left + 1], place - left)
    for index in rates.always_mask:
        is_always |= can_mask & (rank == (index if index >= 0 else count + index))
    return factor.masked_fill(is_always, 1.0), is_always
