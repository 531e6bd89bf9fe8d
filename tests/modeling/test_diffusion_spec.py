"""A specification made by hand is as safe as one that `convert` writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import MASK, STOP, V, qwen3

from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec

VALUES: dict[str, Any] = {
    "format": "sdar",
    "block_size": 4,
    "grid": "absolute",
    "mask_token_id": MASK,
    "stop_token_ids": (STOP,),
}
OLD_CONFIG = {
    "format": "preserve",
    "block_size": 4,
    "grid": "response",
    "mask_token_id": 151_669,
    "stop_token_ids": [151_645, 151_643],
    "banned_token_ids": [151_669, 151_670, 151_671],
    "adapter": True,
    "version": 1,
}


@pytest.mark.parametrize("banned", [(), (3, 5), (MASK,), (MASK, 3)])
def test_a_spec_bans_its_own_mask_token(banned: tuple[int, ...]) -> None:
    spec = DiffusionSpec(**VALUES, banned_token_ids=banned)
    assert set(spec.banned_token_ids) == {*banned, MASK}
    assert len(spec.banned_token_ids) == len(set(spec.banned_token_ids))
    moved = replace(spec, mask_token_id=7, banned_token_ids=())
    assert moved.banned_token_ids == (7,)


def test_ids_are_banned_by_default() -> None:
    assert DiffusionSpec(**VALUES).banned_token_ids == (MASK,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_size", 0),
        ("block_size", -4),
        ("mask_token_id", -1),
        ("stop_token_ids", (STOP, -1)),
        ("banned_token_ids", (-100,)),
        ("format", "sdra"),
        ("grid", "relative"),
        ("draft_attention", "sideways"),
        ("noise_vocab_size", 0),
    ],
)
def test_nonsense_is_refused_with_key_value_and_rule(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} .*must") as failure:
        DiffusionSpec(**VALUES | {name: value})
    assert repr(value) in str(failure.value) or str(value) in str(failure.value)


def test_a_config_file_of_an_earlier_version_loads_and_is_written_unchanged() -> None:
    spec = DiffusionSpec.from_dict(OLD_CONFIG)
    assert spec.stop_token_ids == (151_645, 151_643)
    assert spec.to_dict() == OLD_CONFIG


def test_a_student_of_drafts_only_says_so_in_its_config_file_and_is_no_sdar() -> None:
    spec = DiffusionSpec.from_dict(OLD_CONFIG | {"noise_vocab_size": 9, "draft_attention": "causal"})
    assert DiffusionSpec.from_dict(spec.to_dict()) == spec and spec.to_dict()["noise_vocab_size"] == 9
    assert not spec.can_denoise and DiffusionSpec.from_dict(OLD_CONFIG).can_denoise
    with pytest.raises(ValueError, match="must have neither"):
        replace(spec, format="sdar")


def test_a_mask_id_beyond_the_vocabulary_changes_no_logit() -> None:
    """Checkpoints that were not converted have no mask token, and decode token by token all the same."""
    base = qwen3()
    model = DiffusionLM(base, DiffusionSpec(**VALUES | {"mask_token_id": V}))
    hidden_1H = torch.randn(1, base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.logits(hidden_1H), base.lm_head(hidden_1H))
