"""Masks and their weights: every distribution against counting, and what they share: E[Σ weight] = tokens."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_checkpoints import write_checkpoint, write_rows
from torch import Tensor

from opdlm.cli.main import main
from opdlm.config.rules import load_config
from opdlm.config.sections import MaskSection
from opdlm.objectives.masking import (
    ANY_RATE,
    MaskRates,
    auto_window,
    draw_masks,
    draw_t,
    needs_optimal_t,
    rates_at,
    resolve_auto,
)

SHIFTED = ((0.2, 0.4), (0.7, 0.9))
DISTRIBUTIONS = {
    "uniform": ANY_RATE,
    "window": MaskRates(windows=((0.45, 0.55),)),
    "fixed": MaskRates(windows=((0.3, 0.3),)),
    "floor": MaskRates(floor=0.05),
    "mixture": MaskRates(windows=SHIFTED, window_weights=(1.0, 3.0)),
    "exact": MaskRates(exact=True),
    "exact window": MaskRates(exact=True, windows=((0.1, 0.2),)),
    "positions": MaskRates(position_rates=(0.5, 2.0, 1.0), windows=((0.2, 0.9),)),
    "always": MaskRates(always_mask=(0, -1), windows=((0.2, 0.9),)),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_rows(num: int, width: int = 8) -> Tensor:
    """Rows of which some tokens may not be masked, and some rows where none may."""
    return torch.rand((num, width), generator=seeded(1)) < torch.rand((num, 1), generator=seeded(2))


@pytest.mark.parametrize("at_least_one", [False, True])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_weights_sum_to_the_tokens_on_average(name: str, at_least_one: bool) -> None:
    can_mask = some_rows(200_000)
    masks = draw_masks(can_mask, DISTRIBUTIONS[name], seeded(), at_least_one=at_least_one)
    assert not (masks.is_masked & ~can_mask).any()
    assert ((masks.weight > 0) == masks.is_masked).all()
    sums = masks.weight.sum(-1) - can_mask.sum(-1)
    error = float(sums.std()) / math.sqrt(len(sums))
    assert abs(float(sums.mean())) <= 4 * error + 1e-6, (float(sums.mean()), error)
    assert error < 0.05


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_uniform_predictor_costs_log_v_under_every_distribution(name: str) -> None:
    num_tokens, vocabulary = 400_000, 11
    can_mask = torch.ones((num_tokens // 8, 8), dtype=torch.bool)
    masks = draw_masks(can_mask, DISTRIBUTIONS[name], seeded())
    targets_M = torch.randint(vocabulary, (int(masks.is_masked.sum()),), generator=seeded(3))
    loss_M = F.cross_entropy(torch.zeros(len(targets_M), vocabulary), targets_M, reduction="none")
    bound = (loss_M * masks.weight[masks.is_masked]).sum() / num_tokens
    assert float(bound) == pytest.approx(math.log(vocabulary), rel=0.02)


@pytest.mark.parametrize("at_least_one", [False, True])
@pytest.mark.parametrize(
    "rates",
    [
        MaskRates(windows=((0.0, 0.0),), always_mask=(0, -1)),
        MaskRates(windows=((0.2, 0.9),), position_rates=(0.0, 1.0, 2.0)),
        MaskRates(windows=((0.0, 0.0), (0.4, 0.8)), always_mask=(2,)),
    ],
    ids=["two tokens", "never the first", "half of the rows"],
)
def test_tokens_that_are_never_masked_are_not_counted(rates: MaskRates, at_least_one: bool) -> None:
    can_mask = some_rows(200_000)
    masks = draw_masks(can_mask, rates, seeded(), at_least_one=at_least_one)
    assert not (masks.is_counted & ~can_mask).any() and not (masks.is_masked & ~masks.is_counted).any()
    assert masks.is_counted.sum() < can_mask.sum()
    sums = masks.weight.sum(-1) - masks.is_counted.sum(-1)
    error = float(sums.std()) / math.sqrt(len(sums))
    assert abs(float(sums.mean())) <= 4 * error + 1e-6 and error < 0.05


@pytest.mark.parametrize("at_least_one", [False, True])
@pytest.mark.parametrize(
    ("rates", "never"),
    [
        (MaskRates(windows=((0.15, 0.15),)), ()),
        (MaskRates(windows=((0.15, 0.15),), position_rates=(0.2, 4.0, 1.0)), ()),
        (MaskRates(windows=((0.1, 0.1),), position_rates=(0.0, 1.0, 2.0)), (0,)),
        (MaskRates(windows=((0.15, 0.15),), position_rates=(0.2, 4.0, 9.0)), ()),
        (MaskRates(windows=((0.5, 0.5),), exact=True), ()),
        (MaskRates(windows=((0.0, 0.0),), always_mask=(1, -1)), (0, 2)),
    ],
    ids=["equal", "positions", "never the first", "up to 1", "exact", "two of four"],
)
def test_a_weight_is_one_over_the_frequency_of_being_masked(
    rates: MaskRates, never: tuple[int, ...], at_least_one: bool
) -> None:
    """Also where a token is forced: the probability of that is in the weight."""
    num = 400_000
    masks = draw_masks(torch.ones((num, 4), dtype=torch.bool), rates, seeded(), at_least_one=at_least_one)
    frequency_T = masks.is_masked.float().mean(0)
    assert (frequency_T == 0).nonzero()[:, 0].tolist() == list(never)
    for token in set(range(4)) - set(never):
        weights = masks.weight[:, token][masks.is_masked[:, token]]
        assert (weights == weights[0]).all()
        assert 1 / float(weights[0]) == pytest.approx(float(frequency_T[token]), abs=4 / math.sqrt(num))
    is_certain = at_least_one or rates.exact or float(frequency_T.max()) == 1
    assert bool(masks.is_masked.any(-1).all()) == is_certain


def test_defaults_draw_what_block_masks_always_were() -> None:
    """t ~ U(low, high) per block, masked below t, and the token with the lowest uniform in any case."""
    for seed, (low, high) in enumerate([(0.0, 1.0), (0.3, 0.5), (0.0, 0.02)]):
        can_mask = torch.rand((20, 30, 6), generator=seeded(seed)) < 0.8
        rng = seeded(seed)
        t = low + (high - low) * torch.rand((20, 30), generator=rng)[..., None]
        uniform = torch.rand((20, 30, 6), generator=rng).masked_fill(~can_mask, 2.0)
        expected = can_mask & ((uniform < t) | (uniform == uniform.amin(-1, keepdim=True)))
        rates = MaskRates(windows=((low, high),))
        assert torch.equal(draw_masks(can_mask, rates, seeded(seed), at_least_one=True).is_masked, expected)


def test_the_floor_is_the_lowest_rate_and_leaves_the_highest() -> None:
    for t, p in ((0.0, 0.2), (0.5, 0.6), (1.0, 1.0)):
        rates = MaskRates(windows=((t, t),), floor=0.2)
        masks = draw_masks(torch.ones((50_000, 4), dtype=torch.bool), rates, seeded())
        assert float(masks.is_masked.float().mean()) == pytest.approx(p, abs=0.01)


def test_exact_masks_the_rounded_up_share_and_every_subset_equally_often() -> None:
    for share, num_masked in ((0.5, 2), (0.51, 3), (0.01, 1), (1.0, 4)):
        rates = MaskRates(windows=((share, share),), exact=True)
        masks = draw_masks(torch.ones((60_000, 4), dtype=torch.bool), rates, seeded())
        subsets = Counter(tuple(row.nonzero()[:, 0].tolist()) for row in masks.is_masked)
        chosen = list(itertools.combinations(range(4), num_masked))
        assert sorted(subsets) == chosen
        assert [subsets[s] / 60_000 for s in chosen] == pytest.approx(
            [1 / len(chosen)] * len(chosen), abs=0.01
        )
        assert (masks.weight[masks.is_masked] == 4 / num_masked).all()


def test_exact_counts_of_u01_are_equally_likely() -> None:
    """So the bound is the mean over all orders of unmasking, as in any-order autoregression."""
    masks = draw_masks(torch.ones((60_000, 5), dtype=torch.bool), MaskRates(exact=True), seeded())
    counts = torch.bincount(masks.is_masked.sum(-1), minlength=6) / 60_000
    torch.testing.assert_close(counts, torch.tensor([0, *[0.2] * 5]), atol=0.01, rtol=0)


def test_t_follows_the_mixture() -> None:
    rates = MaskRates(windows=SHIFTED, window_weights=(1.0, 3.0))
    t = draw_t((80_000,), rates, seeded())
    is_low = t < 0.5
    assert float(is_low.float().mean()) == pytest.approx(0.25, abs=0.01)
    for values, (low, high) in ((t[is_low], SHIFTED[0]), (t[~is_low], SHIFTED[1])):
        assert low <= float(values.min()) < low + 1e-3 and high - 1e-3 < float(values.max()) <= high
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=1e-3)


def test_position_rates_stretch_over_the_tokens_that_can_be_masked() -> None:
    can_mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 1, 0, 0]]).bool()
    rates = MaskRates(windows=((0.4, 0.4),), position_rates=(0.5, 1.5, 4.0))
    expected = 0.4 * torch.tensor([[0.5, 1.0, 1.5, 2.75, 4.0], [0, 0.5, 0, 1.5, 4.0], [0, 0, 0.5, 0, 0]])
    num = 50_000
    masks = draw_masks(can_mask.repeat(num, 1), rates, seeded())
    frequency = masks.is_masked.view(num, 3, 5).float().mean(0)
    torch.testing.assert_close(frequency, expected.clamp_max(1), atol=0.01, rtol=0)


def test_always_masked_tokens_and_nothing_else() -> None:
    can_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    rates = MaskRates(windows=((0.0, 0.0),), always_mask=(-1,))
    for at_least_one in (False, True):
        masks = draw_masks(can_mask, rates, seeded(), at_least_one=at_least_one)
        assert masks.is_masked.long().tolist() == [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
        assert torch.equal(masks.weight, masks.is_masked.float())
    third = draw_masks(can_mask, MaskRates(windows=((0.0, 0.0),), always_mask=(2,)), seeded())
    assert third.is_masked.long().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_rates_follow_the_schedule_and_the_ramp() -> None:
    config = load_config(
        None,
        [
            *("masking.windows=[[0.4,0.6]]", "masking.schedule=[[0,[[0,1]]],[5,[[0.4,0.6]]]]"),
            *("masking.sampler=exact", "masking.floor=0.1"),
        ],
    )
    assert rates_at(config.masking, 4) == MaskRates(windows=((0.0, 1.0),), floor=0.1, exact=True)
    assert rates_at(config.masking, 5).windows == ((0.4, 0.6),)
    ramp = MaskSection(windows=((0.2, 0.8), (0.5, 0.9)), ramp_steps=4)
    upper = [[high for _, high in rates_at(ramp, step).windows] for step in range(6)]
    expected = [[0.35, 0.6], [0.5, 0.7], [0.65, 0.8], [0.8, 0.9], [0.8, 0.9], [0.8, 0.9]]
    torch.testing.assert_close(torch.tensor(upper), torch.tensor(expected))
    assert all(rates_at(ramp, step).windows[0][0] == 0.2 for step in range(6))
    assert rates_at(MaskSection(), 0) == ANY_RATE


def test_auto_is_a_window_around_t_inside_the_unit_interval() -> None:
    assert auto_window(0.463, 0.1) == (0.413, 0.513)
    assert auto_window(0.02, 0.1) == (0.0, 0.1)
    assert auto_window(0.99, 0.3) == (0.7, 1.0)
    config = load_config(None, ["masking.windows=auto", "masking.schedule=[[0,[[0,1]]],[9,auto]]"])
    assert needs_optimal_t(config.masking) and not needs_optimal_t(MaskSection())
    section = resolve_auto(config.masking, 0.45)
    assert not needs_optimal_t(section)
    assert [rates_at(section, step).windows for step in (0, 9)] == [((0.0, 1.0),), ((0.4, 0.5),)]
    with pytest.raises(AssertionError):
        rates_at(config.masking, 9)


def test_the_picture_of_the_chosen_window_is_drawn(tmp_path: Path) -> None:
    from opdlm.reporting.plots import plot_signal

    plot_signal((0.6, 0.3, 0.1), (0.35, 0.45), tmp_path / "window.png")
    assert (tmp_path / "window.png").stat().st_size > 10_000


def test_training_on_text_chooses_a_window_and_explains_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "text.jsonl", [{"text": f"copy {i} {i} again"} for i in range(40)])
    settings = ["data.path=" + str(tmp_path / "text.jsonl"), f"output_dir={tmp_path / 'run'}"]
    settings += ["data.sequence_length=32", "train.num_steps=2", "train.rows_per_update=2"]
    assert main(["train", str(tmp_path / "model"), *settings, "masking.windows=auto"]) == 0
    out = capsys.readouterr().out
    [(low, high)] = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["masking"]["windows"]
    assert "masking.windows auto: t* = 0." in out and high - low == pytest.approx(0.1)
    assert (tmp_path / "run" / "mask_window.png").stat().st_size > 10_000
