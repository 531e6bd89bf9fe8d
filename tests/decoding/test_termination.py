"""Decoding ends whatever the model computes: a step bound per row, and no proposal of [MASK]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny_models import V, make_lm
from torch import Tensor

from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.generate import generate
from opdlm.modeling import diffusion_lm
from opdlm.modeling.diffusion_lm import DiffusionLM

MASK = 0
"""The id that an arg-max over equal logits returns."""
PROMPTS = [[5], [6, 7, 8], [3, 4, 5, 6, 7, 8, 9]]
LIMIT = 9
Logits = Callable[[Tensor], Tensor]


def random_logits() -> Logits:
    """Another distribution at every call, so that the AR model disagrees with every draft."""
    rng = torch.Generator().manual_seed(0)
    return lambda logits: 50 * torch.randn(logits.shape, generator=rng)


def wants_mask(logits: Tensor) -> Tensor:
    return logits.index_fill(-1, torch.tensor([MASK]), torch.inf)


BROKEN: dict[str, Callable[[], Logits]] = {
    "wants [MASK]": lambda: wants_mask,
    "never agrees with itself": random_logits,
    "not a number": lambda: lambda logits: torch.full_like(logits, torch.nan),
    "infinite": lambda: lambda logits: torch.full_like(logits, torch.inf),
    "all equal": lambda: torch.zeros_like,
    "far below zero": lambda: lambda logits: torch.full_like(logits, -100.0),
}
MODES: list[tuple[str, Mode]] = [
    *(("sdar", mode) for mode in ("static", "threshold", "entropy", "left_to_right")),
    *(("lora", mode) for mode in ("ar", "static", "threshold", "entropy", "left_to_right", "lossless")),
]


@cache
def model_of(kind: str) -> DiffusionLM:
    """A model whose spec was made by hand and does not name [MASK] among the banned ids."""
    model = make_lm(kind)
    model.spec = replace(model.spec, mask_token_id=MASK, stop_token_ids=(V - 1,), banned_token_ids=())
    return model


def decode(kind: str, logits: Logits, config: DecodeConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """The largest number of steps of a row; fails where decoding takes more than its bound."""
    model = model_of(kind)
    original = diffusion_lm.head_logits
    monkeypatch.setattr(diffusion_lm, "head_logits", lambda *args: logits(original(*args)))
    num_steps, block_size = 0, 1 if config.mode in ("ar", "lossless") else model.spec.block_size

    def on_step(_index_B: Tensor, _tokens_BL: Tensor, _revealed_BL: Tensor) -> None:
        nonlocal num_steps
        num_steps += 1
        assert num_steps <= (LIMIT + block_size) * (block_size + 1), "decoding does not end"

    rollouts = generate(model, PROMPTS, config, torch.Generator().manual_seed(0), on_step)
    for rollout in rollouts:
        assert 0 < rollout.num_response <= LIMIT
        assert MASK not in rollout.text_ids
        if config.ar_accept_threshold == 0:  # one step for each token at most, the last block is whole
            assert rollout.num_steps <= LIMIT + block_size
    return num_steps


@pytest.mark.parametrize(("threshold", "temperature"), [(0.0, 0.0), (1.0, 1.0), (0.1, 1e-38)])
@pytest.mark.parametrize(("kind", "mode"), MODES)
@pytest.mark.parametrize("name", BROKEN)
def test_decoding_ends_within_its_step_bound_whatever_the_model_computes(
    name: str, kind: str, mode: Mode, threshold: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DecodeConfig(
        mode=mode, max_new_tokens=LIMIT, ar_accept_threshold=threshold, temperature=temperature
    )
    decode(kind, BROKEN[name](), config, monkeypatch)


@pytest.mark.parametrize(("kind", "mode"), MODES)
def test_a_model_without_any_possible_token_is_an_error_and_no_endless_loop(
    kind: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DecodeConfig(mode=mode, max_new_tokens=LIMIT)
    with pytest.raises(AssertionError, match=r"every logit is -inf"):
        decode(kind, lambda logits: torch.full_like(logits, -torch.inf), config, monkeypatch)


def test_an_ar_model_that_rejects_every_draft_still_ends_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejections cost steps, and each one makes a token final."""
    config = DecodeConfig(mode="static", max_new_tokens=LIMIT, ar_accept_threshold=1.0)
    num_accepting = decode("lora", torch.zeros_like, config, monkeypatch)
    num_rejecting = decode("lora", random_logits(), config, monkeypatch)
    assert num_accepting < num_rejecting
