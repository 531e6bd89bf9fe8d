"""How many tokens are masked, which, and what a masked one then weighs.

Every row (or block) draws t from a mixture of windows; a token is masked with probability
p_i = min(1, m_i ((1 - ε) t + ε)), ε = `floor`, m_i its multiplier (`position_rates`). `bernoulli` decides for
each token alone, `exact` masks ⌈p n⌉ of n. A masked token weighs 1 / P(masked | t), hence

    E[Σ_masked weight] = number of tokens that can be masked,   whatever the windows:

they move the training to other mask rates and do not rescale the loss (OBJECTIVES parts 0 and 2). Not here:
which window is good (`analytics`), which tokens may be masked (the caller).

Shape suffixes: T tokens of a row or block; leading indices (`...`) each draw their own t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdlm.config.sections import MaskSection, Windows, scheduled

COUNT_SLACK = 1e-4
"""⌈p n⌉ where p n is an integer up to rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRates:
    """The distribution of masks at one step of the training: `MaskSection` with everything decided."""

    windows: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    window_weights: tuple[float, ...] = ()
    """Relative; empty: equal."""
    floor: float = 0.0
    exact: bool = False
    position_rates: tuple[float, ...] = ()
    always_mask: tuple[int, ...] = ()


ANY_RATE = MaskRates()


@dataclass(frozen=True, slots=True)
class Masks:
    """Masked tokens of every row, `[..., T]`."""

    is_masked: Tensor
    weight: Tensor
    """1 / P(masked | t) where masked, 0 elsewhere."""


def rates_at(section: MaskSection, step: int) -> MaskRates:
    """The distribution at step `step` (0-based). `auto` must be resolved (`resolve_auto`)."""
    windows = scheduled(section.schedule, step, section.windows)
    assert windows != "auto", "resolve_auto first: t* comes from the corpus"
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
    """Whether `auto` appears anywhere: whoever trains must then call `resolve_auto`."""
    return "auto" in (section.windows, *(windows for _, windows in section.schedule))


def auto_window(optimal_t: float, width: float) -> tuple[float, float]:
    """The window of this width around t*, moved inside [0, 1]; to three decimals."""
    low = min(max(optimal_t - width / 2, 0.0), 1 - width)
    return round(low, 3), round(low + width, 3)


def resolve_auto(section: MaskSection, optimal_t: float) -> MaskSection:
    """The section with the window around t* in place of `auto`."""
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
    stratified: bool = False,
) -> Masks:
    """Masks of rows `[..., T]`, drawn with a CPU generator; each leading index draws its own t.

    at_least_one: a row of `bernoulli` where nothing was masked gets one token (with equal rates the one with
    the lowest uniform). This adds Π(1 - p_j) / n to every P(masked | t), which the weights know. `exact`
    always masks one. stratified: the i-th of B rows along the last leading axis draws from the i-th of B
    equally likely parts of the distribution of t. A token of rate 0 is never masked, and no sum of weights
    counts it.
    """
    factor, is_always = position_factors(can_mask, rates)
    can_mask = can_mask & (factor > 0)
    t = draw_t(can_mask.shape[:-1], rates, rng, stratified=stratified)[..., None]
    rate = (1 - rates.floor) * t + rates.floor
    uniform = torch.rand(can_mask.shape, generator=rng)
    if rates.exact:
        return exact_masks(uniform, can_mask, rate)
    p = (rate * factor).clamp_max(1.0).masked_fill(is_always, 1.0) * can_mask
    return bernoulli_masks(uniform, can_mask, p, at_least_one=at_least_one)


def exact_masks(uniform: Tensor, can_mask: Tensor, rate: Tensor) -> Masks:
    """The ⌈rate · n⌉ tokens with the lowest uniforms; each weighs n over their number."""
    count = can_mask.sum(-1, keepdim=True)
    num_masked = (rate * count - COUNT_SLACK).ceil().clamp_min(1)
    rank = uniform.masked_fill(~can_mask, 2.0).argsort(-1).argsort(-1)
    is_masked = can_mask & (rank < num_masked)
    return Masks(is_masked, is_masked * (count / num_masked))


def bernoulli_masks(uniform: Tensor, can_mask: Tensor, p: Tensor, *, at_least_one: bool) -> Masks:
    """Every token alone with its own probability, and one of those that can be masked if that masks none."""
    is_masked, included = uniform < p, p
    if at_least_one:
        # Given that nothing is masked, (u - p) / (1 - p) is uniform: each token has it lowest equally often.
        spare = ((uniform.double() - p) / (1 - p.double())).masked_fill(~can_mask, torch.inf)
        is_lowest = torch.zeros_like(is_masked).scatter_(-1, spare.argmin(-1, keepdim=True), True)
        is_masked = is_masked | (can_mask & is_lowest & ~is_masked.any(-1, keepdim=True))
        count = can_mask.sum(-1, keepdim=True)
        included = p + (1 - p).prod(-1, keepdim=True) / count.clamp_min(1)
    return Masks(is_masked, torch.where(is_masked, 1 / included, 0.0))


def draw_t(shape: Sequence[int], rates: MaskRates, rng: torch.Generator, *, stratified: bool) -> Tensor:
    """t for every leading index: uniform draws through the inverse distribution function of the mixture."""
    if stratified:
        offset = torch.rand((*shape[:-1], 1), generator=rng)
        quantile = (torch.arange(shape[-1]) + offset) / shape[-1]
    else:
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
    """The multiplier of every token, and which are always masked, `[..., T]`.

    Both count the tokens of a row that can be masked: `position_rates` are the knots of a line from the first
    to the last of them.
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
