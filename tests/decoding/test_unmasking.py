"""Proposing and revealing tokens: filters, confidences, schedules."""

import pytest
import torch

from opdlm.decoding.unmasking import (
    choose_revealed,
    choose_tokens,
    filter_logits,
    gumbel_noise,
    num_to_reveal,
    propose_tokens,
)

OFF = torch.tensor([0.0, 1.0])
"""top_k and top_p that keep every token."""


def test_top_k_keeps_the_k_largest_logits() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0, -1.0]])
    assert torch.isfinite(filter_logits(logits, torch.tensor([2]), OFF[1:])).tolist() == [
        [False, True, True, False]
    ]


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert torch.isfinite(filter_logits(logits, OFF[:1], torch.tensor([0.7]))).tolist() == [
        [True, True, False, False]
    ]
    assert torch.isfinite(filter_logits(logits, OFF[:1], torch.tensor([0.81]))).tolist() == [
        [True, True, True, False]
    ]
    for tiny in (1e-6, 5e-324):
        top_p = torch.tensor([tiny], dtype=torch.float64)
        assert torch.isfinite(filter_logits(logits, OFF[:1], top_p)).sum() == 1


def test_confidence_is_the_unfiltered_probability() -> None:
    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(0))
    ids, confidence = propose_tokens(logits, torch.tensor([[0.5, 3, 1]]).expand(64, 3), torch.arange(64))
    expected = logits.softmax(-1).gather(-1, ids[:, None])[:, 0]
    assert torch.allclose(confidence, expected)
    assert (ids[:, None] == logits.topk(3).indices).any(1).all()


def test_temperature_zero_is_the_arg_max() -> None:
    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(0))
    for temperature in (0.0, 5e-324, 1e-38, 9e-6):
        sampling = torch.tensor([[temperature, 0, 1]], dtype=torch.float64).expand(64, 3)
        ids, _ = propose_tokens(1e6 * logits, sampling, torch.arange(64))
        assert torch.equal(ids, logits.argmax(-1))


def test_every_row_is_drawn_by_its_own_settings() -> None:
    settings = [
        (t, k, p) for t in (0.0, 0.3, 1.0, 7.0) for k in (0, 1, 3, 11, 99) for p in (1e-9, 0.5, 0.9, 1)
    ]
    logits = torch.randn(len(settings), 11, generator=torch.Generator().manual_seed(0))
    key = torch.arange(len(settings))
    noise = gumbel_noise(key, torch.arange(11)).tolist()
    ids = choose_tokens(logits, torch.tensor(settings, dtype=torch.float64), key).tolist()
    for row, (temperature, top_k, top_p) in enumerate(settings):
        order, mass, kept = logits[row].argsort(descending=True).tolist(), 0.0, []
        possible = order[: top_k or None] if temperature else order[:1]
        probs = (logits[row, possible].double() / (temperature or 1)).softmax(-1).tolist()
        for token, prob in zip(possible, probs, strict=True):
            if mass < top_p:
                kept.append(token)
            mass += prob
        scores = {token: float(logits[row, token]) / (temperature or 1) + noise[row][token] for token in kept}
        assert ids[row] == max(kept, key=scores.__getitem__), settings[row]


@pytest.mark.parametrize(("block_size", "steps"), [(4, 4), (4, 2), (4, 3), (8, 3), (8, 1), (5, 4)])
def test_a_block_is_revealed_in_exactly_its_denoising_steps(block_size: int, steps: int) -> None:
    revealed = [int(num_to_reveal(torch.tensor(step), block_size, steps)) for step in range(steps)]
    assert sum(revealed) == block_size
    assert sorted(revealed, reverse=True) == revealed


def test_static_reveals_the_most_confident_masked_positions() -> None:
    confidence = torch.tensor([[0.9, 0.2, 0.5, 0.4], [0.1, 0.1, 0.1, 0.1]])
    masked = torch.tensor([[False, True, True, True], [True, True, True, True]])
    revealed = choose_revealed(confidence, masked, torch.tensor([2, 1]), "low_confidence_static", 0.0)
    assert revealed.tolist() == [[False, False, True, True], [True, False, False, False]]


def test_dynamic_reveals_everything_strictly_above_the_threshold_and_at_least_the_schedule() -> None:
    confidence = torch.tensor([[0.95, 0.91, 0.9, 0.1], [0.3, 0.2, 0.1, 0.0]])
    masked = torch.ones(2, 4, dtype=torch.bool)
    revealed = choose_revealed(confidence, masked, torch.tensor([1, 1]), "low_confidence_dynamic", 0.9)
    assert revealed.tolist() == [[True, True, False, False], [True, False, False, False]]


def test_a_revealed_position_is_never_touched_again() -> None:
    masked = torch.tensor([[False, True, False, True]])
    revealed = choose_revealed(torch.ones(1, 4), masked, torch.tensor([4]), "low_confidence_dynamic", 0.5)
    assert torch.equal(revealed, masked)
